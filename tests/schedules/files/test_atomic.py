"""A file is written whole or not at all."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from was_fx.schedules.files.atomic import write_atomically

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("data", [b"\0\xff", "‖W‖ and\nmore"])
def test_bytes_and_text_are_written_as_they_are(tmp_path, data):
    write_atomically(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == (data.encode() if isinstance(data, str) else data)


@pytest.mark.parametrize(("module", "step"), [(shutil, "copymode"), (os, "replace")])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, module, step, error):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(*_):
        raise error

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(type(error)) as caught:
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert caught.value.errno == 28
        assert "No space left" in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    script = (
        "import os, signal, sys; from was_fx.schedules.files.atomic import write_atomically;"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); write_atomically(sys.argv[1], b'after')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize(
    ("place", "error"),
    [("missing/file", FileNotFoundError), ("a file/file", NotADirectoryError)],
)
def test_unusable_directories_are_refused_with_path_and_remedy(tmp_path, place, error):
    (tmp_path / "a file").write_text("no directory")
    with pytest.raises(error, match=r"cannot write the file.*choose an existing directory") as caught:
        write_atomically(tmp_path / place, b"data")
    assert place in str(caught.value)


def test_a_new_file_has_the_permissions_of_the_umask_and_a_replaced_one_keeps_its_own(tmp_path):
    path = tmp_path / "file"
    before = os.umask(0o022)
    try:
        write_atomically(path, b"data")
        assert path.stat().st_mode & 0o777 == 0o644
        path.chmod(0o640)
        write_atomically(path, b"data")
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_the_longest_name_and_a_symbolic_link_can_be_written(tmp_path):
    long, link = tmp_path / ("n" * 255), tmp_path / "link"
    link.symlink_to(long)
    write_atomically(link, b"data")
    assert link.is_symlink()
    assert long.read_bytes() == b"data"
