"""One set of options: what is called alike is spelt, abbreviated and meant alike in every command."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from was_fx.cli.input.shared_options import LOADING, how_to_go_on, loading, with_shared_options
from was_fx.cli.main import app
from was_fx.cli.render.console import is_quiet, note

LETTERS = {"--schedule": "-s", "--out": "-o", "--quiet": "-q", "--help": "-h"}
# Options with one text of help, word for word, in every command that has them.
ALIKE = (
    *("--json", "--quiet", "--device", "--dtype", "--revision", "--trust-remote-code", "--device-map"),
    *("--length", "--lowering", "--include", "--exclude", "--allow-other-model"),
)
ALSO = {"--task": ["--tasks"]}  # as lm-eval's own command calls it
METAVARS = {"--target": {"SHARE"}, "--seed": {"N"}, "--schedule": {"FILE"}, "--out": {"FILE", "DIR"}}
# What others call them; here they would be a second spelling.
OTHER_SPELLINGS = {
    "--output": "--out",
    "--outfile": "--out",
    "--save": "--out",
    "--sparsity": "--target",
    "--silent": "--quiet",
    "--random-seed": "--seed",
    "--torch-dtype": "--dtype",
    "--schedules": "--schedule",
    "--overwrite": "--force",
}


def commands(group: Any = None, path: str = "was") -> Iterator[tuple[str, Any]]:
    """Every command that runs, with its full name."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


COMMANDS = dict(commands())


def options(command: Any) -> dict[str, Any]:
    """A command's options by their long names."""
    every = [param for param in command.params if param.param_type_name == "option"]
    return {next(name for name in param.opts if name.startswith("--")): param for param in every}


def everywhere(name: str) -> dict[str, Any]:
    """The option of this name in each command that has it."""
    return {path: options(command)[name] for path, command in COMMANDS.items() if name in options(command)}


EVERY = sorted({name for command in COMMANDS.values() for name in options(command)})


def test_all_commands_are_walked():
    assert {"was ppl", "was published list", "was search"} <= set(COMMANDS)
    assert {*ALIKE, *METAVARS} <= set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_an_option_has_one_letter_and_one_kind(name):
    found = everywhere(name)
    letters = {path: sorted(set(param.opts) - {name}) for path, param in found.items()}
    expected = [LETTERS[name]] if name in LETTERS else ALSO.get(name, [])
    assert letters == dict.fromkeys(found, expected)
    assert len({bool(param.is_flag) for param in found.values()}) == 1, found
    if name in METAVARS:
        assert {path: param.metavar for path, param in found.items() if param.metavar not in METAVARS[name]} == {}


@pytest.mark.parametrize("name", ALIKE)
def test_an_option_means_the_same_everywhere(name):
    by_help = defaultdict(list)
    for path, param in everywhere(name).items():
        by_help[param.help].append(path)
    assert len(by_help) == 1, dict(by_help)


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_has_what_all_have_and_no_second_spelling(path):
    command = COMMANDS[path]
    names = options(command)
    assert {"--json", "--quiet"} <= set(names)
    if "--device" in names:
        assert {"--dtype", *(f"--{name.replace('_', '-')}" for name in LOADING)} <= set(names)
    assert {name: OTHER_SPELLINGS[name] for name in names if name in OTHER_SPELLINGS} == {}
    assert [name for name, param in names.items() if not param.help] == []
    assert command.help


def test_loading_options_reach_the_command_and_are_gone_after_it():
    seen = []

    def command(model: str, device: str = "auto") -> None:
        seen.append((model, loading().arguments(), is_quiet()))

    run = with_shared_options(command)
    run(model="m", device="auto", revision="v2", trust_remote_code=True, device_map="auto", quiet=True)
    run(model="n", device="cpu", revision=None, trust_remote_code=False, device_map=None, quiet=False)
    given = {"revision": "v2", "trust_remote_code": True, "device_map": "auto"}
    assert seen == [("m", given, True), ("n", {}, False)]
    assert loading().arguments() == {}
    with pytest.raises(typer.BadParameter, match="either --device or --device-map"):
        run(model="m", device="cpu", revision=None, trust_remote_code=False, device_map="auto", quiet=False)


