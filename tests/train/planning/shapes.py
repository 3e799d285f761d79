"""Configurations that the tests of plans share."""

import dataclasses

from emoe_jax.sharding import MeshConfig
from tests.train.tiny import lm_tree
from train.config import freeze

D, F, E, K, L, S, N = 64, 32, 8, 2, 2, 32, 258


def small(mesh=None, **changes):
    """A language model of two blocks of 8 experts."""
    model = {"width": D, "depth": L, "heads": 4, "kv_heads": 2, "tie_head": False}
    tree = lm_tree(
        model=model | changes.pop("model", {}),
        moe={"router": "loss_free", "experts": E, "top_k": K, "hidden": F, "dispatch": "dropless"}
        | changes.pop("moe", {}),
        data={"sequence_length": S},
        **({"batch": 16} | changes),
    )
    config = freeze(tree)
    return dataclasses.replace(config, mesh=MeshConfig(**(mesh or {})))
