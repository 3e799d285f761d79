"""Fixed slots per expert: C = ceil(c T K / E); what finds no slot is dropped and counted.

Slots are given over the whole batch, first choices before second ones. So for K > 1 the second
choice of a token may be dropped because of a later token's first one: where an overflow happens a
language model is not strictly causal. "dropless" always is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emoe_jax.dispatch.base import Groups
from emoe_jax.dispatch.dropless import sort_by_expert
from emoe_jax.dispatch.rows import Layout, combine_rows, spread_rows
from emoe_jax.routers.base import ExpertChoice, Routing

Array = jax.Array


class Chosen(NamedTuple):
    """Plan of expert choice: `tokens` [E,C], and the `mask` [T], whose length is that of tokens."""

    tokens: Array
    mask: Array


def slots(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """C = ceil(c T K / E) slots of one expert, at most T."""
    # Rounded first: 1.1 * 100 / 10 is a little more than 11 in floating point.
    exact = round(factor * tokens * top_k / experts, 6)
    return min(tokens, max(1, math.ceil(exact)))


def dispatch(
    tokens: Array, routing: Routing | ExpertChoice, mask: Array, capacity_factor: float
) -> Groups:
    """Gives each assignment the next free slot of its expert; first choices go before second ones.

    Args:
        tokens: [T,D].
        routing: either form; expert choice brings its own C and drops nothing.
        mask: [T] bool, False for padding, which takes no slot.
        capacity_factor: c.

    Returns:
        Groups with rows [E,C,D]; empty slots are zero.
    """
    T, D = tokens.shape
    E = routing.probs.shape[-1]
    if isinstance(routing, ExpertChoice):
        return _take_chosen(tokens, routing, mask)
    K = routing.indices.shape[1]
    C = slots(T, K, E, capacity_factor)
    experts = jnp.where(mask[:, None], routing.indices, E)
    order, slot, sizes = _slots_in_order(experts, E, C)
    assignment = order % T * K + order // T
    layout = Layout(
        places=jnp.zeros((T * K,), jnp.int32).at[assignment].set(slot).reshape(T, K),
        assignments=jnp.full((E * C,), T * K, jnp.int32).at[slot].set(assignment, mode="drop"),
    )
    return Groups(
        spread_rows(tokens, layout).reshape(E, C, D),
        jnp.minimum(sizes, C),
        routing.weights,
        layout,
        jnp.sum(jnp.maximum(sizes - C, 0), dtype=jnp.float32),
    )


def _slots_in_order(experts: Array, E: int, C: int) -> tuple[Array, Array, Array]:
    """Gives slots to assignments, first choices first.

    Args:
        experts: [T,K] int32, E for nowhere.
        E: experts.
        C: slots of one expert.

    Returns:
        order [T·K], the assignments k-major, sorted by expert; slot [T·K] of each of these, E·C
        for none; assignments of each expert [E]. All int32.
    """
    flat = experts.T.reshape(-1)
    # Sorting the assignments k-major ranks every first choice before any second one.
    order, starts, sizes = sort_by_expert(flat, E)
    sorted_experts = flat[order]
    starts = jnp.append(starts, jnp.sum(sizes))
    rank = jnp.arange(flat.size, dtype=jnp.int32) - starts[sorted_experts]
    kept = (rank < C) & (sorted_experts < E)
    return order, jnp.where(kept, sorted_experts * C + rank, E * C), sizes


def keep_within(experts: Array, E: int, C: int) -> Array:
    """The assignments [T,K] int32 with E, nowhere, in place of those that find no slot."""
    T, K = experts.shape
    order, slot, _ = _slots_in_order(experts, E, C)
    kept = jnp.zeros((T * K,), bool).at[order].set(slot < E * C, unique_indices=True)
    return jnp.where(kept.reshape(K, T).T, experts, E)


def _take_chosen(tokens: Array, routing: ExpertChoice, mask: Array) -> Groups:
    """Expert choice: a token may stand in any number of groups, so its rows are plain gathers."""
    sizes = jnp.sum(mask[routing.tokens], axis=-1, dtype=jnp.int32)
    rows = tokens[routing.tokens]
    plan = Chosen(routing.tokens, mask)
    return Groups(rows, sizes, routing.weights, plan, jnp.zeros((), jnp.float32))


def combine(outputs: Array, groups: Groups) -> Array:
    """Weighs the outputs [E,C,D] by their gates and sums them by token to [T,D], in float32."""
    E, C, D = outputs.shape
    plan = groups.plan
    if isinstance(plan, Layout):
        rows = outputs.reshape(E * C, D)
        return combine_rows(rows, groups.gates, plan).astype(outputs.dtype)
    weighted = outputs.astype(jnp.float32) * groups.gates[..., None]
    total = jnp.zeros((plan.mask.shape[0], D), jnp.float32)
    total = total.at[plan.tokens.reshape(-1)].add(weighted.reshape(E * C, D))
    return total.astype(outputs.dtype)
