"""The examples of every `--help` run.

They are collected from the command line itself. Files and models that they name lie in the folder they run in: every
model is the embedded one, every text some of its text. Work is cut short by the options of `SHORT`. What can't run
here is only parsed, by the rows of `PARSED`, each with its reason.
"""

import gzip
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.text import Text

import was_fx
from was_fx import embedded
from was_fx.cli.main import app

# The beginning of an example, and why it is only parsed.
PARSED = {
    "was demo": "minutes; tests/cli/commands/test_demo.py runs it",
    "was bench": "minutes, and models of 8 billion parameters; test_bench.py runs it",
    "was tune": "needs a GPU",
    "was coverage": "half an hour; test_coverage.py runs parts of it",
    "was import": "needs a folder that TEAL or WAS released; test_import_artifacts.py makes one",
    "was search": "a minute each; test_search.py runs the recipes",
    "was recommend": "minutes; test_recommend.py runs it",
    "was reproduce was-": "models of 7 billion parameters; test_reproduce.py runs it on another",
    "was report": "minutes; test_report.py runs it",
    "was quantize ./llama --weights int4 --text": "fits every Linear; test_quantize.py does it on a smaller model",
    "was eval ./llama --schedule s.was.safetensors --task": "tasks of the Hub",
    "was generate meta-llama": "a model of 7 billion parameters",
    "was calibrate ./llava": "needs a multimodal model; test_calibrate.py makes one",
    "was serve": "waits for clients; test_serve.py is one",
    "was chat": "waits for questions; test_chat.py asks them",
    "was generate MODEL": "a placeholder for your own",
}
# Options that cut work short, added where a command has them and the example does not.
SHORT = {"--tokens": "512", "--length": "128", "--limit": "1", "--max-new-tokens": "3", "--new-tokens": "3"}
KEPT = {"--tokens", "--length"}  # also instead of what an example gives
MODEL = re.compile(r"(?:\./\S+|MODEL|meta-llama/\S+)")


def examples(group: Any = None, path: str = "was") -> Iterator[str]:
    """Every line of examples, as it is to be typed."""
    command = group or typer.main.get_command(app)
    lines = [Text.from_markup(line).plain for line in (command.epilog or "").split("\n\n")]
    yield from (line.partition("  ")[0] for line in lines if line.startswith("was "))
    for name, each in getattr(command, "commands", {}).items():
        yield from examples(each, f"{path} {name}")


EXAMPLES = sorted(set(examples()))


def why_parsed(example: str) -> str | None:
    """The reason why an example is only parsed; None if it runs."""
    return next((why for start, why in PARSED.items() if example.startswith(start)), None)


def parsed(arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """The command that arguments name, and what it would be called with; usage errors are raised."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    return command, command.make_context(command.name, list(arguments)).params


@pytest.fixture
def hub(monkeypatch):
    """The Hub's data sets hold the embedded model's text."""
    import datasets

    load, rows = datasets.load_dataset, {"text": embedded.text("validation")[:20_000].split("\n\n")}
    of_the_hub = {"Salesforce/wikitext": datasets.Dataset.from_dict(rows)}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, **settings: of_the_hub.get(path) or load(path, **settings)
    )


@pytest.fixture(scope="session")
def shelf(tmp_path_factory, was, calibration, schedule) -> Path:
    """What files of each kind are copied from."""
    folder = tmp_path_factory.mktemp("shelf")
    size = ("--tokens", 512, "--length", 128)
    assert was("calibrate", "embedded", *size, "--fisher", "--out", folder / "calibration").code == 0
    shutil.copy(schedule, folder / "schedule")
    model, tokenizer = embedded.load(torch.float32)
    was_fx.sparsify(model, schedule).save_pretrained(folder / "sparse")
    tokenizer.save_pretrained(folder / "sparse")
    (folder / "text").write_text(embedded.text("validation")[:20_000], encoding="utf-8")
    with gzip.open(folder / "rows", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": embedded.text("validation")[:20_000]}) + "\n")
    (folder / "pairs").write_text(json.dumps({"sentence_good": "It was.", "sentence_bad": "Was it were."}) + "\n")
    (folder / "history").write_text("".join(json.dumps({"index": at, "loss": 4.0 - at}) + "\n" for at in range(3)))
    curves = [
        {"n": n, "k": k, "sparsity": level, "us": 10.0 * (1 - level / 2)}
        for n, k in {(256, 256), (128, 256), (768, 256), (256, 768), (4096, 256)}
        for level in (0.0, 0.5, 0.9)
    ]
    (folder / "latency").write_text("".join(json.dumps(row) + "\n" for row in curves))
    return folder


def kind(option: str, name: str) -> str | None:
    """What a file that an example names holds; None for one that it makes."""
    if option in ("--out", "-o", "--plot", "--log", "--markdown", "--record"):
        return None
    named = {"--pairs": "pairs", "--history": "history", "--latency": "latency", "--ppl": None}
    if option in named:
        return named[option]
    if name.endswith(".txt"):
        return "text"
    if name.endswith(".json.gz"):
        return "rows"
    if name.endswith(".safetensors") or name == "FILE":
        return "calibration" if "calibration" in name else "schedule"
    return None


def lay_out(words: list[str], shelf: Path, was: Any) -> None:
    """Put what an example names into the working directory."""
    option = ""
    for word in words:
        what = kind(option, word)
        if MODEL.fullmatch(word):
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            saved = shelf / "sparse" if word.endswith("-sparse") else embedded.path()
            Path(word).symlink_to(saved, target_is_directory=True)
        elif what is not None and not Path(word.rpartition("=")[2]).exists():
            shutil.copy(shelf / what, word.rpartition("=")[2])
        elif option == "--ppl":
            schedules = [each for each in words if each.endswith(".safetensors")]
            for each in schedules:
                shutil.copy(shelf / "schedule", each)
            given = [part for each in schedules for part in ("--schedule", each)]
            Path(word).write_text(was("ppl", "embedded", "--limit", 1, "--length", 64, *given, "--json").stdout)
        option = word if word.startswith("-") else ""


def shortened(words: list[str], command: Any) -> list[str]:
    """The words, with little work to do."""
    known = {name for param in command.params for name in param.opts}
    words = list(words)
    for option, value in SHORT.items():
        if option in words and option in KEPT:
            words[words.index(option) + 1] = value
        elif option in known and option not in words:
            words += [option, value]
    return words


@pytest.mark.filterwarnings("ignore:the schedule was made with weights")
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example, was, shelf, hub, tmp_path, monkeypatch):
    words = shlex.split(re.split(" [<>] ", example)[0])[1:]
    command, given = parsed(words)
    assert given
    if why_parsed(example):
        return
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    lay_out(words, shelf, was)
    outcome = was(*shortened(words, command))
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout
    # Calm where nobody watches: lines, and few of them. (lm-eval's bars are off in a process of its own only.)
    if example.startswith("was eval"):
        return
    assert not re.search(r"[\r\x1b]", outcome.stdout + outcome.stderr)
    assert len(outcome.stderr.splitlines()) <= 40


def test_every_command_shows_an_example_of_itself():
    for path, command in _walk(typer.main.get_command(app), "was"):
        assert f"\n\n{path}" in (command.epilog or ""), path


def _walk(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _walk(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_most_examples_run_and_each_rule_is_needed():
    assert len([each for each in EXAMPLES if not why_parsed(each)]) > len(EXAMPLES) / 2
    for start in PARSED:
        assert any(each.startswith(start) for each in EXAMPLES), start


def test_an_example_with_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        parsed(["ppl", "embedded", "--wrong"])
