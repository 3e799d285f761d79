"""Attention of a transformer, and its kernels by platform."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax import devices
from emoe_jax.layers import LayerNorm, Linear, RMSNorm, rotate

Array = jax.Array
Cache = dict[str, Array]

HIDDEN_SCORE = -1e30
"""Score of a position that is not seen: its weight is zero, and no difference is infinite."""


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values (arXiv 2305.13245).

    Args:
        width: D.
        heads: H query heads.
        kv_heads: key and value heads, a divisor of H.
        head_dim: width of a head.
        causal: whether a position sees only earlier ones of its segment.
        rope_base: base of the rotary frequencies, None for no rotary positions.
        qk_norm: norm of queries and keys (arXiv 2302.05442, section 2), None for none.
        bias: whether the maps to queries, keys and values have biases.
        out_bias: whether the map behind them has one.
        implementation: see `attend`.
        dtype: compute dtype.
        out_scale: factor of the initial output matrix.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        causal: bool,
        rope_base: float | None,
        qk_norm: type[RMSNorm] | type[LayerNorm] | None,
        bias: bool,
        out_bias: bool,
        implementation: str,
        dtype: str,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.causal, self.rope_base = causal, rope_base
        self.implementation = implementation
        self.query = Linear(width, heads * head_dim, dtype, bias=bias, rngs=rngs)
        self.key = Linear(width, kv_heads * head_dim, dtype, bias=bias, rngs=rngs)
        self.value = Linear(width, kv_heads * head_dim, dtype, bias=bias, rngs=rngs)
        self.out = Linear(heads * head_dim, width, dtype, bias=out_bias, scale=out_scale, rngs=rngs)
        self.qk_norm = qk_norm is not None
        if qk_norm is not None:
            self.query_norm = qk_norm(head_dim)
            self.key_norm = qk_norm(head_dim)

    def __call__(self, x: Array, positions: Array, segments: Array | None) -> Array:
        """Attends within segments.

        Args:
            x: [B,S,D].
            positions: [B,S] int32, read by rotary positions.
            segments: [B,S] int32, positions see only their own segment; 0 is padding. None where
                each row is one segment, which spares the mask.

        Returns:
            [B,S,D].
        """
        query, key, value = self._project(x, x, positions)
        mixed = attend(query, key, value, segments, self.causal, self.implementation)
        return self.out(mixed.reshape(*x.shape[:2], -1))

    def first(self, x: Array, positions: Array, count: int) -> Array:
        """The same for the first `count` tokens alone, which see all S: [B,S,D] to [B,count,D].

        Not for causal attention, and each row is one segment.
        """
        query, key, value = self._project(x[:, :count], x, positions)
        # So few queries need no platform's kernel, and would not suit its blocks.
        mixed = _heads_first(query, key, value, None, False)
        return self.out(mixed.reshape(x.shape[0], count, -1))

    def decode(self, x: Array, cache: Cache, start: Array) -> tuple[Array, Cache]:
        """Attends from S new positions to the cache and to themselves, causally.

        Args:
            x: [B,S,D], positions start to start+S-1 of one document.
            cache: `key` and `value` [B,L,kv_heads,head_dim], filled before `start`.
            start: [] int32.

        Returns:
            [B,S,D], and the cache filled before start+S.
        """
        B, S, _ = x.shape
        steps = start + jnp.arange(S, dtype=jnp.int32)
        query, key, value = self._project(x, x, jnp.broadcast_to(steps, (B, S)))
        cache = {
            "key": jax.lax.dynamic_update_slice_in_dim(cache["key"], key, start, axis=1),
            "value": jax.lax.dynamic_update_slice_in_dim(cache["value"], value, start, axis=1),
        }
        slots = jnp.arange(cache["key"].shape[1], dtype=jnp.int32)
        seen = slots[None, :] <= steps[:, None]
        mixed = jax.nn.dot_product_attention(
            query, cache["key"], cache["value"], mask=seen[None, None], implementation="xla"
        )
        return self.out(mixed.reshape(B, S, -1)), cache

    def _project(self, asking: Array, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries of the first tokens of x, `asking`; keys and values of all."""
        B, S, _ = x.shape
        asked = asking.shape[1]
        query = self.query(asking).reshape(B, asked, self.heads, self.head_dim)
        key = self.key(x).reshape(B, S, self.kv_heads, self.head_dim)
        value = self.value(x).reshape(B, S, self.kv_heads, self.head_dim)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope_base is not None:
            query = rotate(query, positions[:, :asked], self.rope_base)
            key = rotate(key, positions, self.rope_base)
        return query, key, value


