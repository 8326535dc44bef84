"""Whatever a Linear, a file or a folder is called, it is shown as text: no markup, no link, no escape code."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from was_fx import Calibration, LinearSchedule, Schedule, Score
from was_fx.cli.main import app
from was_fx.cli.render import coverage_page, search_progress
from was_fx.cli.render.console import PlainConsole, progress
from was_fx.coverage import sweep as coverage_sweep
from was_fx.coverage.cover import Coverage
from was_fx.schedules.names import markdown, visible
from was_fx.schedules.search.block_search import SearchState
from was_fx.sparse.model_card import schedule_section

NAMES = {
    "closing tag": "[/x]",
    "link": "[link=https://e.com]x[/link]",
    "colour": "[red]x",
    "escape": "\x1b[31mx\x1b[0m",
    "hyperlink": "\x1b]8;;https:e.com\x1b\\x",
    "8-bit escape": "\x9b31mx",
    "line break": "a\nb\r",
    "bar": "a|b",
    "emoji": "x:smile:",
    "formula": "$x$_y_",
    "backslash": "x\\",
    "direction": "x\u202ey",
    "file name in another encoding": "x\udcff",
}
# What the terminal itself is told: colours, and where to draw a progress bar.
OURS = re.compile(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[\d?[KAG]|\r")


@pytest.fixture(params=list(NAMES.values()), ids=list(NAMES))
def name(request) -> str:
    return request.param


def shown(name: str, *arguments: object, code: int = 0, color: bool = False) -> str:
    """What `was` prints, once it is certain that it is plain text with the name in it."""
    env = {"COLUMNS": "80", "WAS_DEBUG": None, "FORCE_COLOR": "1" if color else None, "TERM": "xterm"}
    result = CliRunner(env=env).invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    output = OURS.sub("", result.stdout + result.stderr)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", output)
    # Some messages give values as Python or Click write them.
    written = visible(name), repr(name)[1:-1], re.sub(r"[\n\r]", lambda found: f"\\x{ord(found[0]):02x}", name)
    assert any(squeezed(each) in squeezed(output) for each in written), output
    return result.stdout


def squeezed(text: str) -> str:
    """Without what wrapping puts between two characters; a path has no `//`."""
    return re.sub(r"[\s│]", "", text).replace("//", "/")


@pytest.fixture
def linears(name) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{block}.{name}": (4, 8) for block in range(2)} | {name: (4, 8)}


@pytest.fixture
def schedule_file(tmp_path, name, linears) -> Path:
    """A schedule with such Linears, in a file of such a name."""
    path = tmp_path / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {each: LinearSchedule(0.5, 1.0, 1.0) for each in linears if each.isprintable() or "\udcff" not in each}
    entries = entries or {"x": LinearSchedule(0.5, 1.0, 1.0)}
    Schedule(entries, dict.fromkeys(entries, (4, 8))).save(path)
    return path


@pytest.mark.parametrize("color", [False, True], ids=["file", "terminal"])
@pytest.mark.parametrize("more", [[], ["--thresholds"]])
def test_inspect_a_schedule(name, schedule_file, color, more):
    shown(schedule_file.name, "inspect", schedule_file, *more, color=color)


def test_json_gives_names_back_and_holds_no_control_character(name, schedule_file):
    text = shown("schedule", "inspect", schedule_file, "--json")
    assert json.loads(text)["path"] == str(schedule_file)


@pytest.mark.parametrize("color", [False, True], ids=["file", "terminal"])
def test_inspect_and_make_of_a_calibration(name, linears, tmp_path, color):
    if "\udcff" in name:
        pytest.skip("a tensor's name is UTF-8")
    path = tmp_path / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = torch.tensor([0.0, 0.25, 0.5, 0.95])
    Calibration(Score(), levels, {each: levels.clone() for each in linears}, linears, 8, name).save(path)
    shown(name, "inspect", path, color=color)
    out = tmp_path / f"{name}.out"
    shown(name, "make", path, "--target", "50%", "--out", out, color=color)
    shown(name, "make", path, "--target", "50%", "--out", out, code=1, color=color)
    shown(name, "make", path, "--target", "50%", "--out", tmp_path / "o", "--include", f"{name}?", code=1)


def test_compare_its_picture_and_its_inputs(name, schedule_file, tmp_path):
    history = tmp_path / f"{name}.jsonl"
    history.write_text(json.dumps({"index": 0, "loss": 4.0}) + "\n")
    row = {"schedule": str(schedule_file), "perplexity": 2.0, "nominal": 0.5, "realised": 0.5, "bytes_saved": 0.3}
    setting = {"model": name, "text": name, "prefill": "sparse", "length": 64}
    ppl = tmp_path / f"{name}.json"
    ppl.write_text(json.dumps({**setting, "results": [row]}))
    inputs = (schedule_file, "--history", history, "--ppl", ppl)
    plot = tmp_path / f"{name}.svg"
    shown(name, "compare", *inputs, "--plot", plot)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", plot.read_text(encoding="utf-8"))
    ppl.write_text("{}")
    shown(name, "compare", *inputs, color=True, code=1)
    shown(name, "compare", schedule_file, "--plot", f"{name}.gif", code=2)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", "{}"], 1),
        (["make", "{}", "--target", "0.5", "--out", "unwritten"], 1),
        (["compare", "{}"], 1),
        (["compare", "--history", "{}"], 1),
        (["recalibrate", "embedded", "{}", "--out", "unwritten"], 1),
        (["ppl", "embedded", "--schedule", "{}"], 1),
        (["ppl", "embedded", "--text", "{}"], 1),
        (["ppl", "{}/x/y", "--text", "{tmp}/text"], 1),
        (["ppl", "{}"], 2),
        (["generate", "embedded", "--schedule", "{}", "--prompt", "x"], 1),
        (["eval", "embedded", "--schedule", "{}"], 1),
        (["report", "embedded", "--schedule", "{}"], 1),
        (["search", "embedded", "--target", "0.5", "--start", "{}", "--out", "unwritten"], 1),
        (["search", "embedded", "--target", "0.5", "--cost", "latency", "--latency", "{}", "--out", "unwritten"], 1),
        (["import", "{}", "--model", "embedded", "--level", "0.5", "--out", "unwritten"], 1),
        (["calibrate", "embedded", "--device", "{}", "--out", "unwritten"], 1),
        (["published", "show", "{}"], 1),
        (["published", "export", "{}"], 1),
        (["published", "export", "was-llama-2-7b-60", "--out", "none/{}"], 1),
        (["coverage", "{}"], 2),
        (["bench", "embedded", "--target", "{}"], 2),
        (["make", "x", "--target", "{}"], 2),
        (["search", "embedded", "--target", "0.5", "--recipe", "{}"], 2),
        (["inspect", "x", "{}"], 2),
        (["inspect", "--{}"], 2),
        (["--{}"], 2),
        (["published", "{}"], 2),
        (["{}"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(name, tmp_path, monkeypatch, arguments, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("It was a dark night. " * 30)
    if any("--{}" in each for each in arguments):
        name = name.partition("=")[0]  # what follows is its value
    arguments = [each.replace("{tmp}", str(tmp_path)).replace("{}", name) for each in arguments]
    shown(name, *arguments, code=code, color=True)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_schedule_that_does_not_fit_names_its_linears(name, schedule_file):
    name = "x" if "\udcff" in name else name
    shown(name, "ppl", "embedded", "--schedule", schedule_file, "--limit", 1, "--length", 16, code=1)


@pytest.mark.parametrize("kind", ["colour", "line break", "bar", "escape"])
def test_a_model_folder(kind, tmp_path, other_model, text):
    folder = tmp_path / NAMES[kind]
    shutil.copytree(other_model, folder)
    window = ("--text", text, "--length", 16, "--batch-size", 1)
    out = tmp_path / f"{folder.name}.safetensors"
    shown(folder.name, "calibrate", folder, *window, "--tokens", 16, "--out", out, color=True)
    shown(folder.name, "ppl", folder, *window, "--limit", 1)
    shown(folder.name, "generate", folder, "--prompt", "It " * 200, code=1)
    (folder / "config.json").unlink()
    shown(folder.name, "ppl", folder, *window, code=1)


def test_progress_on_a_terminal(name, monkeypatch):
    consoles = [PlainConsole(io.StringIO(), width=200, force_terminal=True) for _ in range(2)]
    for module, console in zip(("console", "search_progress"), consoles, strict=True):
        monkeypatch.setattr(f"was_fx.cli.render.{module}.stderr", lambda console=console: console)
    with progress(f"Loading {name}") as advance:
        advance(1, 2)
    with search_progress.SearchDisplay() as display:
        display.update(SearchState(0, 1, phase=f"greedy allocation in {name}"))
        display._status.renderable.update()
        consoles[1].print(display._status.renderable)
    for console in consoles:
        output = OURS.sub("", console.file.getvalue())
        assert visible(name) in output
        assert "\x1b" not in output


def as_read(source: str) -> str:
    """The text that a reader of rendered Markdown sees in its first table."""
    html = MarkdownIt("commonmark").enable("table").render(source)
    assert "<a" not in html.replace("<a>", "")
    assert "<em>" not in html
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", html)
    for entity, character in {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&amp;": "&"}.items():
        cells = [each.replace(entity, character) for each in cells]
    return cells


def test_markdown_of_the_model_card(name):
    entries = {each: LinearSchedule(0.5, 1.0, 1.0) for each in (f"layers.0.{name}", name)}
    section = schedule_section(Schedule(entries, dict.fromkeys(entries, (4, 8))), name)
    cells = as_read(section)
    assert cells == ["block", visible(name), "0", "50.0", "Linear", "sparsity", visible(name), "50.0"]
    assert "://e" not in section.partition("Share of")[2]


def test_the_page_and_the_table_of_coverage(name, monkeypatch):
    row = Coverage("llama", "L", linears=3, graph_breaks=(name,), declined={f"layers.0.{name}": name})
    monkeypatch.setattr(coverage_sweep, "_isolated", lambda *_: row)
    shown(name, "coverage", "llama", code=1)
    cells = as_read(coverage_page.page([row], {name: f"no {name}"}, {}))
    assert f"graph break: {visible(name)}; layers.*.{visible(name)}: {visible(name)}" in cells
    assert visible(f"no {name}") in cells


@pytest.mark.parametrize("text", ["https://e.com", "www.e.com", "me@e.com", "**x**", "`x`", "<b>x</b>", "~~x~~", "_x_"])
def test_markdown_is_never_live(text):
    cells = as_read(f"| {markdown(text)} |\n|---|\n")
    assert cells == [text]
    assert not re.search(r"(?<!\\)(://|www\.|\w@)", markdown(text))
