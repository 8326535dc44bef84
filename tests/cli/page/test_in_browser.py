"""The page in a real browser: it says nothing on the console, fits a phone, is dark where wished, and prints.

Runs where a Chromium is found: the path in CHROMIUM, or one of the usual names on PATH.
"""

import base64

import pytest

from tests.cli.page.browser import BROWSER, NAMES, Browser
from tests.cli.page.made_up import make_report, schedule
from was_fx.cli.page.page import render

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no Chromium: give its path in CHROMIUM, or put one of {', '.join(NAMES)} on PATH"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page of a deep model, with long words that must be broken."""
    made = tmp_path_factory.mktemp("page") / "report.html"
    schedules = {"s25": schedule(0.25, 126), "a-schedule-with-a-long-name" * 3: schedule(0.5, 3)}
    made.write_text(render(make_report(schedules=schedules, command="was report " + "x" * 200)), encoding="utf-8")
    return made


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1200, 900), (360, 740)])
def test_it_fits_and_says_nothing_on_the_console(browser, path, width, height, scheme):
    browser.said.clear()
    browser.requested.clear()
    browser.open(path, width, height, scheme)
    assert browser.value("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 23, 29)"}[scheme]
    browser.value("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert browser.value("document.documentElement.scrollWidth") <= width, "opened, it scrolls sideways"
    assert browser.said == []
    assert browser.requested == [path.as_uri()], "everything is in the file"


def test_values_are_shown_on_hover_and_by_the_keyboard(browser, path):
    browser.open(path, 1200, 900, "light")
    hover = "document.querySelector('.cell').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    browser.value(hover)
    assert browser.value("document.querySelector('.tip').textContent") == "model.layers.0.self_attn.q_proj: 25.0 %"
    browser.value("document.querySelectorAll('.mark[tabindex]')[1].focus()")
    shown = browser.value("[document.querySelector('.tip').textContent, document.querySelector('.tip').hidden]")
    assert shown == ["bf16, s25: 150 MB, loss 2.5200", False]


def test_it_prints(browser, path):
    browser.open(path, 1200, 900, "dark")
    pdf = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF-")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_an_error_in_a_page_would_be_seen(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>console.log('said'); throw new Error('thrown')</script>")
    browser.said.clear()
    browser.open(page, 360, 740, "light")
    assert browser.said[0] == "said"
    assert "thrown" in browser.said[1]
