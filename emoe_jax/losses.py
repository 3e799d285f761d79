"""Task losses. Balance losses stand with the routers that they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from emoe_jax.layers import row_product
from emoe_jax.sharding import BATCH_AXES, RULES, ambient_mesh, batch_shards, gathered

Array = jax.Array
Sums = Callable[..., tuple[Array, ...]]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> Array:
    """Weighted sum of cross-entropies that holds the logits of `chunk` tokens at a time.

    Under differentiation the gradients of a chunk are formed while its logits are at hand, so the
    logits are neither stored nor computed twice, and the backward pass only scales. On a mesh (see
    `sharding.ambient_mesh`) each device goes through its own sequences, with the classes that are
    its part of the axis `tensor`, and gradients of the head are summed once, after the last chunk.

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
    return _where_they_lie(_losses, hidden, head, targets, weights, chunk)[0]


def _where_they_lie(
    sums: Sums, hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, ...]:
    """`sums` of all tokens: on a mesh that divides them, of each device's own, added up."""
    mesh = ambient_mesh()
    if mesh is None or hidden.shape[0] % batch_shards(mesh):
        low = gathered(head.astype(hidden.dtype), "head")
        return sums(hidden, low, targets, weights, chunk, Axes((), ()))
    # Named only where they cut: XLA on CPU carries out what one device would do with itself.
    classes, widths = (
        tuple(axis for axis in (RULES[name],) if axis and mesh.shape[axis] > 1)
        for name in ("vocab", "embed")
    )
    rows, place = PartitionSpec(BATCH_AXES), PartitionSpec(classes, widths)

    def body(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, ...]:
        # In the compute dtype, so that half as much is gathered; gradients are summed in float32.
        low = head.astype(hidden.dtype)
        if widths:
            low = lax.all_gather(low, widths, axis=1, tiled=True)
        loss, *gradients = sums(hidden, low, targets, weights, chunk, Axes(BATCH_AXES, classes))
        loss = lax.psum(loss, BATCH_AXES)
        if not gradients:
            return (loss,)
        hidden_gradient, head_gradient = gradients
        if widths:
            head_gradient = lax.psum_scatter(head_gradient, widths, scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in BATCH_AXES if axis not in widths)
        return loss, hidden_gradient, lax.psum(head_gradient, others)

    results = (PartitionSpec(), rows, PartitionSpec(widths, classes))[: 1 if sums is _losses else 3]
    spread = jax.shard_map(body, mesh=mesh, in_specs=(rows, place, rows, rows), out_specs=results)
    return spread(hidden, head, targets, weights)


class Axes(NamedTuple):
    """Mesh axes of the `shard_map` in which losses are summed; none outside of one.

    Attributes:
        tokens: over which tokens are split.
        classes: over which classes are.
    """

    tokens: tuple[str, ...]
    classes: tuple[str, ...]

    def zeros(self, shape: tuple[int, ...], *, classes: bool) -> Array:
        """Float32 to which a device adds its own tokens', and with `classes` its own classes'."""
        axes = self.tokens + self.classes if classes else self.tokens
        zeros = jnp.zeros(shape, jnp.float32)
        return lax.pcast(zeros, axes, to="varying") if axes else zeros

    def over_classes(self, reduce: Callable[[Array, tuple[str, ...]], Array], x: Array) -> Array:
        """A reduction of what each device has of its own classes; x where it has all of them."""
        return reduce(x, self.classes) if self.classes else x


def _losses(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int, axes: Axes
) -> tuple[Array]:
    """The weighted sum over tokens [T,D] or [B,S,D], with a head [N,D] in their dtype."""

    def add(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + _chunk_loss(head, part, axes)[0], None

    parts = _split(hidden, targets, weights, chunk)
    return (lax.scan(add, axes.zeros((), classes=False), parts)[0],)


def _losses_and_gradients(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int, axes: Axes
) -> tuple[Array, Array, Array]:
    """The same, its gradients of the hidden states in their dtype, of the head [D,N] in float32."""

    def add(carry: tuple[Array, Array], part: Any) -> tuple[tuple[Array, Array], Array]:
        total, head_gradient = carry
        loss, probs, target = _chunk_loss(head, part, axes)
        gap = ((probs - target.astype(jnp.float32)) * part[2][..., None]).astype(hidden.dtype)
        hidden_gradient = axes.over_classes(lax.psum, row_product(gap, head))
        # Of the shape [D,N]: for [N,D] XLA on CPU would first transpose the gap, which is large.
        tokens = tuple(range(gap.ndim - 1))
        step = jnp.tensordot(
            part[0], gap, axes=(tokens, tokens), preferred_element_type=jnp.float32
        )
        return (total + loss, head_gradient + step), hidden_gradient.astype(hidden.dtype)

    start = axes.zeros((), classes=False), axes.zeros(head.shape[::-1], classes=True)
    parts = _split(hidden, targets, weights, chunk)
    (total, head_gradient), hidden_gradient = lax.scan(add, start, parts)
    return total, _unfold(hidden_gradient, hidden.shape), head_gradient


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


def _chunk_loss(
    head: Array, part: tuple[Array, Array, Array], axes: Axes
) -> tuple[Array, Array, Array]:
    """Weighted loss [], probabilities [...,c,N], and which class is the target, of that shape.

    Where classes are split over devices, N are those of this one.
    """
    hidden, targets, weights = part
    logits = row_product(hidden, head.T)
    logits = logits - axes.over_classes(lax.pmax, jnp.max(logits, axis=-1, keepdims=True))
    exponential = jnp.exp(logits)
    total = axes.over_classes(lax.psum, jnp.sum(exponential, axis=-1))
    first = lax.axis_index(axes.classes) * logits.shape[-1]
    classes = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target = (targets - first)[..., None] == classes
    chosen = axes.over_classes(lax.psum, jnp.sum(jnp.where(target, logits, 0.0), axis=-1))
    loss = jnp.sum(weights * (jnp.log(total) - chosen))
    return loss, exponential / total[..., None], target


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int
) -> tuple[Array, Any]:
    total, hidden_gradient, head_gradient = _where_they_lie(
        _losses_and_gradients, hidden, head, targets, weights, chunk
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


chunked_cross_entropy.defvjp(_forward, _backward)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy of soft labels: [B,N] logits and [B,N] float32 distributions to [B], nats."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
