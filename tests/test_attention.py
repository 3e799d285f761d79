"""Attention and its kernels: by the formula, with gradients; what is seen; decoding."""

import math
import types
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import devices
from emoe_jax.attention import Attention, _splash, attend, choose_attention
from emoe_jax.layers import RMSNorm


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


B, S, H, DIM = 2, 6, 4, 4
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], jnp.int32)


def attention_by_hand(query, key, value, segments, causal):
    """Softmax attention with every (i,j) decided one by one; key heads repeated."""
    heads, repeat = query.shape[2], query.shape[2] // key.shape[2]
    S = query.shape[1]
    key, value = jnp.repeat(key, repeat, axis=2), jnp.repeat(value, repeat, axis=2)
    seen = np.zeros((query.shape[0], heads, S, S), bool)
    for b in range(query.shape[0]):
        for i in range(S):
            for j in range(S):
                seen[b, :, i, j] = segments[b, i] == segments[b, j] and (j <= i or not causal)
    scores = jnp.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])
    probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhij,bjhd->bihd", probs, value)


@pytest.mark.parametrize("kernel", ["xla", "heads_first"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attend_equals_the_formula_with_gradients(causal, kv_heads, kernel):
    arrays = (draw((B, S, H, DIM)), draw((B, S, kv_heads, DIM), 1), draw((B, S, kv_heads, DIM), 2))
    cotangent = draw((B, S, H, DIM), 3)
    segments = np.asarray(SEGMENTS)

    @partial(jax.jit, static_argnums=0)
    def run(attention, arrays):
        out, pull = jax.vjp(attention, *arrays)
        return out, pull(cotangent)

    ours = run(lambda q, k, v: attend(q, k, v, SEGMENTS, causal, kernel), arrays)
    expected = run(lambda q, k, v: attention_by_hand(q, k, v, segments, causal), arrays)
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)
    # Without segments each row is one.
    ours = run(lambda q, k, v: attend(q, k, v, None, causal, kernel), arrays)
    one = np.ones_like(segments)
    expected = run(lambda q, k, v: attention_by_hand(q, k, v, one, causal), arrays)
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)


def build(kv_heads=2, causal=True, rope_base=10000.0, qk_norm=True):
    return Attention(
        8,
        H,
        kv_heads,
        DIM,
        causal=causal,
        rope_base=rope_base,
        qk_norm=RMSNorm if qk_norm else None,
        bias=False,
        out_bias=False,
        implementation="auto",
        dtype="float32",
        rngs=nnx.Rngs(0),
    )


POSITIONS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))


def test_neither_later_tokens_nor_other_segments_are_seen():
    attention, x = build(), draw((B, S, 8))
    run = jax.jit(attention.__call__)
    out = np.asarray(run(x, POSITIONS, SEGMENTS))
    for j in range(S):
        moved = np.asarray(run(x.at[:, j].add(1.0), POSITIONS, SEGMENTS))
        for b in range(B):
            for i in range(S):
                sees = SEGMENTS[b, i] == SEGMENTS[b, j] and j <= i
                same = np.array_equal(out[b, i], moved[b, i])
                assert same != bool(sees), (b, i, j)


def test_gradients_of_a_token_reach_only_what_it_sees():
    attention, x = build(), draw((B, S, 8))
    slope = jax.jit(jax.grad(lambda x: jnp.sum(attention(x, POSITIONS, SEGMENTS)[:, 1] ** 2)))(x)
    assert not np.any(slope[:, 2:])
    assert np.all(np.any(slope[:, :2], axis=-1))


def test_grouped_heads_equal_repeated_heads():
    grouped, full = build(2), build(4)
    for name in ("key", "value"):
        kernel = getattr(grouped, name).kernel[...].reshape(8, 2, DIM)
        repeated = jnp.repeat(kernel, 2, axis=1).reshape(8, 4 * DIM)
        getattr(full, name).kernel = nnx.Param(repeated)
    full.query, full.out = grouped.query, grouped.out
    x = draw((B, S, 8))
    run = [jax.jit(layer.__call__)(x, POSITIONS, SEGMENTS) for layer in (grouped, full)]
    chex.assert_trees_all_close(*run, rtol=1e-5, atol=1e-6)


def test_decoding_with_a_cache_equals_the_whole():
    attention, x = build(), draw((B, S, 8))
    whole = jax.jit(attention.__call__)(x, POSITIONS, jnp.ones((B, S), jnp.int32))
    cache = {name: jnp.zeros((B, S + 2, 2, DIM)) for name in ("key", "value")}
    decode, parts, start = jax.jit(attention.decode), [], 0
    for length in (3, 1, 2):
        part = x[:, start : start + length]
        out, cache = decode(part, cache, jnp.int32(start))
        parts.append(out)
        start += length
    chex.assert_trees_all_close(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)
    assert not np.any(cache["key"][:, S:])


@pytest.mark.parametrize("causal", [True, False])
def test_splash_equals_xla(causal):
    # The kernel for TPU, interpreted: head_dim and S of 128 are the least that it takes.
    shape = (1, 128, 2, 128)
    arrays = (draw(shape), draw((1, 128, 1, 128), 1), draw((1, 128, 1, 128), 2))
    segments = jnp.asarray(np.repeat([1, 2], [50, 78])[None, :], jnp.int32)
    cotangent = draw(shape, 3)

    @partial(jax.jit, static_argnums=0)
    def run(attention, arrays):
        out, pull = jax.vjp(attention, *arrays)
        return out, pull(cotangent)

    ours = run(lambda q, k, v: _splash(q, k, v, segments, causal, interpret=True), arrays)
    expected = run(lambda q, k, v: attend(q, k, v, segments, causal, "xla"), arrays)
    chex.assert_trees_all_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("S", "dim", "dtype", "platform", "expected"),
    [
        (128, 128, "bfloat16", "tpu", "splash"),
        (256, 256, "float32", "tpu", "splash"),
        (100, 128, "bfloat16", "tpu", "xla"),
        (128, 64, "bfloat16", "tpu", "xla"),
        (128, 64, "bfloat16", "gpu", "cudnn"),
        (100, 128, "float16", "cuda", "cudnn"),
        (128, 64, "float32", "gpu", "xla"),
        (128, 36, "bfloat16", "gpu", "xla"),
        (128, 256, "bfloat16", "gpu", "xla"),
        (1, 64, "bfloat16", "gpu", "xla"),
        (128, 128, "bfloat16", "cpu", "heads_first"),
        (128, 128, "bfloat16", "rocm", "xla"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform(S, dim, dtype, platform, expected):
    assert choose_attention((2, S, 4, dim), dtype, platform) == expected


@pytest.mark.parametrize(
    ("version", "capability", "kernel"),
    [("cuda 13000", "9.0", "cudnn"), ("cuda 13000", "7.5", "xla"), ("rocm 70000", "gfx942", "xla")],
)
def test_flash_attention_is_for_gpus_that_have_it(version, capability, kernel, monkeypatch):
    client = types.SimpleNamespace(platform_version=version)
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability, client=client)
    monkeypatch.setattr(devices, "all_devices", lambda: [gpu])
    seen = []

    def spy(query, *rest, implementation, **more):
        seen.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    query = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    attend(query, query, query, None, True, "auto")
    assert seen == [kernel]
