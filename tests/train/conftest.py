"""What several files look at: a finished run, and studies that train nothing."""

import json
import math
import pathlib
from typing import NamedTuple

import pytest

from emoe_jax import sharding
from tests.train.tiny import lm_tree, mesh_of_one, write_corpus
from train import loop, outcome, study
from train.config import to_json
from train.evaluate import Rows, Scalars
from train.logs import RunLog, read_metrics


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
        scalars, rows = loop.train(lm_tree(source), folder / "run")
    return Finished(folder / "run", source, scalars, rows)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Puts results that follow from the configuration in the place of training; lists the runs."""
    runs: list[tuple[str, int]] = []

    def train(tree, workdir):
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(to_json(tree))
        runs.append((tree.moe.router, tree.seed))
        print("a table of the run")
        weight = tree.moe.routing.balance_weight or 0.01
        # Least at 0.01; the difference between the routers is 0.5 in every seed.
        loss = 2 + tree.seed % 10 + (tree.moe.router == "eigen") / 2 + abs(math.log(weight / 0.01))
        with RunLog(workdir, total_steps=2, unit="tokens") as log:
            log.write(1, {"router/layer_00/max_vio": loss})
            log.write(2, {"router/layer_00/max_vio": 0.0})
        return {"eval/loss": loss}, []

    def measure(workdir, variant, tree, scalars, rows, seconds):
        metrics = {"loss": scalars["eval/loss"], "max_vio": 0.1, "batch_max_vio_floor": 0.05}
        return {
            "variant": variant.name,
            "router": variant.router,
            "options": dict(variant.options),
            "seed": tree.seed,
            "made_by": {"device": "1 x cpu", "commit": None},
            "config": json.loads(to_json(tree)),
            "initial_weights": f"of seed {tree.seed}",
            "metrics": metrics | {"seconds": seconds},
            "load": {"layer_00": [0.25, 0.75]},
            "batch_max_vio": outcome.curve(outcome.violations(read_metrics(workdir)), 2),
        }

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(outcome, "measure", measure)
    return runs
