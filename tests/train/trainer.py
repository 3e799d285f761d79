"""A training step to try: the state and the batches of tiny experiments, compiled for a mesh."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax.sharding import Mesh
from ml_collections import config_dict

from emoe_jax import pure, sharding
from emoe_jax.optim import make_optimizer, partition
from tests.train.tiny import lm_tree, mesh_of_one
from train.config import ExperimentConfig, freeze
from train.run import model_maker
from train.step import make_steps

B, S, N = 8, 16, 258

EIGEN = {"router": "eigen", "basis": {"rank": 8}}
# Adam divides by the root of the second moment: a gradient that is zero but for rounding would
# move its weight by the full learning rate. A large eps makes steps as smooth as the gradients.
OPTIM = {"learning_rate": 1e-2, "warmup": 0, "eps": 1e-2, "clip": 1e6, "b1": 0.5}


@functools.cache
def fresh(config: ExperimentConfig) -> Any:
    """A new training state, on the host."""
    optimizer = make_optimizer(config.optim, config.steps, config.model.moe.basis.method)

    def init() -> Any:
        params, router = pure.initializer(model_maker(config.model, config.seed))()
        trained, _ = partition(params, config.optim.trainable)
        opt = serialization.to_state_dict(optimizer.init(trained))
        return {"step": jnp.zeros((), jnp.int32), "params": params, "router": router, "opt": opt}

    return jax.device_get(jax.jit(init)())


class Trainer:
    """An experiment's step, compiled for a mesh."""

    def __init__(self, tree: config_dict.ConfigDict, mesh: Mesh | None = None) -> None:
        config = freeze(tree)
        optimizer = make_optimizer(config.optim, config.steps, config.model.moe.basis.method)
        self.model, params, _ = pure.abstract_split(model_maker(config.model, config.seed))
        trained, _ = partition(params, config.optim.trainable)
        opt_state = jax.eval_shape(optimizer.init, trained)
        self.mesh = mesh_of_one(config.mesh) if mesh is None else mesh
        self.steps = make_steps(config, self.mesh, self.model, optimizer, opt_state)
        plain = dataclasses.replace(config, accumulate=1, mesh=sharding.MeshConfig())
        self.fresh = fresh(plain)
        self.places = sharding.shardings(self.mesh, self.fresh)
        self.train = jax.jit(
            self.steps.train,
            donate_argnums=0,
            out_shardings=(self.places, None),
        )

    def start(self) -> Any:
        """The state before the first step, where it lives."""
        return jax.device_put(self.fresh, self.places)

    def run(self, batches: Iterable[dict[str, np.ndarray]]) -> tuple[Any, list[Any]]:
        """State and metrics after a step on each batch, on the host."""
        state, history = self.start(), []
        where = sharding.batch_sharding(self.mesh)
        for batch in batches:
            state, metrics = self.train(state, jax.device_put(batch, where), jax.random.key(0))
            history.append(jax.device_get(metrics))
        return jax.device_get(state), history


def text_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Two documents a row and a few positions of padding."""
    draw = np.random.default_rng(seed)
    tokens, targets = draw.integers(0, N, (2, B, S)).astype(np.int32)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [7, 6, 3]), (B, S)).astype(np.int32)
    positions = np.broadcast_to(np.r_[0:7, 0:6, 0:3], (B, S)).astype(np.int32)
    rows = np.arange(B, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": targets,
        "segments": segments,
        "positions": positions,
        "rows": rows,
    }


def image_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Images and one label each."""
    draw = np.random.default_rng(seed)
    labels = np.eye(10, dtype=np.float32)[draw.integers(0, 10, B)]
    images = draw.normal(size=(B, 8, 8, 1)).astype(np.float32)
    return {"images": images, "labels": labels, "rows": np.arange(B, dtype=np.int32)}


def small_tree(moe: dict[str, Any], **changes: Any) -> config_dict.ConfigDict:
    """A language model of one block."""
    changes = {"optim": OPTIM, "data": {"sequence_length": S}} | changes
    changes["model"] = {"depth": 1, "loss_chunk": 64} | changes.get("model", {})
    return lm_tree(moe=moe, **changes)
