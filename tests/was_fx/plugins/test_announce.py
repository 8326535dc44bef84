"""Registration with libraries that have no entry points."""

import importlib
import sys
from types import ModuleType

import pytest

from was_fx.plugins import announce as plug_ins


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library with a registry, and a plug-in that registers itself there."""
    (tmp_path / "some_library.py").write_text("names = ['its own']\n")
    (tmp_path / "some_plug_in.py").write_text("import some_library\nsome_library.names.append('was')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(plug_ins, "PLUG_INS", {"some_library": "some_plug_in"})
    yield
    for name in ("some_library", "some_plug_in"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("imported", ["before", "after"])
def test_a_library_gets_its_plug_in_once(library, imported):
    if imported == "before":
        importlib.import_module("some_library")
    plug_ins.announce()
    assert ("some_plug_in" in sys.modules) == (imported == "before")
    found: ModuleType = importlib.import_module("some_library")
    assert found.names == ["its own", "was"]


def test_a_library_that_is_missing_stays_missing(library, monkeypatch):
    monkeypatch.setattr(plug_ins, "PLUG_INS", {"no_such_library": "some_plug_in"})
    plug_ins.announce()
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        importlib.import_module("no_such_library")
    assert "some_plug_in" not in sys.modules


def test_a_library_of_another_version_is_imported_all_the_same(library, tmp_path):
    (tmp_path / "some_plug_in.py").write_text("from some_library import what_it_has_not\n")
    plug_ins.announce()
    with pytest.warns(UserWarning, match="could not register with this version of some_library"):
        found: ModuleType = importlib.import_module("some_library")
    assert found.names == ["its own"]
