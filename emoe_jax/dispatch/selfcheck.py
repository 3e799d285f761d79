"""A trial of an exchange on the devices at hand, before anything is trusted to it.

Kernels of `ragged_all_to_all` have been reported to crash and to corrupt rows on GPU (openxla/xla
issue 47283), which no later number would show.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emoe_jax.config import MoEConfig
from emoe_jax.dispatch.exchange import exchange
from emoe_jax.sharding import BATCH_AXES, batch_shards, in_mesh, replicated, spec

Array = jax.Array

WIDTH = 128
"""D of the trial: a row is 512 bytes."""

TOLERANCE = 1e-5
"""Of the largest magnitude; the trial's products are float32."""


def check_exchange(
    config: MoEConfig, mesh: Mesh, compiler_options: dict[str, str | bool] | None = None
) -> None:
    """Compares an exchange with gathering all tokens: outputs and gradients of a small layer.

    Loads are uneven, and the room is small enough for a second round.

    Args:
        config: of the layer; its exchange, chunks, E and K are tried.
        mesh: the devices.
        compiler_options: those of the program that shall exchange so.

    Raises:
        RuntimeError: the results differ.
    """
    trial = dataclasses.replace(config, buffer_factor=0.75, on_overflow="exact")
    oracle = dataclasses.replace(config, exchange="all_gather")
    arguments = _arguments(config, mesh)
    results = [
        _run(trial, mesh, arguments, compiler_options),
        _run(oracle, mesh, arguments, None),
    ]
    # Compared where they lie: no process of several holds all of them.
    worst = float(jax.jit(_largest_gap, out_shardings=replicated(mesh))(*results))
    # Written so that NaN fails.
    if worst <= TOLERANCE:
        return
    raise RuntimeError(
        f"moe.exchange={config.exchange!r} gives wrong numbers on these devices"
        f" ({jax.devices()[0].device_kind}): a trial differs from gathering all tokens by"
        f" {worst:.2g} of the largest magnitude, where {TOLERANCE} is allowed; set moe.exchange to"
        " 'all_to_all'"
    )


def _arguments(config: MoEConfig, mesh: Mesh) -> tuple[Array, ...]:
    """Tokens, experts, gates, and one matrix an expert, on the mesh."""
    T, E, K = 16 * batch_shards(mesh) * config.exchange_chunks, config.experts, config.top_k
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    held = NamedSharding(mesh, spec((jax.tree_util.DictKey("w_down"),), 3))

    def draw() -> tuple[Array, ...]:
        keys = jax.random.split(jax.random.key(0), 4)
        # Squared: the first experts get most.
        scores = jnp.square(jax.random.uniform(keys[1], (T, E))) - jnp.arange(E) / E
        return (
            jax.random.normal(keys[0], (T, WIDTH)),
            jax.lax.top_k(scores, K)[1].astype(jnp.int32),
            jax.random.uniform(keys[2], (T, K)),
            jax.random.normal(keys[3], (E, WIDTH, WIDTH)) / WIDTH**0.5,
        )

    return jax.jit(draw, out_shardings=(rows, rows, rows, held))()


def _run(
    config: MoEConfig,
    mesh: Mesh,
    arguments: tuple[Array, ...],
    options: dict[str, str | bool] | None,
) -> Any:
    """Outputs, and gradients of tokens, gates and matrices."""

    def apply(weights: dict[str, Array], rows: Array, sizes: Array) -> Array:
        products = jnp.einsum("md,edf->emf", rows, weights["w_down"], precision="highest")
        ends = jnp.cumsum(sizes)
        expert = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")
        of = jax.nn.one_hot(expert, weights["w_down"].shape[0], axis=0)
        return jnp.einsum("emf,em->mf", products, of)

    def loss(tokens: Array, gates: Array, matrices: Array, experts: Array) -> Any:
        weights = {"w_down": matrices}
        mesh_here = mesh.abstract_mesh
        out = exchange(tokens, experts, gates, weights, apply, config, mesh_here).out
        return jnp.sum(jnp.square(out)), out

    tokens, experts, gates, matrices = arguments
    graded = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    program = jax.jit(in_mesh(mesh, graded), compiler_options=options)
    (_, out), gradients = program(tokens, gates, matrices, experts)
    return out, gradients


def _largest_gap(actual: Any, expected: Any) -> Array:
    def gap(a: Array, b: Array) -> Array:
        return jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(gap, actual, expected))))
