"""The documentation as a site: it builds without a warning, needs nothing from elsewhere, and says all there is."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import was_fx

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site; strict, so that a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        source = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]*"', source), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?https?:|@import", style.read_text(encoding="utf-8")), style


def test_the_reference_has_every_command_and_option(site, was):
    source = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    commands = re.findall(r"^│ ([a-z]+) ", was("--help").stdout, re.MULTILINE)
    assert len(commands) > 15
    for command in commands:
        assert f">was {command}<" in source
    assert "--allow-other-model" in source
    assert "[bold]" not in source


def test_the_reference_has_every_public_name_with_its_docstring(site):
    source = (site / "reference" / "python.html").read_text(encoding="utf-8")
    names = [name for name in was_fx.__all__ if not name.startswith("__")]
    assert [name for name in names if f'id="was_fx.{name}"' not in source] == []
    assert "Activations are counted into histograms" in source


def test_the_pictures_are_those_of_their_script_and_of_todays_tables():
    drawn = script("draw_pictures").PICTURES
    folder = ROOT / "docs" / "pictures"
    assert sorted(path.stem for path in folder.iterdir()) == sorted(drawn)
    for name, draw in drawn.items():
        assert (folder / f"{name}.svg").read_text(encoding="utf-8") == draw(), "run scripts/draw_pictures.py"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Text:\n- a\n- b\n", "Text:\n\n- a\n- b\n"),
        ("- a\n  goes on\n- b\n", "- a\n  goes on\n- b\n"),
        ("1. a\n2. b\n", "1. a\n2. b\n"),
        ("```\ntext\n- a\n```\n", "```\ntext\n- a\n```\n"),
        ("**a** is no list\n", "**a** is no list\n"),
    ],
)
def test_a_list_may_follow_a_paragraph_directly(source, expected):
    assert script("docs_site").blank_before_lists(source) == expected
