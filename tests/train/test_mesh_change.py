"""A run that was saved with its experts on eight devices goes on on one, two, four and eight."""

import pathlib
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from emoe_jax import sharding
from emoe_jax.checkpoint import Checkpoints
from tests.train.trainer import Trainer, small_tree, text_batch

BEFORE, AFTER = 2, 20
"""Steps before the checkpoint and after it."""

MOE = {"router": "whitened", "experts": 8, "dispatch": "dropless", "basis": {"rank": 8}}

CHANGES: dict[int, dict[str, Any]] = {
    8: {},
    4: {"moe": {"exchange": "all_gather"}, "accumulate": 2},
    2: {"moe": {"exchange": "all_to_all", "buffer_factor": 3.0}},
    1: {"moe": {"dispatch": "dense"}},
}
"""By the number of devices that the experts are spread over: what else differs from the start."""


def trainer(devices: int, **changes: Any) -> Trainer:
    """The experiment, with its experts spread over so many devices."""
    shape = tuple(devices if axis == "expert" else 1 for axis in sharding.AXES)
    mesh = Mesh(
        np.array(jax.devices()[:devices]).reshape(shape),
        sharding.AXES,
        axis_types=(AxisType.Auto,) * len(shape),
    )
    tree = small_tree(MOE | changes.pop("moe", {}), **changes)
    return Trainer(tree, mesh)


def steps(trainer: Trainer, state: Any, first: int, count: int) -> tuple[Any, list[float]]:
    """Takes steps on the batches of their numbers; the losses."""
    where, losses = sharding.batch_sharding(trainer.mesh), []
    for number in range(first, first + count):
        batch = jax.device_put(text_batch(number), where)
        state, metrics = trainer.train(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return state, losses


class Saved(NamedTuple):
    """Eight devices' state at step BEFORE, where it was saved, and what came after it."""

    folder: pathlib.Path
    state: Any
    after: Any
    losses: list[float]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("mesh")
    eight = trainer(8)
    state, _ = steps(eight, eight.start(), 0, BEFORE)
    before = jax.device_get(state)
    w_up = state["params"]["blocks"]["groups"]["0"]["moe"]["experts"]["w_up"]
    assert len({str(shard.index) for shard in w_up.addressable_shards}) == 8
    with Checkpoints(folder, every=1) as checkpoints:
        checkpoints.save(BEFORE, state, data_state={}, meta={})
    after, losses = steps(eight, state, BEFORE, AFTER)
    return Saved(folder, before, jax.device_get(after), losses)


@pytest.mark.parametrize("devices", CHANGES)
def test_what_eight_devices_saved_goes_on_on_others(saved, devices):
    here = trainer(devices, **CHANGES[devices])
    wanted = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        here.fresh,
        here.places,
    )
    with Checkpoints(saved.folder, every=1, read_only=True) as checkpoints:
        step, restored, damaged = checkpoints.restore_newest(wanted)
    assert (step, damaged) == (BEFORE, {})
    state = restored.train_state
    chex.assert_trees_all_equal(state, saved.state)
    assert {"params", "opt", "router", "step"} == state.keys()
    assert jax.tree.leaves(state["router"])
    w_up = state["params"]["blocks"]["groups"]["0"]["moe"]["experts"]["w_up"]
    assert len({str(shard.index) for shard in w_up.addressable_shards}) == devices
    after, losses = steps(here, state, BEFORE, AFTER)
    if devices == 8:
        assert losses == saved.losses
        chex.assert_trees_all_equal(after, saved.after)
    np.testing.assert_allclose(losses, saved.losses, rtol=1e-4)
    chex.assert_trees_all_close(after["params"], saved.after["params"], rtol=0, atol=1e-4)
    chex.assert_trees_all_close(after["router"], saved.after["router"], rtol=1e-3, atol=1e-3)
