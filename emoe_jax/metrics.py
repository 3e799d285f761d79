"""Routing metrics, computed from summed statistics. Definitions of one layer over a set of tokens.

load_k is the share of the assignments that expert k gets, over all that were asked for, dropped
ones included. All functions take leading axes (stacked layers).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

DEAD_SHARE = 0.01
"""An expert is dead over a set of tokens if its load is below this share of 1/E."""


def load_shares(load: Array) -> Array:
    """Shares [...,E] of counts [...,E]; zero where nothing was counted."""
    return load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)


def max_violation(load: Array) -> Array:
    """MaxVio = E · max_k load_k - 1 (arXiv 2408.15664): 0 at balance, E - 1 with one expert.

    0 where nothing was counted.
    """
    return jnp.maximum(load.shape[-1] * jnp.max(load_shares(load), axis=-1) - 1.0, 0.0)


def coefficient_of_variation(load: Array) -> Array:
    """std_k(load) / mean_k(load)."""
    share = load_shares(load)
    return jnp.std(share, axis=-1) / jnp.maximum(jnp.mean(share, axis=-1), 1e-9)


def normalized_entropy(load: Array) -> Array:
    """-Σ load_k ln load_k / ln E: 1 at balance, 0 with one expert (and for E = 1)."""
    share = load_shares(load)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    return jnp.abs(entropy) / jnp.log(jnp.float32(max(load.shape[-1], 2)))


def dead_experts(load: Array) -> Array:
    """Number of experts with load_k < 0.01 / E."""
    E = load.shape[-1]
    return jnp.sum(load_shares(load) < DEAD_SHARE / E, axis=-1, dtype=jnp.float32)


def energy_captured(stats: dict[str, Array]) -> Array:
    """tr(QᵀΣQ) / tr Σ, the share of the tokens' variance that lies in the basis.

    Args:
        stats: `tokens` [...] (or `counted`, where some were left out), `token_sum` [...,D],
            `token_square` [...], `z_sum` [...,R] and `z_square` [...], sums over tokens h and
            projections z = Qᵀh.
    """
    n = jnp.maximum(stats.get("counted", stats["tokens"]), 1.0)

    def variance(total: Array, square: Array) -> Array:
        return square / n - jnp.sum(jnp.square(total / n[..., None]), axis=-1)

    whole = variance(stats["token_sum"], stats["token_square"])
    return variance(stats["z_sum"], stats["z_square"]) / jnp.maximum(whole, 1e-12)


def beyond_capacity(load: Array, factor: float) -> Array:
    """How many assignments find no slot where every expert has C = ceil(c·A/E) of them.

    What dispatch "capacity" drops of this batch, or would drop.

    Args:
        load: [...,E] assignments of real tokens in one batch, A in all.
        factor: c.
    """
    total = jnp.sum(load, axis=-1, keepdims=True)
    # Rounded first, as in `dispatch.capacity.slots`.
    room = jnp.ceil(jnp.round(factor * total / load.shape[-1], 3))
    return jnp.sum(jnp.maximum(load - room, 0.0), axis=-1)


def routing_metrics(stats: dict[str, Array]) -> dict[str, Array]:
    """All metrics of a layer from its summed statistics.

    Args:
        stats: see `routers.base.Routing` and `moe.Aux`; leading axes [...] are layers.

    Returns:
        Values [...]: `max_vio`, `cv`, `entropy`, `dead`, `drop_fraction` (of the assignments),
        `drop_at_capacity` (of the assignments, what `capacity_factor` leaves no slot in its batch),
        `overflow_fraction` (of the exchanges between devices; 0 where there is none),
        `gate` (mean of the largest gate of a token), `energy` (eigenbasis routers), `left_out` (of
        the tokens, what is too large for a router's running statistics); and `load` [...,E]
        shares.
    """
    load = stats["load"]
    metrics = {
        "load": load_shares(load),
        "max_vio": max_violation(load),
        "cv": coefficient_of_variation(load),
        "entropy": normalized_entropy(load),
        "dead": dead_experts(load),
        "drop_fraction": stats["dropped"] / jnp.maximum(jnp.sum(load, axis=-1), 1.0),
        "drop_at_capacity": stats["beyond_capacity"] / jnp.maximum(jnp.sum(load, axis=-1), 1.0),
        "overflow_fraction": stats["overflows"] / jnp.maximum(stats["exchanges"], 1e-9),
        "gate": stats["gate"] / jnp.maximum(stats["tokens"], 1.0),
    }
    if "z_sum" in stats:
        metrics["energy"] = energy_captured(stats)
    if "counted" in stats:
        left_out = stats["tokens"] - stats["counted"]
        metrics["left_out"] = left_out / jnp.maximum(stats["tokens"], 1.0)
    return metrics
