"""The page is whole, loads nothing, and has the numbers that were measured."""

import re

import pytest
import torch

from tests.cli.page.made_up import PROJECTIONS, Page, calibration, choice, choices, make_report, schedule
from was_fx import LinearSchedule
from was_fx.choosing.decision import decide
from was_fx.cli.page import words
from was_fx.cli.page.page import render
from was_fx.schedules.files.fisher_scores import FisherScores

EVERY = ["choices", "schedules", "scores", "tasks", "samples", "search", "environment"]


def test_every_section_is_there_and_the_page_is_whole():
    html = render(make_report())
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.sections == EVERY
    assert [tag for tag, _ in page.elements].count("h1") == 1
    for tag, attributes in page.elements:
        if tag == "svg" and attributes.get("role") == "img":
            assert len(attributes["aria-label"]) > 10


def test_nothing_is_loaded_from_elsewhere():
    html = render(make_report())
    assert not [(tag, each) for tag, each in Page(html).elements if {"src", "href", "srcset", "data"} & set(each)]
    assert not re.search(r"url\(|@import|fetch\(|import\(", html)


def test_the_table_has_every_choice_with_its_numbers():
    page = Page(render(make_report()))
    cells = page.texts["td"]
    for each in choices():
        assert f"{each.loss:.4f}" in cells
        assert f"{each.perplexity:.2f}" in cells
        assert f"{each.ratio:.2f}×" in cells
        assert f"{each.bytes_per_token / 1e6:.1f} MB" in cells
    assert page.count("tr", "chosen") == 1
    assert page.count("circle", "chosen") == 2, "ringed in both plots"
    in_legends = 2 + 1  # formats, and a search
    marks = sum(page.count(tag, "mark") - page.count(tag, "faint") for tag in ("circle", "path"))
    assert marks - in_legends == 2 * len(choices())


def test_tokens_per_second_are_those_of_the_dense_model_times_the_speed_up():
    made = choices()
    other = [choice("int8", None, 0.0, 2.5, 12.5)]
    slow = [type(each)(**{**vars(each), "ms_per_token": 50.0, "dense_ms": 80.0}) for each in other]
    cells = Page(render(make_report(choices=[*made[:3], *slow]))).texts["td"]
    assert "80.0" in cells, "1.6 times the 50 tokens a second of the dense model"
    assert "took from 20.0 to 80.0 ms per token" in render(make_report(choices=[*made[:3], *slow]))


def test_a_busy_machine_is_spoken_of():
    made = choices()
    assert "Speeds are rough" not in render(make_report())
    restless = [type(each)(**{**vars(each), "repetitions": (1.0, 2.0, 3.0)}) for each in made]
    assert "repetitions of a choice differed by 100 % (median)" in render(make_report(choices=restless))


def test_the_heatmap_has_each_linear_nominal_and_realised():
    page = Page(render(make_report(schedules={"s25": schedule(0.25)}, choices=choices()[:2])))
    count = 3 * len(PROJECTIONS)
    assert page.count("rect", "cell") == 2 * count
    titles = page.texts["title"]
    assert "model.layers.2.mlp.up_proj: 25.0 %" in titles
    assert "model.layers.2.mlp.up_proj: 26.0 %" in titles


@pytest.mark.parametrize(("blocks", "numbers"), [(48, True), (126, False)])
def test_cells_of_deep_models_have_no_numbers_in_them_but_the_table_has(blocks, numbers):
    page = Page(render(make_report(schedules={"s25": schedule(0.25, blocks)}, calibration=None)))
    assert (page.count("text", "number") > 200) is numbers
    assert page.texts["th"].count(f"model.layers.{blocks - 1}") == 1


def test_experts_are_drawn_by_their_mean():
    made = schedule(0.5, 1, ("mlp.experts.down_proj[0]", "mlp.experts.down_proj[1]"))
    first = next(iter(made.linears))
    made = made.replace({first: LinearSchedule(0.25, 1.0, 1.0)})
    page = Page(render(make_report(schedules={"s25": made}, calibration=None, choices=choices()[:2])))
    assert "model.layers.0.mlp.experts.down_proj: 37.5 %" in page.texts["title"]


