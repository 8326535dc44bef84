"""`was serve`, by OpenAI's own client."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import was_fx
from was_fx import embedded
from was_fx.compat.serving import missing_for_server

missing = missing_for_server()
served = pytest.mark.skipif(bool(missing), reason=f'needs pip install "was-fx[serve]": {missing}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory, schedule):
    """The embedded model as it is saved when sparsified, with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("saved") / "sparse"
    model, tokenizer = embedded.load(torch.float32)
    was_fx.sparsify(model, schedule).save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def greedy(model, tokenizer, text: str, tokens: int) -> str:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@contextmanager
def running(*command: object) -> Iterator[tuple[Any, Any]]:
    """A server's process and a client of it; it is interrupted at the end."""
    import openai

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    arguments = [sys.executable, *map(str, command), "--port", str(port), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    url = f"http://localhost:{port}/v1"
    with (
        subprocess.Popen(arguments, env=environment, **pipes) as process,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        try:
            end = time.monotonic() + 100
            while not _listens(port):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end
                time.sleep(0.2)
            yield process, client
        finally:
            process.kill()


def _listens(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=10) as response:
            return response.status == 200
    except OSError:
        return False


def ended(process: Any) -> tuple[str, str]:
    """Press Ctrl-C; what was on stdout and stderr."""
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    return stdout, stderr


@served
def test_a_sparse_model_answers_whole_and_streamed(schedule):
    with running("-m", "was_fx.cli.main", "serve", "embedded", "--schedule", schedule) as (process, client):
        assert [each.id for each in client.models.list().data] == ["embedded"]
        asked = {"model": "embedded", "max_tokens": 12, "temperature": 0}
        messages = [{"role": "user", "content": "It was a dark and"}]
        whole = client.chat.completions.create(messages=messages, **asked)
        streamed = client.chat.completions.create(messages=messages, stream=True, **asked)
        parts = [choice.delta.content or "" for chunk in streamed for choice in chunk.choices]
        plain = client.completions.create(prompt="It was a dark and", **asked)
        stdout, stderr = ended(process)
    model, tokenizer = embedded.load(torch.float32)
    dense = greedy(model, tokenizer, "It was a dark and", 12)
    sparse = greedy(was_fx.sparsify(model, schedule), tokenizer, "It was a dark and", 12)
    text = whole.choices[0].message.content
    assert text == "".join(parts) == plain.choices[0].text == sparse != dense
    assert len([part for part in parts if part]) > 5
    assert whole.usage.completion_tokens == 12
    assert "embedded has no chat template" in stderr
    assert stderr.count(" realised sparsity · sparse, fp32") == 3
    assert stdout == ""


@served
def test_a_saved_model_needs_no_schedule_and_json_tells_each_answer(folder):
    with running("-m", "was_fx.cli.main", "serve", folder, "--json", "--quiet") as (process, client):
        messages = [{"role": "user", "content": "It was"}]
        asked = {"model": str(folder), "messages": messages, "temperature": 0}
        client.chat.completions.create(max_tokens=8, **asked)
        # A client that goes away ends its answer.
        with client.chat.completions.create(max_tokens=1000, stream=True, **asked) as stream:
            next(iter(stream))
        client.chat.completions.create(max_tokens=8, **asked)
        stdout, stderr = ended(process)
    first, broken, last = [json.loads(line) for line in stdout.splitlines()]
    assert first["tokens"] == last["tokens"] == 8
    assert first["prompt_tokens"] > 0
    assert first["realised_sparsity"] == last["realised_sparsity"] > 0.3
    assert (first["variant"], first["stopped"]) == ("sparse, fp32", False)
    assert broken["stopped"]
    assert broken["tokens"] < 1000
    assert stderr == ""


@served
def test_transformers_own_command_serves_a_saved_model_once_was_fx_is_imported(folder, schedule):
    """As docs/chat-and-serve.md has it."""
    start = "import was_fx; from transformers.cli.transformers import main; main()"
    with running("-c", start, "serve", folder) as (_, client):
        messages = [{"role": "user", "content": "It was a dark and"}]
        asked = {"model": str(folder), "max_tokens": 12, "temperature": 0}
        text = client.chat.completions.create(messages=messages, **asked).choices[0].message.content
    model, _ = embedded.load(torch.float32)
    was_fx.sparsify(model, schedule)
    assert text == greedy(model, AutoTokenizer.from_pretrained(folder), "It was a dark and", 12)


@served
def test_a_port_in_use_is_refused_before_the_model_is_loaded(was):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        outcome = was("serve", "embedded", "--host", "localhost", "--port", taken.getsockname()[1])
    assert outcome.code == 1
    assert "can't be listened on" in outcome.error
    assert "Loading" not in outcome.stderr


def test_without_its_packages_it_says_what_to_install(was, monkeypatch):
    from was_fx.compat import serving

    monkeypatch.setattr(serving, "missing_for_server", lambda: "FastAPI is missing")
    outcome = was("serve", "embedded")
    assert outcome.code == 1
    assert 'pip install "was-fx[serve]" (FastAPI is missing)' in outcome.error
    assert "Loading" not in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--weights", "int3"], 2, "the format of weights is 'int3'"),
        (["--schedule", "none"], 1, "there is no was-fx schedule here"),
        (["--port", "0"], 2, "--port"),
    ],
)
def test_refusals(was, arguments, code, message):
    outcome = was("serve", "embedded", *arguments)
    assert outcome.code == code
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