def attend(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    causal: bool,
    implementation: str,
) -> Array:
    """Scaled dot-product attention within segments, by the kernel of the platform.

    Args:
        query: [B,S,H,dim].
        key: [B,S,kv_heads,dim].
        value: of the shape of key.
        segments: [B,S] int32, or None where each row is one segment.
        causal: whether a position sees only positions before and at itself.
        implementation: "xla" (any platform), "heads_first" (any platform; the fast one on CPU),
            "cudnn" (flash attention on GPU, bfloat16 or float16), "splash" (flash attention on one
            TPU, causal or not, S a multiple of 128), or "auto": splash on TPU and cudnn on NVIDIA
            GPUs from Ampere on, where they take these shapes, heads_first on CPU, xla
            otherwise.

    Returns:
        [B,S,H,dim].
    """
    if implementation == "auto":
        implementation = choose_attention(
            query.shape, query.dtype, devices.platform(), jax.device_count()
        )
        if implementation == "cudnn" and not devices.are_ampere_or_later():
            implementation = "xla"
    if implementation == "heads_first":
        return _heads_first(query, key, value, segments, causal)
    if implementation == "splash":
        return _splash(query, key, value, segments, causal, interpret=False)
    same = None if segments is None else _same_segment(segments)[:, None]
    kernel: Literal["xla", "cudnn"] = "cudnn" if implementation == "cudnn" else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, mask=same, is_causal=causal, implementation=kernel
    )


def _same_segment(segments: Array) -> Array:
    """Which pairs of positions are of one segment: [B,S] to [B,S,S] bool."""
    return segments[:, :, None] == segments[:, None, :]


def _heads_first(
    query: Array, key: Array, value: Array, segments: Array | None, causal: bool
) -> Array:
    """Attention as products of [S,dim] matrices that lie one after the other.

    XLA on CPU takes three to four times as long where the heads are the last but one axis
    (docs/benchmarks). The softmax is divided by its sum after the product with the values, which
    has fewer numbers than the weights.
    """
    B, asked, H, dim = query.shape
    S, groups = key.shape[1:3]
    heads = H // groups
    # The query heads of a group follow each other, so they are more rows of one product.
    query = (query * dim**-0.5).astype(query.dtype).transpose(0, 2, 1, 3)
    query = query.reshape(B, groups, heads * asked, dim)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bgqd,bgkd->bgqk", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, groups, heads, asked, S)
    seen = None if segments is None else _same_segment(segments)
    if causal:
        past = jnp.tril(jnp.ones((S, S), bool))[None]
        seen = past if seen is None else past & seen
    if seen is not None:
        scores = jnp.where(seen[:, None, None], scores, HIDDEN_SCORE)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    mixed = jnp.einsum(
        "bgqk,bgkd->bgqd",
        weights.reshape(B, groups, heads * asked, S).astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    ).reshape(B, groups, heads, asked, dim)
    mixed = mixed / jnp.sum(weights, axis=-1, keepdims=True)
    return mixed.reshape(B, H, asked, dim).transpose(0, 2, 1, 3).astype(query.dtype)


def choose_attention(shape: tuple[int, ...], dtype: Any, platform: str, devices: int = 1) -> str:
    """The kernel that "auto" means for queries [B,S,H,dim] on devices of a platform.

    Splash needs one device: the partitioner cannot split a Mosaic kernel. cuDNN takes no odd S with
    a mask in training.
    """
    _, S, _, dim = shape
    if platform == "tpu" and devices == 1 and S % 128 == 0 and dim % 128 == 0:
        return "splash"
    half = jnp.dtype(dtype).itemsize == 2
    if platform == "cpu":
        return "heads_first"
    if platform in ("gpu", "cuda") and half and dim % 8 == 0 and dim <= 128 and S % 2 == 0:
        return "cudnn"
    return "xla"


def _splash(
    query: Array, key: Array, value: Array, segments: Array | None, causal: bool, *, interpret: bool
) -> Array:
    """Flash attention of jax.experimental.pallas for TPU, grouped keys and values as they are."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _, S, H, dim = query.shape
    mask = masks.CausalMask((S, S)) if causal else masks.FullMask((S, S))
    make = kernels.make_splash_mqa_single_device
    groups = key.shape[2]
    heads = H // groups
    kernel = make(masks.MultiHeadMask([mask] * heads), interpret=interpret)
    query = (query / math.sqrt(dim)).astype(query.dtype).transpose(0, 2, 1, 3)
    query = query.reshape(query.shape[0], groups, heads, S, dim)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    pairs = None if segments is None else kernels.SegmentIds(segments, segments)
    per_group = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    mixed = jax.vmap(per_group)(query, key, value, pairs)
    return mixed.reshape(mixed.shape[0], H, S, dim).transpose(0, 2, 1, 3)
