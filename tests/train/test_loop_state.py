"""Running state of routers in training: what it begins with, and that resuming keeps it."""

import shutil

import chex
import jax
import pytest

from emoe_jax import sharding
from tests.train.tiny import lm_tree, mesh_of_one, write_corpus
from train import loop
from train.config import freeze
from train.logs import read_metrics
from train.loop import train
from train.run import build, load_trained

WHITENED = {"router": "whitened", "basis": {"rank": 8}}


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", mesh_of_one)


def router_of(state):
    return state["router"]["blocks"]["groups"]["0"]["moe"]["router"]


def calibrated(folder, **changes):
    run = build(freeze(lm_tree(write_corpus(folder / "corpus"), **changes)), folder)
    before = run.init()
    kept = jax.device_get(before["router"])
    return kept, jax.device_get(loop._calibrate(run, before)["router"])


def test_calibration_fills_the_state(tmp_path, one_device):
    before, after = calibrated(tmp_path, moe=WHITENED, calibrate=3, accumulate=2)
    assert router_of({"router": before})["updates"].tolist() == [0.0, 0.0]
    router = router_of({"router": after})
    assert router["updates"].tolist() == [3.0, 3.0]
    assert router["mean"].any()
    assert router["offset"].any()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"moe": {"router": "loss_free"}}, id="a router without statistics"),
        pytest.param({"moe": WHITENED, "calibrate": 0}, id="no batches"),
    ],
)
def test_otherwise_it_stays(tmp_path, one_device, changes):
    before, after = calibrated(tmp_path, **changes)
    chex.assert_trees_all_equal(before, after)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="calibrate=-1 is below zero"):
        freeze(lm_tree(calibrate=-1))


def test_a_resumed_run_has_the_same_state(tmp_path, one_device):
    source = write_corpus(tmp_path / "corpus")
    tree = lm_tree(source, moe=WHITENED, steps=4, eval_every=4, checkpoint={"every": 2})
    ended = []
    for name in ("whole", "resumed"):
        workdir = tmp_path / name
        if name == "resumed":
            shutil.copytree(tmp_path / "whole", workdir)
            shutil.rmtree(workdir / "checkpoints" / "4")
        train(tree, workdir)
        _, state, step = load_trained(workdir, {})
        losses = [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]
        ended.append((step, losses, jax.device_get(state)))
    chex.assert_trees_all_equal(*ended)
    # Calibrated once, not again by the resumed run: ten batches and four steps.
    assert router_of(ended[1][2])["updates"].tolist() == [14.0, 14.0]