def test_a_command_keeps_an_option_of_its_own():
    def command(quiet: bool = True, device: str = "auto") -> None:
        assert quiet == "its own"

    with_shared_options(command)(quiet="its own", revision=None, trust_remote_code=False, device_map=None)


def test_models_and_tokenizers_are_loaded_as_asked(was, other_model, text, monkeypatch):
    import transformers

    given = {}
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        real = getattr(transformers, name).from_pretrained

        def record(*arguments, name=name, real=real, **settings):
            given[name] = {key: settings[key] for key in settings if key in LOADING}
            return real(*arguments, **settings)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", record)
    asked = ("--revision", "main", "--trust-remote-code", "--device-map", "auto")
    outcome = was("ppl", other_model, "--text", text, "--length", 16, "--limit", 1, *asked)
    assert outcome.code == 0, outcome.stderr
    both = {"revision": "main", "trust_remote_code": True}
    assert given == {"AutoModelForCausalLM": {**both, "device_map": "auto"}, "AutoTokenizer": both}


def test_the_embedded_model_has_no_revision(was):
    assert "leave out --revision" in was("ppl", "embedded", "--revision", "x").error


def test_quiet_leaves_results_and_errors(was, schedule):
    outcome = was("ppl", "embedded", "--limit", 1, "--length", 16, "--schedule", schedule, "-q")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "perplexity" in outcome.stdout
    assert was("inspect", "nowhere.safetensors", "--quiet").error


def test_notes_come_back_after_a_quiet_command(was, schedule, capsys):
    was("inspect", schedule, "-q")
    note("here again")
    assert "here again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model": "m"}, "Start again"),
        ({"log": None, "resume": False}, "With --log FILE it could go on"),
        ({"record": None}, "With --record FILE"),
        ({"log": "a.jsonl", "resume": False}, "The same command, with --resume goes on: what was done is in a.jsonl"),
        ({"log": "a.jsonl", "resume": True}, "The same command goes on"),
        ({"log": "a.jsonl"}, "The same command goes on"),
    ],
)
def test_an_interrupt_says_how_to_go_on(given, expected):
    assert expected in how_to_go_on(given)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["calibrat"], "Did you mean 'calibrate'"),
        (["published", "lst"], "Did you mean 'list'"),
        (["ppl", "embedded", "--shedule", "x"], "(did you mean --schedule?)"),
        (["search", "embedded", "--target", "0.5", "--recipe", "fsher"], "(did you mean fisher?)"),
        (["ppl", "embedded", "--dtype", "fp31"], "(did you mean fp32?)"),
        (["make", "x", "--target", "50"], "did you mean 50%?"),
        (["published", "show", "was-lama-2-7b-60"], "(did you mean was-llama-2-7b-60?)"),
        (["ppl", "embedded", "--schedule", "was-lama-2-7b-60"], "(did you mean was-llama-2-7b-60?)"),
        (["ppl", "embeded"], "(did you mean embedded?)"),
    ],
)
def test_what_was_mistyped_gets_a_suggestion(was, arguments, expected):
    outcome = was(*arguments)
    assert outcome.code in (1, 2)
    assert expected in " ".join(outcome.stderr.replace("│", " ").split())


def test_what_is_like_nothing_gets_none(was):
    assert "did you mean" not in was("ppl", "embedded", "--zzzz").stderr.lower()


@pytest.mark.parametrize("command", ["check", "eval"])
def test_recorded_steps_are_refused_where_channels_are_counted(was, schedule, command):
    outcome = was(command, "embedded", "--schedule", schedule, "--lowering", "recorded")
    assert outcome.code == 2
    assert "can't count what they drop" in " ".join(outcome.stderr.replace("│", " ").split())


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("bench",), ("report", "--out", "x.html")])
def test_recorded_steps_are_refused_on_a_gpu_before_anything_is_loaded(was, schedule, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    given = () if command[0] == "bench" else ("--schedule", schedule)
    name, *rest = command
    outcome = was(name, "embedded", *given, *rest, "--lowering", "recorded", "--device", "cuda")
    assert outcome.code == 1
    assert outcome.error.startswith("Error: lowering 'recorded' is for a CPU, and the model is on cuda; leave it out")
    assert "Loading" not in outcome.stderr
