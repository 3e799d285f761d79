"""Experts: against a loop in float64, and both forms of groups against each other."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax.config import MoEConfig
from emoe_jax.dispatch import Groups
from emoe_jax.experts import Experts, row_bias

pytestmark = pytest.mark.usefixtures("strict")

E, C, D, F = 4, 3, 5, 2
SIZES = (2, 0, 3, 1)
"""Rows of each expert; the second has none, the third fills its slots."""


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def build(activation, bias, dtype="float32"):
    config = MoEConfig(experts=E, hidden=F, activation=activation, bias=bias)
    graph, params = nnx.split(Experts(config, D, dtype=dtype, rngs=nnx.Rngs(0)))
    return graph, jax.tree.map(lambda leaf: draw(leaf.shape, leaf.size), params)


def groups_of(rows, sizes):
    sizes = jnp.asarray(sizes, jnp.int32)
    return Groups(rows, sizes, jnp.ones(rows.shape[:-1]), None, jnp.zeros(()))


def by_loop(params, rows, expert):
    """One expert on rows [n,D], in float64."""
    p = {k: np.asarray(v[...], np.float64)[expert] for k, v in params.items()}
    rows = np.asarray(rows, np.float64)
    up = rows @ p["w_up"] + p.get("b_up", 0)
    if "w_gate" in p:
        gate = rows @ p["w_gate"] + p.get("b_gate", 0)
        hidden = gate / (1 + np.exp(-gate)) * up
    else:
        hidden = up * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(up / math.sqrt(2)))
    return hidden @ p["w_down"] + p.get("b_down", 0)


@partial(jax.jit, static_argnums=0)
def both_forms(graph, params, rows, cotangent):
    """Outputs and gradients in the [M,D] form, with two rows past the end, and in [E,C,D]."""
    slots = [(e, i) for e, size in enumerate(SIZES) for i in range(size)]
    experts, places = (jnp.asarray(x) for x in zip(*slots, strict=True))

    def sorted_form(params, rows):
        padded = jnp.concatenate([rows, jnp.full((2, D), 7.0)])
        return nnx.merge(graph, params)(groups_of(padded, SIZES))

    def slot_form(params, rows):
        slotted = jnp.zeros((E, C, D)).at[experts, places].set(rows)
        return nnx.merge(graph, params)(groups_of(slotted, SIZES))[experts, places]

    out, pull = jax.vjp(sorted_form, params, rows)
    slotted, pull_slotted = jax.vjp(slot_form, params, rows)
    ends = jnp.concatenate([cotangent, jnp.ones((2, D))])
    return (out, pull(ends)), (slotted, pull_slotted(cotangent))


@pytest.mark.parametrize(
    ("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", True)]
)
def test_both_forms_equal_a_loop_and_each_other(activation, bias):
    graph, params = build(activation, bias)
    rows, cotangent = draw((sum(SIZES), D)), draw((sum(SIZES), D), 1)
    (out, gradients), (slotted, slot_gradients) = both_forms(graph, params, rows, cotangent)
    starts = np.concatenate([[0], np.cumsum(SIZES)])
    expected = np.concatenate(
        [by_loop(params, rows[starts[e] : starts[e + 1]], e) for e in range(E)]
    )
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert not np.any(out[len(expected) :])
    chex.assert_trees_all_close(slotted, out[: len(expected)], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(gradients, slot_gradients, rtol=1e-4, atol=1e-4)
    for gradient in jax.tree.leaves(gradients[0]):
        assert not np.any(gradient[1])
        assert np.any(gradient[2])


def test_matrices_start_with_the_deviation_of_their_fan_in():
    experts = Experts(MoEConfig(experts=8, hidden=64), 16, dtype="float32", rngs=nnx.Rngs(0))
    for name, fan_in in (("w_gate", 16), ("w_up", 16), ("w_down", 64)):
        std = float(np.std(getattr(experts, name)[...]))
        assert std == pytest.approx(1 / math.sqrt(fan_in), rel=0.05)
    assert not np.allclose(experts.w_up[...][0], experts.w_up[...][1])


def test_bfloat16_is_near_float32_and_keeps_float32_parameters():
    rows = draw((sum(SIZES), D))
    out = {}
    for dtype in ("float32", "bfloat16"):
        graph, params = build("swiglu", True, dtype)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        run = jax.jit(lambda p, graph=graph: nnx.merge(graph, p)(groups_of(rows, SIZES)))
        out[dtype] = run(params)
        assert out[dtype].dtype == dtype
    largest = float(jnp.max(jnp.abs(out["float32"])))
    gap = jnp.abs(out["float32"] - out["bfloat16"].astype(jnp.float32))
    assert float(jnp.max(gap)) < 0.03 * largest


def test_row_bias_skips_empty_experts_and_rows_past_the_end():
    bias = jnp.arange(1.0, 5.0)[:, None]
    spread = row_bias(bias, jnp.zeros((8, 1)), jnp.asarray((0, 2, 0, 3), jnp.int32))
    chex.assert_trees_all_equal(spread[:, 0], jnp.array([2.0, 2.0, 4.0, 4.0, 4.0, 0.0, 0.0, 0.0]))
