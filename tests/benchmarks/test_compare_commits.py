"""`benchmarks/compare_commits.py`: what it makes of the answers, and what it refuses."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_commits.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_commits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Pretended:
    """A worker that takes the same time whenever it is asked."""

    asked: list

    def __init__(self, name, asked, ms):
        self.name, self.asked, self.ms = name, asked, ms

    def ask(self, question):
        self.asked.append((self.name, question["target"]))

    def answer(self):
        return {"step_ms": self.ms, "token_ms": 2 * self.ms, "call_ms": 50 * self.ms, "tokens": "abc"}


def test_sides_take_turns_and_ratios_are_medians(script):
    asked: list = []
    workers = {side: Pretended(side, asked, ms) for side, ms in (("other", 4.0), ("this", 3.0))}
    found = script.in_turns(workers, [0.5], 2)
    assert [name for name, _ in asked] == ["this", "other", "other", "this"]
    row = script.summary("tiny", 0.5, found[0.5])
    assert row["step_ms"]["ratio"] == row["token_ms"]["ratio"] == 0.75
    assert (row["step_ms"]["lowest"], row["step_ms"]["highest"]) == (0.75, 0.75)
    assert row["same_tokens"]
    assert row["repeatable"] == {"other": True, "this": True}
    assert len(script.table([row], "").rows) == len(script.MEASURES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"weights": 2.0}, "different models"), ({"thresholds": 2.0}, "different models"), ({"was_fx": "a"}, "both")],
    ids=str,
)
def test_other_models_or_the_same_code_are_refused(script, changes, message):
    first = {"weights": 1.0, "thresholds": 1.0, "was_fx": "a"}
    with pytest.raises(SystemExit, match=message):
        script.check_same({"other": first, "this": first | {"was_fx": "b"} | changes})
