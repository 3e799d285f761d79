"""One compile that several files look at."""

import pathlib

import pytest


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of what the compiler told."""
    return tmp_path_factory.mktemp("kept")
