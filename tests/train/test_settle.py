"""Running state of routers in training: what it begins with, and that resuming keeps it."""

import shutil

import chex
import jax
import numpy as np
import pytest

from emoe_jax import sharding
from tests.train.tiny import lm_tree, mesh_of_one, write_corpus
from train import cluster, settle
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


def begun(folder, **changes):
    run = build(freeze(lm_tree(write_corpus(folder / "corpus"), **changes)), folder)
    size = run.config.batch
    batches = run.data.train_iterator(size, seed=0, rows=run.rows(size))
    with cluster.Compiler() as compiler:
        forward = settle.begin_forward(run, next(batches), compiler, resumed=False)()
    batches.close()
    return run, forward, run.init()


def calibrated(folder, **changes):
    run, forward, before = begun(folder, **changes)
    kept = jax.device_get(before["router"])
    return kept, jax.device_get(settle.calibrate(run, forward, before)["router"])


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
    with pytest.raises(ValueError, match="settle=-2 is below -1"):
        freeze(lm_tree(settle=-2))


def test_settling_follows_the_steps_up_to_three_hundred():
    steps = {9: 0, 10: 1, 400: 40, 5000: 300}
    assert {n: freeze(lm_tree(steps=n)).settling for n in steps} == steps
    assert freeze(lm_tree(steps=9, settle=7)).settling == 7


def test_settling_moves_the_routers_state_and_nothing_else(tmp_path, one_device):
    run, forward, state = begun(tmp_path, moe=WHITENED, calibrate=0, settle=3)
    kept = jax.device_get(state)
    progress = []

    def spied(*given):
        progress.append(float(given[-1]))
        return forward(*given)

    after = jax.device_get(settle.settle(run, spied, state))
    # One more than the number of batches since the last step.
    assert progress == [2.0, 3.0, 4.0]
    router = router_of(after)
    assert router["updates"].tolist() == [3.0, 3.0]
    assert router["offset"].any()
    unmoved = {name: leaf for name, leaf in after.items() if name != "router"}
    chex.assert_trees_all_equal(unmoved, {name: kept[name] for name in unmoved})


def test_settling_ends_early_when_the_run_is_asked_to_end(tmp_path, one_device, monkeypatch):
    run, forward, state = begun(tmp_path, moe=WHITENED, calibrate=0, settle=3)
    asked = iter([False, False, True])
    monkeypatch.setattr(settle.notice, "requested", lambda: next(asked))
    router = router_of(jax.device_get(settle.settle(run, forward, state)))
    assert router["updates"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "resumed"),
    [
        pytest.param({"moe": {"router": "loss_free"}}, False, id="no statistics"),
        pytest.param({"moe": WHITENED, "settle": 0}, True, id="calibrated already"),
        pytest.param({"moe": WHITENED, "settle": 0, "calibrate": 0}, False, id="neither"),
    ],
)
def test_nothing_is_compiled_for_nothing(tmp_path, one_device, changes, resumed):
    run = build(freeze(lm_tree(write_corpus(tmp_path / "corpus"), **changes)), tmp_path)
    with cluster.Compiler() as compiler:
        assert settle.begin_forward(run, {}, compiler, resumed=resumed)() is None


def test_the_last_checkpoint_holds_the_settled_state(tmp_path, one_device):
    source = write_corpus(tmp_path / "corpus")
    offsets = []
    for count in (0, 2):
        workdir = tmp_path / str(count)
        tree = lm_tree(source, moe=WHITENED, steps=2, eval_every=2, settle=count)
        for _ in range(2):  # a run that is done does not settle again
            train(tree, workdir)
        _, state, _ = load_trained(workdir, {})
        offsets.append(router_of(state))
    assert offsets[1]["updates"][0] == offsets[0]["updates"][0] + 2
    assert not np.array_equal(offsets[0]["offset"], offsets[1]["offset"])


def test_a_resumed_run_has_the_same_state(tmp_path, one_device):
    source = write_corpus(tmp_path / "corpus")
    tree = lm_tree(source, moe=WHITENED, steps=4, eval_every=4, settle=1, checkpoint={"every": 2})
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
    # Calibrated once, not again by the resumed run: ten batches, four steps, one to settle.
    assert router_of(ended[1][2])["updates"].tolist() == [15.0, 15.0]
