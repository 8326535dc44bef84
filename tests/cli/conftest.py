"""Shared by the tests of the command line: a way to call it, and files that it reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from was_fx.cli.main import app


@dataclass(frozen=True)
class Outcome:
    """What a call of `was` left."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """stderr from its one error on."""
        assert self.stderr.count("Error: ") == 1, self.stderr
        return self.stderr[self.stderr.index("Error: ") :]


def call(*arguments: object, piped: str | None = None) -> Outcome:
    """Run `was` in this process, as from a shell with 80 columns and no terminal; `piped` is its stdin."""
    runner = CliRunner(env={"COLUMNS": "80", "WAS_DEBUG": None})
    result = runner.invoke(app, [str(each) for each in arguments], input=piped)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="session")
def was():
    """The function that runs `was`."""
    return call


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the embedded model, made by `was calibrate`."""
    path = tmp_path_factory.mktemp("made") / "calibration.safetensors"
    outcome = call("calibrate", "embedded", "--tokens", 1024, "--length", 256, "--out", path)
    assert outcome.code == 0, outcome.stderr
    return path


@pytest.fixture(scope="session")
def schedule(calibration: Path) -> Path:
    """A schedule of the embedded model at 50 %, made by `was make`."""
    path = calibration.with_name("s50.was.safetensors")
    outcome = call("make", calibration, "--target", "50%", "--out", path)
    assert outcome.code == 0, outcome.stderr
    return path


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a smaller model of random weights and the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from was_fx import embedded

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of about 700 tokens."""
    path = tmp_path / "text.txt"
    path.write_text("It was a dark and stormy night, and the rain fell in torrents.\n" * 50, encoding="utf-8")
    return path
