"""Every expert on every token: the oracle that all other dispatchers must equal, never fast."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from emoe_jax.dispatch.base import Groups
from emoe_jax.routers.base import ExpertChoice, Routing

Array = jax.Array


def dispatch(
    tokens: Array, routing: Routing | ExpertChoice, mask: Array, capacity_factor: float
) -> Groups:
    """Copies all tokens to each expert: rows [E,T,D] with weights [E,T], zero where not chosen.

    Args:
        tokens: [T,D].
        routing: either form.
        mask: [T] bool, False for padding; its gates are zero already.
        capacity_factor: not read.
    """
    T, D = tokens.shape
    E = routing.probs.shape[-1]
    rows = jnp.broadcast_to(tokens[None], (E, T, D))
    sizes = jnp.full((E,), T, jnp.int32)
    return Groups(rows, sizes, dense_weights(routing), None, jnp.zeros((), jnp.float32))


def dense_weights(routing: Routing | ExpertChoice) -> Array:
    """The gates as a matrix [E,T] float32."""
    T, E = routing.probs.shape
    if isinstance(routing, ExpertChoice):
        experts = jnp.arange(E, dtype=jnp.int32)[:, None]
        return jnp.zeros((E, T), jnp.float32).at[experts, routing.tokens].add(routing.weights)
    chosen = jax.nn.one_hot(routing.indices, E, dtype=jnp.float32)
    return jnp.einsum("tke,tk->et", chosen, routing.weights, precision="highest")


def combine(outputs: Array, groups: Groups) -> Array:
    """Σ_e weights[e,t] outputs[e,t] in float32: [E,T,D] to [T,D]."""
    total = jnp.einsum("etd,et->td", outputs.astype(jnp.float32), groups.gates, precision="highest")
    return total.astype(outputs.dtype)
