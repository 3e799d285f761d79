"""Benchmark `adapter`: the paper's branch, and a training step of its recipe, on this device.

`branch` is one adapter of configs/vit_b16_emoe_adapter.py (D=768, E=8, R=128, F=192, top-1) on the
196 patches of each image: forward as in evaluation, and forward with the gradients of weights and
tokens as in training, the basis retracted in the pass as the release does. `vit` is the recipe's
whole model (ViT-B/16, six adapters, frozen backbone): the forward pass, and a training step with
its AdamW update.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, serialization

from configs.vit_b16_emoe_adapter import get_config
from emoe_jax import pure
from emoe_jax.config import ViTConfig
from emoe_jax.models import EMoEViT
from emoe_jax.moe import MoE
from emoe_jax.optim import make_optimizer, partition
from emoe_jax.sharding import make_mesh
from train.config import ExperimentConfig, freeze
from train.step import make_steps
from train.timing import Row, Step, interleave, milliseconds

Array = jax.Array


def adapter(images: int, repeats: int, models: list[str], dtype: str) -> list[Row]:
    """Times the branch and the whole model.

    Args:
        images: B, images in a batch.
        repeats: timed rounds.
        models: "branch" and "vit", or one of them.
        dtype: compute dtype, "float32" or "bfloat16".

    Returns:
        One row for each: milliseconds (median, least, most) and images per second of the forward
        pass (`forward_`) and of a training step (`step_`).
    """
    experiment = recipe()
    model = dataclasses.replace(experiment.model, dtype=dtype)
    experiment = dataclasses.replace(experiment, model=model, batch=images)
    makers = {"branch": branch_programs, "vit": vit_programs}
    rows = []
    for name in models:
        programs = makers[name](experiment, images)
        times = interleave(programs, dict.fromkeys(programs, repeats))
        row: Row = {"model": name, "dtype": dtype, "images": images, "rounds": repeats}
        for part, seconds in times.items():
            row |= milliseconds(part, seconds)
            row[f"{part}_images_per_s"] = images / (row[f"{part}_ms"] / 1e3)
        rows.append(row)
    return rows


def recipe() -> ExperimentConfig:
    """The experiment whose parts are timed."""
    return freeze(get_config())


def branch_programs(experiment: ExperimentConfig, images: int) -> dict[str, Step]:
    """The branch h + α MoE(h) alone, compiled."""
    config = experiment.model
    assert isinstance(config, ViTConfig)
    patches = (config.image_size // config.patch) ** 2
    tokens = jax.random.normal(jax.random.key(0), (images, patches, config.width), jnp.float32)
    layer = MoE(config.moe, config.width, dtype=config.dtype, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(layer)
    arguments = {"weights": weights, "alpha": jnp.ones(()), "tokens": tokens}

    def branch(arguments: dict[str, Any], train: bool) -> tuple[Array, Array]:
        layer = nnx.merge(graph, arguments["weights"])
        out, aux = layer(arguments["tokens"], train=train)
        return arguments["tokens"] + arguments["alpha"] * out, aux.loss

    def loss(arguments: dict[str, Any]) -> Array:
        out, penalty = branch(arguments, True)
        return jnp.sum(jnp.square(out)) + penalty

    return {
        "forward": _compiled(lambda given: branch(given, False)[0], arguments),
        "step": _compiled(jax.value_and_grad(loss), arguments),
    }


def vit_programs(experiment: ExperimentConfig, images: int) -> dict[str, Step]:
    """The whole model and its training step, compiled; the state is not donated."""
    config = experiment.model
    assert isinstance(config, ViTConfig)
    optimizer = make_optimizer(experiment.optim, experiment.steps, config.moe.basis.method)
    model, _, _ = pure.abstract_split(lambda: EMoEViT(config, rngs=nnx.Rngs(0)))
    params, router = jax.jit(pure.initializer(lambda: EMoEViT(config, rngs=nnx.Rngs(0))))()
    trained, _ = partition(params, experiment.optim.trainable)
    opt = optimizer.init(trained)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "router": router}
    state["opt"] = serialization.to_state_dict(opt)
    size = config.image_size
    batch = {
        "images": jax.random.normal(jax.random.key(0), (images, size, size, config.channels)),
        "labels": jax.nn.one_hot(jnp.arange(images) % config.classes, config.classes),
        "rows": jnp.arange(images, dtype=jnp.int32),
    }
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    opt_state = jax.eval_shape(optimizer.init, trained)
    steps = make_steps(experiment, mesh, model, optimizer, opt_state)

    def forward(state: dict[str, Any], batch: dict[str, Array]) -> Array:
        logits: Array = model.bind(state["params"], state["router"])(batch["images"])[0]
        return logits

    return {
        "forward": _compiled(forward, state, batch),
        "step": _compiled(steps.train, state, batch, jax.random.key(0)),
    }


def _compiled(function: Step, *arguments: Any) -> Step:
    return partial(jax.jit(function).lower(*arguments).compile(), *arguments)