def test_thresholds_are_marked_where_the_calibration_has_their_score():
    page = Page(render(make_report()))
    assert page.count("path", "area") == 3 * len(PROJECTIONS)
    # τ of s25 and s50 is 0.25 and 0.5: scores are 0.1 + level².
    assert any("s50 cuts at 0.5 (63 %)" in title for title in page.texts["title"])
    other = schedule(0.5).replace({name: LinearSchedule(0.5, 0.5, 0.5) for name in schedule(0.5).linears})
    html = render(make_report(schedules={"s50": other}))
    assert Page(html).count("line", "cut") == 0
    assert "s50 has thresholds of another score" in html


def test_thresholds_of_fisher_scores_are_marked_on_these():
    plain = calibration()
    weights = {name: torch.tensor([1.0, 2.0, 4.0, 0.0]) for name in plain.shapes}
    scores = FisherScores(weights, {name: 2 * each for name, each in plain.thresholds.items()})
    with_scores = type(plain)(**{**vars(plain), "fisher": scores})
    channels = torch.tensor([0.5, 0.25, 0.125, torch.inf])
    made = schedule(0.5).replace({name: LinearSchedule(0.5, 0.5, 1.0, channels) for name in plain.shapes})
    html = render(make_report(schedules={"s50": made}, calibration=with_scores))
    assert "|x|·Fisher weight" in html
    assert Page(html).count("line", "cut") == 3 * len(PROJECTIONS)
    assert "another score" not in html
    html = render(make_report(schedules={"s50": made}, calibration=plain))
    assert "s50 has thresholds of another score" in html


def test_a_linear_whose_scores_are_all_the_same_is_drawn_too():
    flat = calibration()
    flat = type(flat)(**{**vars(flat), "thresholds": {name: each * 0 + 1 for name, each in flat.thresholds.items()}})
    assert "no spread" in Page(render(make_report(calibration=flat))).texts["text"]


@pytest.mark.parametrize(
    ("left_out", "section"),
    [
        ({"calibration": None}, "scores"),
        ({"evaluations": []}, "tasks"),
        ({"searches": []}, "search"),
        ({"prompts": []}, "samples"),
    ],
)
def test_a_section_with_nothing_to_show_is_left_out(left_out, section):
    assert Page(render(make_report(**left_out))).sections == [each for each in EVERY if each != section]


def test_tasks_have_errors_and_differences_in_points():
    page = Page(render(make_report()))
    assert "0.750 ± 0.010" in page.texts["td"]
    assert "0.720 ± 0.011 (−3.0)" in page.texts["td"]


def test_words_that_differ_are_marked_and_text_is_never_markup():
    page = Page(render(make_report()))
    assert "<b>wild</b>" in page.texts["mark"]
    assert "calm" in page.texts["mark"]
    assert "differs from word 4 on" in page.texts["p"]


@pytest.mark.parametrize("name", ["</script><script>x()</script>", "<img src=http://e.com>", "a\x1b[31m", "x\u202ey"])
def test_names_are_text(name):
    html = render(make_report(model=name, text=name, command=name, prompts=[name], environment={"x": name}))
    page = Page(html)
    assert page.sections == EVERY
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "img" not in [tag for tag, _ in page.elements]
    assert not re.search("[\x1b\u202e]", html)


@pytest.mark.parametrize(
    ("timed", "within", "expected"),
    [
        (
            True,
            0.05,
            "Int8 weights with 25 % sparsity (s25) decode 2.50× as fast and read 62 % less per token, at +3.0 % in "
            "perplexity.",
        ),
        (
            False,
            0.05,
            "Int8 weights with 25 % sparsity (s25) read 62 % less per token, at +3.0 % in perplexity.",
        ),
        (
            True,
            0.0,
            "Nothing faster stays within 0 % of the dense perplexity. The nearest: int8 weights without sparsity "
            "decode 1.60× as fast and read 50 % less per token, at +0.1 % in perplexity.",
        ),
    ],
)
def test_the_headline(timed, within, expected):
    made = choices(timed=timed)
    assert words.headline(decide(made, within)) == expected
    html = render(make_report(choices=made, within=within))
    assert Page(html).texts["h1"] == [expected]
    assert ("tokens/s" in html) is timed


def test_where_nothing_is_faster_the_page_says_so():
    dense = choices()[0]
    slow = choice("bf16", "s25", 0.25, 2.52, 30.0)
    page = Page(render(make_report(choices=[dense, slow])))
    assert page.texts["h1"] == ["Stay dense: nothing that was measured here is faster than the model as it is."]
    assert page.count("tr", "chosen") == 0
