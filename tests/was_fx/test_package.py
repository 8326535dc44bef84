"""What installs, and what importing costs."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from was_fx.kernels.cpu import library

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for each in ("was_fx", "passes", "kernels", "schedules", "cli"):  # a build leaves files where it runs
        shutil.copytree(ROOT / each, tree / each, ignore=shutil.ignore_patterns("__pycache__"))
    for each in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / each, tree)
    command = [sys.executable, "-m", "pip", "wheel", str(tree), "--no-deps", "--no-build-isolation", "-q", "-w", folder]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("was_fx-*.whl")))


def test_the_wheel_installs_one_import_package_with_its_five_parts(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"was_fx"}
    for part in (
        "passes/pipeline.py",
        "kernels/linear/sparse_linear.py",
        "kernels/cpu/kernels.cpp",
        "kernels/cpu/body.inc",
        "kernels/parts/tuned/nvidia_h200.json",
        "schedules/files/schedule.py",
        "cli/main.py",
        "py.typed",
    ):
        assert f"was_fx/{part}" in names


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_wheel_holds_the_compiled_kernels(wheel, tmp_path, monkeypatch):
    (name,) = [name for name in wheel.namelist() if name.startswith("was_fx/kernels/cpu/") and name.endswith(".so")]
    found = library._load(Path(wheel.extract(name, tmp_path)), library.source_hash())
    assert found is not None
    assert found.was_processor() == library.library().was_processor()


def test_the_wheel_holds_every_python_file_of_the_checkout(wheel):
    folders = {"was_fx": "was_fx", **{each: f"was_fx/{each}" for each in ("passes", "kernels", "schedules", "cli")}}
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in folders.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert expected <= set(wheel.namelist())


def test_the_wheel_holds_the_embedded_model(wheel):
    names = wheel.namelist()
    for file in ("model.safetensors", "config.json", "tokenizer.json", "test.txt", "README.md"):
        assert f"was_fx/embedded/{file}" in names


def test_the_wheel_holds_the_published_schedules(wheel):
    expected = {f"was_fx/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "schedules/released/data").iterdir()}
    assert len(expected) == 15
    assert expected <= set(wheel.namelist())


def test_the_wheel_holds_the_task(wheel):
    assert "was_fx/plugins/tasks/minimal_pairs.jsonl" in wheel.namelist()


def test_the_wheel_declares_the_command_and_the_backend(wheel):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(entry_points).decode()
    assert "was = was_fx.cli.main:main" in text
    assert "[torch_dynamo_backends]\nwas = was_fx.compile.backend:was" in text


IMPORT = """
import json, sys, time
import torch
start = time.perf_counter()
import was_fx
seconds = time.perf_counter() - start
heavy = [m for m in ("transformers", "triton", "nevergrad", "torch._dynamo", "torch._inductor") if m in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy, "cuda": torch.cuda.is_initialized()}))
"""


def test_import_is_light():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=ROOT)
    result = json.loads(run.stdout)
    assert result["seconds"] < 0.3
    assert result["heavy"] == []
    assert not result["cuda"]


def test_every_public_name_resolves():
    import was_fx

    for name in was_fx.__all__:
        assert getattr(was_fx, name) is not None
    assert callable(was_fx.sparsify)


def test_an_unknown_name_is_an_attribute_error():
    import was_fx

    with pytest.raises(AttributeError, match="sparsifi"):
        was_fx.sparsifi  # noqa: B018


TRANSFORMERS_FROM_CHECKOUT = "import transformers, was_fx; from transformers import LlamaForCausalLM; print('ok')"


def test_transformers_imports_from_the_root_of_the_checkout():
    """A package named `kernels` there would be taken for Hugging Face's."""
    run = subprocess.run([sys.executable, "-c", TRANSFORMERS_FROM_CHECKOUT], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "ok", run.stderr
