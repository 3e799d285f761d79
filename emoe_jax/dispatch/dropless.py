"""Tokens sorted by expert, for a grouped matrix product: nothing dropped, nothing padded."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emoe_jax.dispatch.base import Groups
from emoe_jax.dispatch.rows import Layout, combine_rows, spread_rows
from emoe_jax.remat import decided
from emoe_jax.routers.base import ExpertChoice, Routing

Array = jax.Array


def sort_by_expert(experts: Array, count: int) -> tuple[Array, Array, Array]:
    """Stable order of assignments by expert.

    Args:
        experts: [A] int32, the expert of each assignment; `count` for none, which sorts last.
        count: E.

    Returns:
        order [A] int32, so that experts[order] ascends; start [E] and size [E] of each expert's
        part of it, int32.
    """
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    # Inside `shard_map` JAX types the order as the same on all devices; what is added is not.
    order = decided(order + (experts - experts))
    chosen = experts[:, None] == jnp.arange(count, dtype=experts.dtype)[None, :]
    sizes = jnp.sum(chosen, axis=0, dtype=jnp.int32)
    return order, jnp.cumsum(sizes, dtype=jnp.int32) - sizes, sizes


NO_CHOICES = (
    "dispatch 'dropless' sorts the choices of tokens, and the expert_choice router makes none: its"
    " experts take a fixed number of tokens; set dispatch to 'capacity'"
)


class Grouping(NamedTuple):
    """Assignments [T,K] sorted by expert, in T·K rows; those that go nowhere come last.

    Attributes:
        layout: the row of each assignment.
        sizes: [E] int32, rows of each expert.
    """

    layout: Layout
    sizes: Array


def group_by_expert(experts: Array, count: int) -> Grouping:
    """Sorts assignments by expert.

    Args:
        experts: [T,K] int32; `count` for nowhere.
        count: E.
    """
    order, _, sizes = sort_by_expert(experts.reshape(-1), count)
    places = jnp.where(experts < count, ranks(order).reshape(experts.shape), order.size)
    held = jnp.arange(order.size, dtype=jnp.int32) < jnp.sum(sizes)
    return Grouping(Layout(places, jnp.where(held, order, order.size)), sizes)


def ranks(order: Array) -> Array:
    """[A] int32, where each assignment stands in `order` [A]: the inverse permutation."""
    steps = jnp.arange(order.size, dtype=jnp.int32)
    return jnp.zeros_like(order).at[order].set(steps, unique_indices=True)


def dispatch(
    tokens: Array, routing: Routing | ExpertChoice, mask: Array, capacity_factor: float
) -> Groups:
    """Sorts the T·K assignments by expert.

    Args:
        tokens: [T,D].
        routing: token choice.
        mask: [T] bool, False for padding, whose rows come last, outside every group.
        capacity_factor: not read.

    Returns:
        Groups with rows [T·K,D].

    Raises:
        ValueError: the routing is expert choice, whose groups have a fixed size.
    """
    if isinstance(routing, ExpertChoice):
        raise ValueError(NO_CHOICES)
    E = routing.probs.shape[-1]
    layout, sizes = group_by_expert(jnp.where(mask[:, None], routing.indices, E), E)
    none = jnp.zeros((), jnp.float32)
    return Groups(spread_rows(tokens, layout), sizes, routing.weights, layout, none)


def combine(outputs: Array, groups: Groups) -> Array:
    """Weighs the outputs [T·K,D] by their gates and sums each token's K to [T,D], in float32."""
    return combine_rows(outputs, groups.gates, groups.plan).astype(outputs.dtype)
