"""One finished run that several files look at."""

import pathlib
from typing import NamedTuple

import pytest

from emoe_jax import sharding
from tests.train.tiny import lm_tree, mesh_of_one, write_corpus
from train.evaluate import Rows, Scalars
from train.loop import train


class Finished(NamedTuple):
    """A run that was trained to its end without a stop."""

    workdir: pathlib.Path
    source: str
    scalars: Scalars
    rows: Rows


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the program run on one of the devices; the mesh has tests of its own."""
    monkeypatch.setattr(sharding, "make_mesh", mesh_of_one)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A tiny language model, 24 steps, checkpoints every 8, evaluations every 12."""
    folder = tmp_path_factory.mktemp("finished")
    source = write_corpus(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", mesh_of_one)
        scalars, rows = train(lm_tree(source), folder / "run")
    return Finished(folder / "run", source, scalars, rows)
