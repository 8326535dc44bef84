"""`was generate`."""

import pytest

PROMPT = ("--prompt", "It was a dark night", "--max-new-tokens", 6)


def test_text_goes_to_stdout_and_its_speed_to_stderr(was):
    outcome = was("generate", "embedded", *PROMPT)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.startswith("It was a dark night")
    assert len(outcome.stdout) > len("It was a dark night") + 5
    assert "6 tokens" in outcome.stderr


def test_json_holds_the_sparse_text_and_the_dense_one_beside_it(was, schedule):
    outcome = was("generate", "embedded", "--schedule", schedule, *PROMPT, "--dense-too", "--json")
    assert outcome.code == 0, outcome.stderr
    found = outcome.json
    assert found["schedule"] == str(schedule)
    assert found["tokens"] == found["dense"]["tokens"] == 6
    assert found["ms_per_token"] > 0
    assert found["text"]
    assert found["dense"]["text"]


def test_dense_and_sparse_text_have_headings(was, schedule):
    outcome = was("generate", "embedded", "--schedule", schedule, *PROMPT, "--dense-too")
    assert outcome.stdout.index("dense ─") < outcome.stdout.index("sparse, 50 % nominal")


def test_the_seed_decides_the_sample(was):
    arguments = ("generate", "embedded", *PROMPT, "--sample", "--json", "--seed")
    first, again, other = (was(*arguments, seed).json["text"] for seed in (1, 1, 2))
    assert first == again != other


def test_recorded_steps_give_a_text_and_are_recorded(was, schedule, monkeypatch):
    from was_fx.generate.recorded_step import RecordedStep

    made, init = [], RecordedStep.__init__
    monkeypatch.setattr(RecordedStep, "__init__", lambda self, *a, **k: (init(self, *a, **k), made.append(self))[0])
    plain = was("generate", "embedded", "--schedule", schedule, *PROMPT, "--json").json
    assert made == []
    recorded = was("generate", "embedded", "--schedule", schedule, *PROMPT, "--lowering", "recorded", "--json").json
    assert [step.declined for step in made] == [""]
    assert recorded["text"] == plain["text"]


@pytest.mark.filterwarnings("ignore:the schedule was made with weights not quantised")
@pytest.mark.parametrize("weights", [(), ("--draft-weights", "int8")], ids=str)
def test_a_draft_gives_the_dense_text(was, schedule, weights):
    outcome = was("generate", "embedded", "--schedule", schedule, *PROMPT, "--draft", *weights, "--dense-too", "--json")
    assert outcome.code == 0, outcome.stderr
    found = outcome.json
    assert found["text"] == found["dense"]["text"]
    assert 0 <= found["accepted_share"] <= 1
    assert "accepted_share" not in found["dense"]
    outcome = was("generate", "embedded", "--schedule", schedule, *PROMPT, "--draft", "--guesses", 2, *weights)
    assert found["text"] in outcome.stdout
    assert "% of the guesses kept" in " ".join(outcome.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embedded", "--prompt", "x", "--draft"], 2, "give the schedule of the draft"),
        (["embedded", "--prompt", "x", "--draft-weights", "int4"], 2, "is for --draft"),
        (["embedded", "--prompt", "x", "--lowering", "recorded"], 2, "give a schedule too"),
        (["embedded"], 2, "--prompt"),
        (["embedded", "--prompt", ""], 2, "the prompt is empty"),
        (["embedded", "--prompt", "x", "--max-new-tokens", "5000"], 1, "more than the 1024"),
        (["embedded", "--prompt", "x", "--schedule", "none"], 1, "there is no was-fx schedule here"),
        (["embedded", "--prompt", "x", "--sample", "--temperature", "0"], 2, "--temperature"),
        (["nowhere", "--prompt", "x"], 1, "no model directory 'nowhere'"),
    ],
)
def test_refusals(was, arguments, code, message):
    outcome = was("generate", *arguments)
    assert outcome.code == code, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""
