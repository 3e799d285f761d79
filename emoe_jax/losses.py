"""Task losses. Balance losses stand with the routers that they belong to."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.layers import row_product

Array = jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> Array:
    """Weighted sum of cross-entropies that holds the logits of `chunk` tokens at a time.

    Under differentiation the gradients of a chunk are formed while its logits are at hand, so the
    logits are neither stored nor computed twice, and the backward pass only scales.

    Args:
        hidden: [T,D] or [B,S,D] in the compute dtype.
        head: [N,D] float32, one row a class; logits are hidden @ headᵀ, accumulated in float32.
        targets: [T] or [B,S] int32 in [0,N).
        weights: [T] or [B,S] float32; 0 leaves a token out. Not differentiated.
        chunk: tokens at a time, at least one of each sequence; neither T nor S need be a multiple.

    Returns:
        Σ_t weights[t] · (-log softmax(logits_t)[targets_t]) in nats, scalar float32.
    """
    parts = _split(hidden, targets, weights, chunk)
    low = head.astype(hidden.dtype)

    def add(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + _chunk_loss(low, part)[0], None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]


def _split(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array, Array]:
    """Folds positions into chunks [n,...,c,D], padded with positions of weight zero.

    Positions are cut, never sequences: on a mesh each device keeps the sequences that it holds.
    """
    *lead, S, D = hidden.shape
    size = min(max(chunk // math.prod(lead), 1), S)
    pad = -S % size

    def fold(x: Array, tail: tuple[int, ...]) -> Array:
        widths = [(0, 0)] * len(lead) + [(0, pad)] + [(0, 0)] * len(tail)
        parts = jnp.pad(x, widths).reshape(*lead, -1, size, *tail)
        return jnp.moveaxis(parts, len(lead), 0)

    return fold(hidden, (D,)), fold(targets, ()), fold(weights.astype(jnp.float32), ())


def _unfold(parts: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of the fold of hidden states [...,S,D], without the padding."""
    *lead, S, D = shape
    return jnp.moveaxis(parts, 0, len(lead)).reshape(*lead, -1, D)[..., :S, :]


def _chunk_loss(head: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Weighted loss [], probabilities [...,c,N], and which class is the target, of that shape."""
    hidden, targets, weights = part
    logits = row_product(hidden, head.T)
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponential = jnp.exp(logits)
    total = jnp.sum(exponential, axis=-1)
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target = targets[..., None] == classes
    chosen = jnp.sum(jnp.where(target, logits, 0.0), axis=-1)
    loss = jnp.sum(weights * (jnp.log(total) - chosen))
    return loss, exponential / total[..., None], target


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, Any]:
    low = head.astype(hidden.dtype)

    def add(carry: tuple[Array, Array], part: Any) -> tuple[tuple[Array, Array], Array]:
        total, head_gradient = carry
        loss, probs, target = _chunk_loss(low, part)
        gap = ((probs - target.astype(jnp.float32)) * part[2][..., None]).astype(hidden.dtype)
        hidden_gradient = row_product(gap, low)
        # Of the shape [D,N]: for [N,D] XLA on CPU would first transpose the gap, which is large.
        tokens = tuple(range(gap.ndim - 1))
        step = jnp.tensordot(
            part[0], gap, axes=(tokens, tokens), preferred_element_type=jnp.float32
        )
        return (total + loss, head_gradient + step), hidden_gradient.astype(hidden.dtype)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape[::-1], jnp.float32))
    parts = _split(hidden, targets, weights, chunk)
    (total, head_gradient), hidden_gradient = jax.lax.scan(add, start, parts)
    hidden_gradient = _unfold(hidden_gradient, hidden.shape)
    kept = (hidden_gradient, head_gradient.T.astype(head.dtype), targets, weights)
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
