"""Shared by the tests of the documentation."""

import pytest
from typer.testing import CliRunner

from was_fx.cli.main import app


@pytest.fixture(scope="session")
def was():
    """The function that runs `was` in this process."""

    def call(*arguments: str):
        return CliRunner(env={"COLUMNS": "80"}).invoke(app, list(arguments))

    return call
