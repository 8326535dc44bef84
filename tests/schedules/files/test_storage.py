import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files import storage

ROOT = Path(__file__).parents[3]
TENSORS = {"b": torch.tensor(1.5), "a": torch.arange(3.0)}
METADATA = {f"key {number}": f"value {number}" for number in range(20)}


def test_round_trip(tmp_path):
    path = tmp_path / "file.safetensors"
    storage.write(path, storage.SCHEDULE, TENSORS, METADATA)
    tensors, metadata = storage.read(path, storage.SCHEDULE)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_other_programs_can_read_it(tmp_path):
    storage.write(tmp_path / "file.safetensors", storage.SCHEDULE, TENSORS, METADATA)
    assert load_file(tmp_path / "file.safetensors")["a"].tolist() == [0, 1, 2]


def test_bytes_depend_on_content_only():
    expected = storage.encode(TENSORS, METADATA)
    shuffled = storage.encode(dict(reversed(TENSORS.items())), dict(reversed(METADATA.items())))
    script = (
        "import torch; from was_fx.schedules.files.storage import encode;"
        "print(encode({'a': torch.arange(3.0), 'b': torch.tensor(1.5)},"
        "{f'key {number}': f'value {number}' for number in range(20)}).hex())"
    )
    other_process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    assert shuffled == expected
    assert bytes.fromhex(other_process.stdout.decode()) == expected


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
    path = tmp_path / "file.safetensors"
    for length in range(700):
        data = storage.encode(TENSORS, {"format": storage.SCHEDULE, "format_version": "1", "x": "y" * length})
        if data.startswith(b"\x80\x02"):
            break
    path.write_bytes(data)
    assert storage.read(path, storage.SCHEDULE)[1]["x"] == "y" * length


def whole_file() -> bytes:
    return storage.encode(TENSORS, {"format": storage.SCHEDULE, "format_version": "1"})


def tagged(**tags: str) -> bytes:
    return storage.encode(TENSORS, tags)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (whole_file()[:-3], "is not a safetensors file, or only a part of one"),
        (whole_file()[:20], "only a part of one"),
        (b"", "only a part of one"),
        (b"{}", "only a part of one"),
        (pickle.dumps({"a": 1}), "is a pickle or zip archive"),
        (b"PK\x03\x04" + bytes(100), "is a pickle or zip archive"),
        (tagged(), "names the format None"),
        (tagged(format="pt"), "names the format 'pt'"),
        (tagged(format=storage.CALIBRATION, format_version="1"), "Load it with Calibration.load"),
        (tagged(format=storage.SCHEDULE, format_version="2"), "format version 2, newer than the 1"),
        (tagged(format=storage.SCHEDULE, format_version="x"), "format version 'x', expected a whole number"),
        (tagged(format=storage.SCHEDULE), "format version '', expected a whole number"),
    ],
)
def test_unreadable_files_are_refused_with_their_path(tmp_path, data, message):
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    with pytest.raises(ScheduleError, match=message) as caught:
        storage.read(path, storage.SCHEDULE)
    assert str(path) in str(caught.value)


def test_file_without_metadata_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors")
    with pytest.raises(ScheduleError, match="is not a was-fx schedule"):
        storage.read(tmp_path / "weights.safetensors", storage.SCHEDULE)


def test_a_folder_says_what_is_in_it(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder; give the path of a was-fx schedule\b(?!,)"):
        storage.read(tmp_path, storage.SCHEDULE)
    (tmp_path / "schedule.was.safetensors").touch()
    with pytest.raises(IsADirectoryError, match=r"such as schedule\.was\.safetensors in it"):
        storage.read(tmp_path, storage.SCHEDULE)


def test_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no was-fx schedule here.*absent"):
        storage.read(tmp_path / "absent", storage.SCHEDULE)
