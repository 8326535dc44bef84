"""`was chat`."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

import was_fx
from tests.cli.terminal import Terminal
from was_fx import embedded

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SHORT = ("--max-new-tokens", 12)
pty = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, schedule):
    """The embedded model as it is saved when sparsified, with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("saved") / "sparse"
    model, tokenizer = embedded.load(torch.float32)
    was_fx.sparsify(model, schedule).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def answers(outcome):
    assert outcome.code == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def test_a_second_turn_is_answered_as_the_whole_chat_would_be(was, saved, schedule):
    first, second = answers(was("chat", saved, "--system", "Be kind.", *SHORT, "--json", piped="Who?\nWhen?\n"))
    model, _ = embedded.load(torch.float32)
    was_fx.sparsify(model, schedule)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    turns = [{"role": "system", "content": "Be kind."}]
    for question, answer in (("Who?", first["answer"]), ("When?", second["answer"])):
        turns.append({"role": "user", "content": question})
        text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant:"
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == answer
        turns.append({"role": "assistant", "content": answer})
    assert [each["question"] for each in (first, second)] == ["Who?", "When?"]
    assert first["variant"] == "sparse, fp32"
    assert first["tokens"] == 12
    assert first["tokens_per_second"] > 0
    assert 0.3 < first["realised_sparsity"] < 0.7


def test_switches_answer_the_same_question_again_and_lose_nothing(was, schedule):
    lines = "It was a dark\n/dense\n/int8\n/int4\n/full\n/sparse\nThen\n"
    outcome = was("chat", "embedded", "--schedule", schedule, *SHORT, "--json", piped=lines)
    found = answers(outcome)
    assert [each["variant"] for each in found] == [
        "sparse, fp32",
        "dense, fp32",
        "dense, int8",
        "dense, int4",
        "dense, fp32",
        "sparse, fp32",
        "sparse, fp32",
    ]
    assert {each["question"] for each in found[:-1]} == {"It was a dark"}
    texts = [each["answer"] for each in found]
    assert texts[1] == texts[4]  # bf16's own weights are still there
    assert texts[0] == texts[5]
    assert [each["realised_sparsity"] is None for each in found] == [False, True, True, True, True, False, False]
    # Each format is loaded once, and what it takes is said.
    assert outcome.stderr.count("Loading embedded") == 3
    assert "In memory: fp32 23 MB, int8 6 MB, int4" in outcome.stderr
    assert answers(was("chat", "embedded", *SHORT, "--json", piped="It was a dark\n"))[0]["answer"] == texts[1]


def test_compare_shows_the_dense_answer_and_goes_on_from_the_own_one(was, schedule):
    arguments = ("chat", "embedded", "--schedule", schedule, *SHORT)
    outcome = was(*arguments, piped="It was a dark\n/compare\n")
    assert outcome.code == 0, outcome.stderr
    _, _, rest = outcome.stdout.partition("dense, fp32 ─")
    assert "sparse, fp32 ─" in rest
    found = answers(was(*arguments, "--json", piped="It was a dark\n/compare\nThen\n"))
    assert [each["variant"].split(",")[0] for each in found] == ["sparse", "dense", "sparse", "sparse"]
    assert found[0]["answer"] == found[2]["answer"]
    alone = answers(was(*arguments, "--json", piped="It was a dark\nThen\n"))
    assert found[3]["answer"] == alone[1]["answer"]


def test_the_seed_decides_what_is_drawn(was):
    arguments = ("chat", "embedded", *SHORT, "--json", "--temperature", 0.9, "--top-p", 0.95, "--seed")
    drawn = [answers(was(*arguments, seed, piped="It was\n/again\n")) for seed in (1, 1, 2)]
    texts = [[each["answer"] for each in found] for found in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] == texts[0][1]


def test_what_is_piped_is_answered_calmly(was, saved):
    outcome = was("chat", "embedded", *SHORT, piped="\nIt was\n//home\n/new\n/help\n/quit\nnever\n")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count("embedded has no chat template") == 1
    assert outcome.stderr.count("12 tokens · ") == 2
    assert "realised" not in outcome.stderr
    assert "/compare  " in outcome.stderr
    assert "\x1b" not in outcome.stdout + outcome.stderr
    assert "no chat template" not in was("chat", saved, *SHORT, piped="Who?\n").stderr
    assert was("chat", saved, *SHORT, "--quiet", piped="Who?\n").stderr == ""


def test_an_answer_ends_where_the_model_can_take_no_more(was, other_model):
    (found,) = answers(was("chat", other_model, "--json", piped="word " * 60 + "\n"))
    assert 0 < found["tokens"] < 128 - 60


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/sparse\n", "there is no schedule to be sparse by"),
        ("/denze\n", "there is no /denze (did you mean /dense?)"),
        ("/compare\n", "there is nothing to compare with"),
        ("word " * 1100 + "\n", "takes 1024 with the answer"),
    ],
)
def test_refusals_end_what_is_piped(was, lines, message):
    outcome = was("chat", "embedded", *SHORT, piped=lines)
    assert outcome.code == 1
    assert message in outcome.error
    assert outcome.stdout == ""


def test_weights_are_refused_before_the_model_is_loaded(was):
    outcome = was("chat", "embedded", "--weights", "int3", piped="")
    assert outcome.code == 2
    assert "Loading" not in outcome.stderr


@pty
def test_at_a_terminal_ctrl_c_ends_an_answer_and_then_the_chat(schedule):
    with Terminal(["-m", "was_fx.cli.main", "chat", "embedded", "--schedule", schedule]) as terminal:
        terminal.until("/help lists")
        terminal.until("> ")
        terminal.type("It was a dark and\n")
        terminal.until("dark and\r\n")
        terminal.until(" ")
        terminal.type("\x03")
        assert ", stopped · " in terminal.until("sparse, fp32")
        terminal.until("> ")
        terminal.type("/nothing\n")
        terminal.until("there is no /nothing")
        terminal.until("> ")
        terminal.interrupt_input()
        terminal.until("Ctrl-C once more leaves")
        terminal.until("> ")
        terminal.interrupt_input()
        assert terminal.ended() == 0


@pty
def test_ctrl_d_leaves():
    with Terminal(["-m", "was_fx.cli.main", "chat", "embedded", "--max-new-tokens", 4]) as terminal:
        terminal.until("> ")
        terminal.type("It was\n")
        terminal.until("4 tokens")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert "Traceback" not in terminal.shown


@pty
def test_an_interrupt_ends_what_is_piped():
    command = [sys.executable, "-m", "was_fx.cli.main", "chat", "embedded", "--max-new-tokens", "900"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            process.stdin.write("It was\nThen\n")
            process.stdin.flush()
            assert process.stdout.read(2)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Interrupted." in stderr
    assert "Traceback" not in stderr
