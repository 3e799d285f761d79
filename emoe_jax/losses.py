"""Task losses. Balance losses stand with the routers that they belong to."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> Array:
    """Weighted sum of cross-entropies that holds the logits of `chunk` tokens at a time.

    Under differentiation the gradients of a chunk are formed while its logits are at hand, so the
    logits are neither stored nor computed twice, and the backward pass only scales.

    Args:
        hidden: [T,D] in the compute dtype.
        head: [N,D] float32, one row a class; logits are hidden @ headᵀ, accumulated in float32.
        targets: [T] int32 in [0,N).
        weights: [T] float32; 0 leaves a token out. Not differentiated.
        chunk: tokens at a time; T need not be a multiple.

    Returns:
        Σ_t weights[t] · (-log softmax(logits_t)[targets_t]) in nats, scalar float32.
    """
    parts = _split(hidden, targets, weights, chunk)
    low = head.astype(hidden.dtype)

    def add(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + _chunk_loss(low, part)[0], None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]


def _split(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array, Array]:
    """Pads T to a multiple of the chunk with tokens of weight zero and folds it."""
    T, D = hidden.shape
    chunk = min(chunk, T)
    pad = -T % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0)))
    targets, weights = jnp.pad(targets, (0, pad)), jnp.pad(weights, (0, pad))
    return (
        hidden.reshape(-1, chunk, D),
        targets.reshape(-1, chunk),
        weights.astype(jnp.float32).reshape(-1, chunk),
    )


def _chunk_loss(head: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Weighted loss [], probabilities [c,N], and which class is the target [c,N] bool."""
    hidden, targets, weights = part
    logits = jnp.einsum("td,nd->tn", hidden, head, preferred_element_type=jnp.float32)
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponential = jnp.exp(logits)
    total = jnp.sum(exponential, axis=-1)
    target = targets[:, None] == jnp.arange(head.shape[0], dtype=targets.dtype)[None, :]
    chosen = jnp.sum(jnp.where(target, logits, 0.0), axis=-1)
    loss = jnp.sum(weights * (jnp.log(total) - chosen))
    return loss, exponential / total[:, None], target


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, Any]:
    low = head.astype(hidden.dtype)

    def add(carry: tuple[Array, Array], part: Any) -> tuple[tuple[Array, Array], Array]:
        total, head_gradient = carry
        loss, probs, target = _chunk_loss(low, part)
        gap = ((probs - target.astype(jnp.float32)) * part[2][:, None]).astype(hidden.dtype)
        hidden_gradient = jnp.einsum("tn,nd->td", gap, low, preferred_element_type=jnp.float32)
        step = jnp.einsum("tn,td->nd", gap, part[0], preferred_element_type=jnp.float32)
        return (total + loss, head_gradient + step), hidden_gradient.astype(hidden.dtype)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    parts = _split(hidden, targets, weights, chunk)
    (total, head_gradient), hidden_gradient = jax.lax.scan(add, start, parts)
    hidden_gradient = hidden_gradient.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    kept = (hidden_gradient, head_gradient.astype(head.dtype), targets, weights)
    return total, kept


def _backward(chunk: int, kept: Any, cotangent: Array) -> tuple[Array, Array, Any, Array]:
    hidden_gradient, head_gradient, targets, weights = kept
    no_gradient = np.zeros(targets.shape, jax.dtypes.float0)
    return (
        (hidden_gradient.astype(jnp.float32) * cotangent).astype(hidden_gradient.dtype),
        head_gradient * cotangent,
        no_gradient,
        jnp.zeros_like(weights),
    )


chunked_cross_entropy.defvjp(_forward, _backward)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy of soft labels: [B,N] logits and [B,N] float32 distributions to [B], nats."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
