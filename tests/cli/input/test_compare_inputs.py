"""What `was compare` reads."""

import json
import math

import pytest

from was_fx import LinearSchedule, Schedule
from was_fx.cli.input.compare_inputs import read_results, read_trials


def row(schedule, nominal=0.5, perplexity=50.0):
    return {
        "schedule": schedule,
        "perplexity": perplexity,
        "nominal": nominal,
        "realised": 0.51,
        "bytes_saved": 0.4,
        "linears": {},
    }


def write(path, *rows, **setting):
    content = {"model": "m", "text": "t", "prefill": "sparse", "length": 512, **setting, "results": rows}
    path.write_text(json.dumps(content))
    return path


def schedule(sparsity=0.5):
    return Schedule({"h.0.q": LinearSchedule(sparsity, 1.0, 1.0)}, {"h.0.q": (4, 4)})


def test_several_files_add_up(tmp_path):
    first = write(tmp_path / "1.json", row(None, 0, 40.0), row("x/a.safetensors"))
    second = write(tmp_path / "2.json", row("b.safetensors", perplexity=60.0))
    found = read_results([first, second])
    assert found.dense.perplexity == 40.0
    assert found.of("a.safetensors", schedule()).perplexity == 50.0
    assert found.of("b.safetensors", schedule()).perplexity == 60.0
    assert found.of("c.safetensors", schedule()) is None
    assert read_results([]) is None


def test_a_file_name_that_two_folders_have_is_not_guessed(tmp_path):
    found = read_results([write(tmp_path / "1.json", row("x/a.safetensors"), row("y/a.safetensors", perplexity=7.0))])
    assert found.of("z/a.safetensors", schedule()) is None
    assert found.of("y/a.safetensors", schedule()).perplexity == 7.0


def test_a_schedule_that_changed_since_is_refused(tmp_path):
    found = read_results([write(tmp_path / "1.json", row("a.safetensors"))])
    with pytest.raises(ValueError, match=r"has a nominal sparsity of 0\.250000, but was measured with 0\.500000"):
        found.of("a.safetensors", schedule(0.25))


@pytest.mark.parametrize("change", [{"text": "other"}, {"prefill": "half"}, {"length": 64}, {"model": "n"}])
def test_results_of_different_settings_are_not_compared(tmp_path, change):
    files = [write(tmp_path / "1.json", row(None)), write(tmp_path / "2.json", row(None), **change)]
    with pytest.raises(ValueError, match=f"cannot be compared: the {next(iter(change))} is"):
        read_results(files)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": [1]}', '{"results": [{"schedule": null}]}', "\x00"])
def test_other_files_are_not_results(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match="is not what was ppl --json prints"):
        read_results([tmp_path / "x"])


def test_trials_are_read_around_notes_and_a_torn_end(tmp_path):
    path = tmp_path / "search.jsonl"
    lines = [
        {"recipe": "was", "target": 0.6},
        {"index": 0, "loss": 4.0, "seconds": 1.0},
        {"index": 1, "loss": None},
        {"index": 2, "loss": 3.5, "blocks": [0.5]},
        {"index": 3, "loss": 3.5},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n\n{"index": 4, "lo')
    found = read_trials(path)
    assert list(found.indices) == [0, 1, 2, 3]
    assert math.isnan(found.losses[1])
    assert found.best == (2, 3.5)
    assert found.target == 0.6


def test_losses_of_windows_are_averaged_and_trials_given_up_have_none(tmp_path):
    path = tmp_path / "search.jsonl"
    lines = [
        {"format": "was-fx search", "settings": {"target": 0.75}},
        {"trial": "curve 3", "losses": [9.0, 9.0, 9.0]},
        {"trial": "trial 1", "losses": [5.0]},
        {"trial": "trial 0", "losses": [3.0, 4.0]},
        {"trial": "trial 10", "losses": [3.0, 3.0]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_trials(path)
    assert (list(found.indices), found.best, found.target) == ([0, 1, 10], (10, 3.0), 0.75)
    assert found.losses[0] == 3.5
    assert math.isnan(found.losses[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no trial with a loss"),
        ('{"index": 0}\n', "holds no trial with a loss"),
        ('{"index": 0, "loss": NaN}\n', "holds no trial with a loss"),
        ('{"index": 0, "lo\n{"index": 1, "loss": 2.0}\n', "line 1: expected one JSON object per trial"),
        ('[1]\n{"index": 1, "loss": 2.0}\n', "line 1: expected one JSON object per trial"),
    ],
)
def test_other_files_are_no_trials(tmp_path, text, message):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trials(tmp_path / "x")
