"""The training step of a configuration, traced and compiled from shapes alone.

The same model, rules and step as in training (`train.run.make_program`, `train.step`): no array, no
data and no tokenizer, since the shapes of a batch follow from the configuration.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from emoe_jax import sharding
from emoe_jax.attention import choose_attention
from emoe_jax.config import LMConfig
from train.config import ExperimentConfig, with_vocab
from train.data.config import BYTE_VOCABULARY, TextConfig
from train.planning.memory import length_of
from train.planning.topology import Topology, mesh_on
from train.run import Program, make_program

Tree = Any


def planned(config: ExperimentConfig, platform: str, devices: int) -> ExperimentConfig:
    """The configuration as it would be on another platform.

    Kernels that "auto" chooses by the platform at hand are named, and the vocabulary is that of
    the tokenizer that training would have.
    """
    model, data = config.model, config.data
    if model.attention == "auto":
        dim = model.head_dim or model.width // model.heads
        shape = (1, length_of(config), model.heads, dim)
        kernel = choose_attention(shape, jnp.dtype(model.dtype), platform, devices)
        config = dataclasses.replace(config, model=dataclasses.replace(model, attention=kernel))
    if isinstance(data, TextConfig) and data.tokenizer == "bytes":
        config = with_vocab(config, BYTE_VOCABULARY)
    return config


def abstract_batch(config: ExperimentConfig, mesh: Mesh) -> Tree:
    """A global batch as the pipelines of `train.data` give it.

    Raises:
        ValueError: the mesh does not divide the batch.
    """
    sharding.check_batch(mesh, config.batch, config.accumulate)
    where, B = sharding.batch_sharding(mesh), config.batch
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"rows": ((B,), jnp.int32)}
    if isinstance(config.model, LMConfig):
        assert isinstance(config.data, TextConfig)
        names = ("tokens", "targets", "segments", "positions")
        shapes |= dict.fromkeys(names, ((B, config.data.sequence_length), jnp.int32))
    else:
        size = config.model.image_size
        shapes["images"] = ((B, size, size, config.model.channels), jnp.float32)
        shapes["labels"] = ((B, config.model.classes), jnp.float32)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for name, (shape, dtype) in shapes.items()
    }


def trace_step(config: ExperimentConfig, program: Program, mesh: Mesh) -> Any:
    """The traced training step; state donated and placed as `train.loop` does it."""
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract)
    step = jax.jit(
        program.steps.train, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh))
    )
    key = jax.eval_shape(lambda: jax.random.key(config.seed))
    return step.trace(program.abstract, abstract_batch(config, mesh), key)


def step_on(config: ExperimentConfig, topology: Topology) -> Any:
    """The step of a configuration that `planned` gave, traced for a topology's devices.

    Raises:
        ValueError: the mesh does not divide the model or the batch, or there is no compiler.
    """
    mesh = mesh_on(topology, config.mesh)
    return trace_step(config, make_program(config, mesh), mesh)
