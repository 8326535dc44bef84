"""The code in README and docs/ runs.

Every `python` block is run, each page in a namespace and a folder of its own; a block that can't be has
`<!-- not run: why -->` above it. On the pages that teach, nothing is there but what the page itself made, and the `was`
commands of `sh` blocks are run too, in order with the rest. Elsewhere a page speaks of "model", "tokens" and the like,
which stand for the embedded model and its texts. Names of big models are folders with the embedded one.
"""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from was_fx import embedded
from was_fx.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEACHING = ("quickstart.md", "how-it-works.md", "choosing-a-level.md", "file-format.md", "report.md")
# `was demo` takes two minutes; its own tests run it.
ELSEWHERE = ("was demo",)
_BLOCK = re.compile(r"(?P<note><!-- not run: .+ -->\n)?^ *```(?P<kind>python|sh)\n(?P<code>.*?)^ *```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    line: int
    code: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are to run."""
    source = page.read_text(encoding="utf-8")
    return [
        Block(found["kind"], source[: found.start("code")].count("\n") + 1, textwrap.dedent(found["code"]))
        for found in _BLOCK.finditer(source)
        if not found["note"]
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory: a text, and the embedded model under the names of others."""
    for name in ("meta-llama/Llama-3.2-1B", "DIR"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(embedded.path(), target_is_directory=True)
    (tmp_path / "text.txt").write_text(embedded.text("calibration"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words() -> dict[str, Any]:
    """What the names on pages that don't teach stand for."""
    import copy

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import was_fx

    model, tokenizer = embedded.load(torch.float32)
    tokens = embedded.tokens("calibration", length=128, limit=4)
    calibration = was_fx.calibrate(model, tokens)
    schedule = was_fx.uniform(calibration, 0.5)
    schedule.save("s.was.safetensors")
    return {
        "was_fx": was_fx,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "AutoTokenizer": AutoTokenizer,
        "model": model,
        "dense": copy.deepcopy(model),
        "tokenizer": tokenizer,
        "tokens": tokens,
        "ids": tokens,
        "valid": embedded.tokens("validation", length=128, limit=2),
        "calibration": calibration,
        "schedule": schedule,
        "inputs": tokenizer("It was a cold evening, and", return_tensors="pt"),
        "folder": "folder",
    }


def run_commands(block: Block) -> None:
    """Run a block's `was` commands, as a shell would."""
    lines = [line.partition("  #")[0] for line in block.code.splitlines() if line.startswith("was ")]
    for line in lines:
        if line not in ELSEWHERE:
            result = CliRunner().invoke(app, shlex.split(line)[1:])
            assert result.exit_code == 0, f"{line}\n{result.stderr}"
            assert result.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, folder):
    teaching = page.name in TEACHING
    found = [block for block in blocks(page) if block.kind == "python" or teaching]
    names: dict[str, Any] = {} if teaching or not found else words()
    for block in found:
        if block.kind == "sh":
            run_commands(block)
        else:
            # Lines of tracebacks are those of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


def test_pages_that_teach_hold_code():
    for name in TEACHING:
        assert blocks(ROOT / "docs" / name)


def test_a_block_that_fails_is_noticed_and_a_marked_one_passed_over(tmp_path):
    page = tmp_path / "page.md"
    marked = "<!-- not run: wants a GPU -->\n```python\n2 / 0\n```\n"
    page.write_text(f"```python\n1 / 0\n```\n{marked}- a\n\n    ```sh\n    was x\n    ```\n")
    found = blocks(page)
    assert [(block.kind, block.code) for block in found] == [("python", "1 / 0\n"), ("sh", "was x\n")]
    with pytest.raises(ZeroDivisionError):
        exec(found[0].code, {})
    with pytest.raises(AssertionError, match="No such command"):
        run_commands(found[1])
