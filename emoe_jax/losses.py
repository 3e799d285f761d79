"""Task losses. Balance losses stand with the routers that they belong to."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from emoe_jax.layers import row_product
from emoe_jax.sharding import (
    BATCH_AXES,
    RULES,
    ambient_mesh,
    batch_shards,
    gathered,
    reduce_over,
    splitting,
    varying,
    varying_alike,
)

Array = jax.Array


def chunked_cross_entropy(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> Array:
    """Weighted sum of cross-entropies that holds the logits of `chunk` tokens at a time.

    Under differentiation the gradients of a chunk are formed while its logits are at hand, so the
    logits are neither stored nor computed twice, and the backward pass only scales. On a mesh (see
    `sharding.ambient_mesh`) that divides all dimensions, each device goes through its own
    sequences, with the classes that are its part of the axis `tensor`, and gradients of the head
    are summed once, after the last chunk.

    Args:
        hidden: [T,D] or [B,S,D] in the compute dtype.
        head: [N,D] float32, one row a class; logits are hidden @ headᵀ, accumulated in float32.
        targets: [T] or [B,S] int32 in [0,N).
        weights: [T] or [B,S] float32; 0 leaves a token out. Not differentiated.
        chunk: tokens at a time on a device, at least one of each sequence; neither T nor S need be
            a multiple.

    Returns:
        Σ_t weights[t] · (-log softmax(logits_t)[targets_t]) in nats, scalar float32.
    """
    return _chunked(*varying_alike(hidden, head, targets, weights), chunk)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int) -> Array:
    (loss,) = _where_they_lie(hidden, head, targets, weights, chunk, gradients=False)
    return loss


def _where_they_lie(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int, *, gradients: bool
) -> tuple[Array, ...]:
    """What `_sums` gives for all tokens: on a mesh each device its own, added up."""
    mesh = ambient_mesh()
    if mesh is None or not _divides(mesh, hidden, head):
        low = gathered(head.astype(hidden.dtype), "head")
        return _sums(hidden, low, targets, weights, chunk, (), gradients=gradients)
    tokens, classes, widths = (
        splitting(mesh, axes) for axes in (BATCH_AXES, (RULES["vocab"],), (RULES["embed"],))
    )

    def body(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, ...]:
        # In the compute dtype, so that half as much is gathered; gradients are summed in float32.
        low = head.astype(hidden.dtype)
        if widths:
            low = lax.all_gather(low, widths, axis=1, tiled=True)
        loss, *rest = _sums(hidden, low, targets, weights, chunk, classes, gradients=gradients)
        loss = reduce_over(lax.psum, loss, tokens)
        if not rest:
            return (loss,)
        hidden_gradient, head_gradient = rest
        if widths:
            head_gradient = lax.psum_scatter(head_gradient, widths, scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in tokens if axis not in widths)
        return loss, hidden_gradient, reduce_over(lax.psum, head_gradient, others)

    rows = PartitionSpec(tokens)
    places = rows, PartitionSpec(classes, widths), rows, rows
    results = PartitionSpec(), rows, PartitionSpec(widths, classes)
    spread = jax.shard_map(
        body, mesh=mesh, in_specs=places, out_specs=results if gradients else results[:1]
    )
    return spread(hidden, head, targets, weights)


def _divides(mesh: AbstractMesh, hidden: Array, head: Array) -> bool:
    (N, D), sizes = head.shape, mesh.shape
    uneven = hidden.shape[0] % batch_shards(mesh), N % sizes["tensor"], D % sizes["fsdp"]
    return not any(uneven)


def _sums(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    chunk: int,
    classes: tuple[str, ...],
    *,
    gradients: bool,
) -> tuple[Array, ...]:
    """The weighted sum over tokens [T,D] or [B,S,D], with a head [N,D] in their dtype.

    With `gradients` also those of the hidden states, in their dtype, and of the head [D,N], in
    float32. `classes` are the mesh axes over which N is split.
    """
    axes = varying(hidden, head)

    def zeros(shape: tuple[int, ...], axes: frozenset[str]) -> Array:
        start = jnp.zeros(shape, jnp.float32)
        return lax.pcast(start, tuple(sorted(axes)), to="varying") if axes else start

    def add(total: Array, part: Any) -> tuple[Array, None]:
        return total + _chunk_loss(head, part, classes)[0], None

    def add_gradients(carry: tuple[Array, Array], part: Any) -> tuple[tuple[Array, Array], Array]:
        total, head_gradient = carry
        loss, probs, target = _chunk_loss(head, part, classes)
        gap = ((probs - target.astype(jnp.float32)) * part[2][..., None]).astype(hidden.dtype)
        hidden_gradient = reduce_over(lax.psum, row_product(gap, head), classes)
        # Of the shape [D,N]: for [N,D] XLA on CPU would first transpose the gap, which is large.
        tokens = tuple(range(gap.ndim - 1))
        step = jnp.tensordot(
            part[0], gap, axes=(tokens, tokens), preferred_element_type=jnp.float32
        )
        return (total + loss, head_gradient + step), hidden_gradient.astype(hidden.dtype)

    start = zeros((), axes - frozenset(classes))
    parts = _split(hidden, targets, weights, chunk)
    if not gradients:
        return (lax.scan(add, start, parts)[0],)
    carry = start, zeros(head.shape[::-1], axes)
    (total, head_gradient), hidden_gradient = lax.scan(add_gradients, carry, parts)
    return total, _unfold(hidden_gradient, hidden.shape), head_gradient


def chunk_positions(chunk: int, sequences: int, length: int) -> int:
    """Positions of each sequence in one chunk: `chunk` tokens in all, but one of each at least."""
    return min(max(chunk // sequences, 1), length)


def _split(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array, Array]:
    """Folds positions into chunks [n,...,c,D], padded with positions of weight zero.

    Positions are cut, never sequences: on a mesh each device keeps the sequences that it holds.
    """
    *lead, S, D = hidden.shape
    size = chunk_positions(chunk, math.prod(lead), S)
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


def _chunk_loss(
    head: Array, part: tuple[Array, Array, Array], classes: tuple[str, ...]
) -> tuple[Array, Array, Array]:
    """Weighted loss [], probabilities [...,c,N], and which class is the target, of that shape.

    Where classes are split over mesh axes, N are those of this device.
    """
    hidden, targets, weights = part
    logits = row_product(hidden, head.T)
    most = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    logits = logits - reduce_over(lax.pmax, most, classes)
    exponential = jnp.exp(logits)
    first = lax.axis_index(classes) * logits.shape[-1]
    own = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target = (targets - first)[..., None] == own
    chosen = jnp.sum(jnp.where(target, logits, 0.0), axis=-1)
    # Two numbers a token, in one sum over devices.
    total, chosen = reduce_over(
        lax.psum, jnp.stack([jnp.sum(exponential, axis=-1), chosen]), classes
    )
    loss = jnp.sum(weights * (jnp.log(total) - chosen))
    return loss, exponential / total[..., None], target


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, Any]:
    total, hidden_gradient, head_gradient = _where_they_lie(
        hidden, head, targets, weights, chunk, gradients=True
    )
    return total, (hidden_gradient, head_gradient.T.astype(head.dtype), targets, weights)


def _backward(chunk: int, kept: Any, cotangent: Array) -> tuple[Array, Array, Any, Array]:
    hidden_gradient, head_gradient, targets, weights = kept
    no_gradient = np.zeros(targets.shape, jax.dtypes.float0)
    return (
        (hidden_gradient.astype(jnp.float32) * cotangent).astype(hidden_gradient.dtype),
        head_gradient * cotangent,
        no_gradient,
        jnp.zeros_like(weights),
    )


_chunked.defvjp(_forward, _backward)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy of soft labels: [B,N] logits and [B,N] float32 distributions to [B], nats."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
