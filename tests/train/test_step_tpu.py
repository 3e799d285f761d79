"""The training step compiles for TPU slices that nobody holds, with every exchange."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from emoe_jax import sharding
from tests.train.trainer import Trainer, small_tree, text_batch
from train.config import freeze

pytestmark = pytest.mark.soak

ROWS = 32


@pytest.mark.parametrize("exchange", ["all_to_all", "ragged_all_to_all", "all_gather"])
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("v5p:2x2x2", {"fsdp": 2, "expert": 4}),
        ("v5p:2x2x2", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("v6e:4x4", {"data": 2, "fsdp": 2, "expert": 4}),
    ],
)
def test_the_step_compiles_for_tpu(topology, mesh, exchange, monkeypatch):
    # Without it libtpu asks the network which machine this is.
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    moe = {"router": "loss_free", "experts": 8, "top_k": 2, "hidden": 256, "dispatch": "dropless"}
    model = {"depth": 2, "width": 256, "heads": 4, "remat": "full", "dtype": "bfloat16"}
    tree = small_tree(
        moe | {"exchange": exchange}, mesh=mesh, batch=ROWS, accumulate=2, model=model
    )
    trainer = Trainer(tree, sharding.make_mesh(freeze(tree).mesh, devices))
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        trainer.fresh,
        trainer.places,
    )
    where = sharding.batch_sharding(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, *leaf.shape[1:]), leaf.dtype, sharding=where)
        for name, leaf in text_batch().items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = trainer.train.lower(state, batch, key).compile()
    # Parameters and optimizer state lie in parts: 3 float32 numbers for each parameter.
    whole = sum(np.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(trainer.fresh["params"])) * 3
    assert compiled.memory_analysis().argument_size_in_bytes < 0.75 * whole
