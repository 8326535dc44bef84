import math

import pytest

import was_fx
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.metadata import MetadataReader
from was_fx.schedules.files.schedule_metadata import ScheduleMetadata

FULL = ScheduleMetadata(
    recipe="was",
    target=0.6,
    seed=3,
    search={"trials": 64, "bounds": (0.1, 0.9)},
    history={"best loss": 2.25},
    source={"method": "WAS", "level": 0.6},
    excluded=("lm_head",),
    calibration_text="«text», 1 MB",
    calibration_tokens=4096,
    fingerprint={"architecture": "Llama"},
    weights={"lm_head": "int8"},
)


@pytest.mark.parametrize("metadata", [FULL, ScheduleMetadata()], ids=["full", "default"])
def test_strings_and_back(metadata):
    strings = metadata.to_strings()
    assert all(isinstance(value, str) for value in strings.values())
    reader = MetadataReader(strings)
    assert ScheduleMetadata.read(reader) == metadata
    reader.finish()
    assert reader.problems == []


def test_names_the_version_that_made_it():
    assert ScheduleMetadata().tool_version == was_fx.__version__


@pytest.mark.parametrize("field", ["search", "history", "source", "fingerprint"])
def test_values_that_a_file_cannot_hold_are_refused(field):
    with pytest.raises(ScheduleError, match=f"'{field}' cannot be written"):
        ScheduleMetadata(**{field: {"loss": math.nan}})


def test_files_from_before_there_was_a_source_are_read():
    strings = ScheduleMetadata(recipe="was").to_strings()
    del strings["source"]
    reader = MetadataReader(strings)
    assert ScheduleMetadata.read(reader) == ScheduleMetadata(recipe="was")
    assert reader.problems == []


@pytest.mark.parametrize("text", ['["int8"]', '{"lm_head": 8}', "int8"])
def test_formats_that_are_none_are_a_problem(text):
    reader = MetadataReader(ScheduleMetadata().to_strings() | {"weights": text})
    assert ScheduleMetadata.read(reader).weights is None
    assert any("'weights'" in each for each in reader.problems)
