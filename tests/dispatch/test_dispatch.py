"""Dispatchers: all equal dense, with gradients; drops are counted as a loop in Python counts."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.config import MoEConfig
from emoe_jax.dispatch import dispatcher
from emoe_jax.dispatch.capacity import slots
from emoe_jax.dispatch.dropless import sort_by_expert
from emoe_jax.experts import Experts
from emoe_jax.routers.base import ExpertChoice, gather_gates, make_routing, select_top_k

pytestmark = pytest.mark.usefixtures("strict")

# (T, D, F, E, K): few, so that each is compiled once.
SHAPES = ((7, 4, 3, 3, 2), (13, 3, 5, 4, 1), (5, 2, 2, 6, 6))
LOADS = ("even", "skewed", "one expert", "empty experts")


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def scores_of(rng, load, T, E):
    """Scores [T,E] whose order within a token is clear: neighbours differ by more than 1e-2."""
    scores = rng.permuted(np.tile(np.arange(E, dtype=np.float32), (T, 1)), axis=1) * 0.3
    if load == "skewed":
        scores = scores + np.linspace(2.0, 0.0, E, dtype=np.float32)[None, :]
    if load == "one expert":
        scores[:, E - 1] += 5.0
    if load == "empty experts":
        scores[:, ::2] -= 5.0
    return scores + rng.uniform(0, 0.01, (T, E)).astype(np.float32)


def route(scores, mask, K):
    """A token-choice routing of given scores, as a softmax router makes it."""
    probs = jax.nn.softmax(scores, axis=-1)
    indices = select_top_k(probs, K)
    return make_routing(indices, gather_gates(probs, indices), probs, mask[None, :])


def make_experts(D, F, E, bias=True):
    config = MoEConfig(experts=E, hidden=F, bias=bias)
    experts = Experts(config, D, dtype="float32", rngs=nnx.Rngs(0))
    graph, params = nnx.split(experts)
    # Biases start at zero, where a wrong one would not show.
    return graph, jax.tree.map(lambda leaf: draw(leaf.shape, leaf.size) / 2, params)


@partial(jax.jit, static_argnames=("name", "factor", "K", "graph"))
def run(name, factor, K, graph, inputs, mask, cotangent):
    """Outputs, dropped, and the gradients of tokens, scores and experts."""

    def loss(inputs):
        tokens, scores, params = inputs
        move = dispatcher(name)
        groups = move.dispatch(tokens, route(scores, mask, K), mask, factor)
        out = move.combine(nnx.merge(graph, params)(groups), groups)
        return jnp.sum(out * cotangent), (out, groups.dropped)

    (_, (out, dropped)), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
    return out, dropped, gradients


def assert_close_to_largest(actual, expected, share=1e-5):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=share * max(float(np.abs(b).max()), 1e-6))

    jax.tree.map(check, actual, expected)


def case(shape, load, seed, padding):
    T, D, F, E, K = shape
    rng = np.random.default_rng(seed)
    mask = jnp.asarray(rng.uniform(size=T) >= padding)
    graph, params = make_experts(D, F, E)
    scores = scores_of(rng, load, T, E)
    ordered = -np.sort(-scores, axis=-1)
    assert K == E or np.min(ordered[:, K - 1] - ordered[:, K]) >= 1e-3
    inputs = (draw((T, D), seed), jnp.asarray(scores), params)
    return graph, inputs, mask, draw((T, D), seed + 1)


@given(
    shape=st.sampled_from(SHAPES),
    load=st.sampled_from(LOADS),
    padding=st.sampled_from((0.0, 0.4, 1.0)),
    seed=st.integers(0, 10_000),
)
def test_dispatchers_equal_dense_in_outputs_and_all_gradients(shape, load, padding, seed):
    E, K = shape[3], shape[4]
    graph, inputs, mask, cotangent = case(shape, load, seed, padding)
    expected = run("dense", 1.0, K, graph, inputs, mask, cotangent)
    for name in ("dropless", "capacity"):
        # A factor of E / K gives every expert a slot for every token.
        actual = run(name, E / K, K, graph, inputs, mask, cotangent)
        assert_close_to_largest(actual, expected)


def count_by_hand(indices, mask, C, E):
    """Which assignments [T,K] find a slot: first choices first, each in the order of tokens."""
    free, kept = [C] * E, np.zeros(indices.shape, bool)
    for k in range(indices.shape[1]):
        for t in range(indices.shape[0]):
            if mask[t] and free[indices[t, k]]:
                free[indices[t, k]] -= 1
                kept[t, k] = True
    return kept


@given(
    shape=st.sampled_from(SHAPES[:2]),
    load=st.sampled_from(LOADS),
    factor=st.sampled_from((0.3, 1.0)),
    padding=st.sampled_from((0.0, 0.4)),
    seed=st.integers(0, 10_000),
)
def test_capacity_keeps_and_drops_what_a_loop_does(shape, load, factor, padding, seed):
    T, E, K = shape[0], shape[3], shape[4]
    graph, inputs, mask, cotangent = case(shape, load, seed, padding)
    out, dropped, gradients = run("capacity", factor, K, graph, inputs, mask, cotangent)

    routing = jax.jit(route, static_argnums=2)(inputs[1], mask, K)
    kept = count_by_hand(np.asarray(routing.indices), np.asarray(mask), slots(T, K, E, factor), E)
    assert float(dropped) == np.sum(np.asarray(mask)) * K - np.sum(kept)

    # What is kept equals the dense product with the other gates at zero.
    tokens, _, params = inputs
    cut = routing._replace(weights=routing.weights * kept.astype(np.float32))
    expected, pulled = dense_of(graph, params, tokens, cut, mask, cotangent)
    assert_close_to_largest(out, expected)
    assert_close_to_largest(gradients[0], pulled[0])
    assert_close_to_largest(gradients[2], pulled[1])
    lost = ~np.any(kept, axis=1)
    assert not np.any(np.asarray(out)[lost])
    assert not np.any(np.asarray(gradients[0])[lost])


@partial(jax.jit, static_argnames="graph")
def dense_of(graph, params, tokens, routing, mask, cotangent):
    def apply(tokens, params):
        move = dispatcher("dense")
        groups = move.dispatch(tokens, routing, mask, 1.0)
        return move.combine(nnx.merge(graph, params)(groups), groups)

    out, pull = jax.vjp(apply, tokens, params)
    return out, pull(cotangent)


def test_drops_worked_out_by_hand():
    # T=4, K=2, E=2, factor 0.75: C = 3. Expert 0 gets first choices of tokens 0, 1, 2 and is full,
    # so the second choice of token 3 is dropped. Expert 1 gets the first choice of 3 and the second
    # choices of 0 and 1; that of 2 is dropped.
    scores = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    mask = jnp.ones((4,), bool)
    routing = route(scores, mask, 2)
    tokens = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    move = dispatcher("capacity")
    groups = move.dispatch(tokens, routing, mask, 0.75)
    chex.assert_shape(groups.rows, (2, 3, 1))
    chex.assert_trees_all_equal(groups.rows[..., 0], jnp.array([[1.0, 2.0, 3.0], [4.0, 1.0, 2.0]]))
    chex.assert_trees_all_equal(groups.sizes, jnp.array([3, 3]))
    assert float(groups.dropped) == 2.0
    high = 1 / (1 + math.exp(-1))
    out = move.combine(groups.rows, groups)
    chex.assert_trees_all_close(out[:, 0], jnp.array([1.0, 2.0, 3 * high, 4 * high]), rtol=1e-6)


@pytest.mark.parametrize(
    ("T", "K", "E", "factor", "expected"),
    [
        (8, 1, 4, 1.0, 2),
        (8, 1, 4, 1.25, 3),
        (9, 2, 4, 1.0, 5),
        (4, 1, 64, 1.0, 1),
        (4, 2, 2, 8.0, 4),
        # 1.1 · 100 / 10 is 11, though in floating point it is a little more.
        (100, 1, 10, 1.1, 11),
    ],
)
def test_slots(T, K, E, factor, expected):
    assert slots(T, K, E, factor) == expected


def test_padding_takes_no_slot():
    scores = jnp.array([[1.0, 0.0]] * 4)
    mask = jnp.array([False, False, True, True])
    groups = dispatcher("capacity").dispatch(jnp.ones((4, 1)), route(scores, mask, 1), mask, 1.0)
    chex.assert_trees_all_equal(groups.sizes, jnp.array([2, 0]))
    assert float(groups.dropped) == 0.0


@pytest.mark.parametrize("name", ["dense", "capacity", "dropless"])
def test_ties_go_to_the_lowest_experts_first(name):
    mask = jnp.ones((3,), bool)
    routing = route(jnp.zeros((3, 4)), mask, 2)
    chex.assert_trees_all_equal(routing.indices, jnp.array([[0, 1]] * 3, jnp.int32))
    groups = dispatcher(name).dispatch(jnp.ones((3, 1)), routing, mask, 2.0)
    gates, sizes = np.asarray(groups.gates), np.asarray(groups.sizes)
    if name == "dense":
        np.testing.assert_array_equal(gates[:2] > 0, np.ones((2, 3), bool))
        assert not gates[2:].any()
    else:
        np.testing.assert_array_equal(sizes, [3, 3, 0, 0])


@given(seed=st.integers(0, 10_000), count=st.sampled_from((1, 3)))
def test_sort_by_expert_is_stable_and_puts_none_last(seed, count):
    experts = np.random.default_rng(seed).integers(0, count + 1, 9).astype(np.int32)
    order, start, size = jax.jit(sort_by_expert, static_argnums=1)(experts, count)
    np.testing.assert_array_equal(order, np.argsort(experts, kind="stable"))
    np.testing.assert_array_equal(size, np.bincount(experts, minlength=count + 1)[:count])
    np.testing.assert_array_equal(start, np.cumsum(size) - size)


def test_dropless_lays_rows_in_groups_with_padding_at_the_end():
    scores = jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    mask = jnp.array([True, True, False, True])
    tokens = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    groups = dispatcher("dropless").dispatch(tokens, route(scores, mask, 1), mask, 1.0)
    chex.assert_trees_all_equal(groups.rows[:3, 0], jnp.array([2.0, 1.0, 4.0]))
    chex.assert_trees_all_equal(groups.sizes, jnp.array([1, 2]))
    # Row 3 is outside of the groups, and the padding's assignment stands nowhere.
    chex.assert_trees_all_equal(groups.plan.places[:, 0], jnp.array([1, 0, 4, 2], jnp.int32))


def expert_choice():
    # Two experts, two slots: token 1 is taken by both, token 3 by none, token 2 is padding.
    return ExpertChoice(
        jnp.array([[0, 1], [1, 2]], jnp.int32),
        jnp.array([[0.9, 0.4], [0.6, 0.0]]),
        jnp.full((4, 2), 0.5),
        jnp.zeros(()),
        {},
        {},
    )


def test_expert_choice_by_capacity_equals_dense():
    tokens, cotangent = draw((4, 3)), draw((4, 3), 1)
    mask = jnp.array([True, True, False, True])
    graph, params = make_experts(3, 2, 2)

    def loss(name, tokens, weights, params):
        move = dispatcher(name)
        routing = expert_choice()._replace(weights=weights)
        groups = move.dispatch(tokens, routing, mask, 1.0)
        out = move.combine(nnx.merge(graph, params)(groups), groups)
        return jnp.sum(out * cotangent), (out, groups.dropped)

    results = [
        jax.jit(jax.value_and_grad(partial(loss, name), (0, 1, 2), has_aux=True))(
            tokens, expert_choice().weights, params
        )
        for name in ("capacity", "dense")
    ]
    assert_close_to_largest(*results)
    out = results[0][0][1][0]
    assert not jnp.any(out[2:])


def test_dropless_refuses_expert_choice_and_says_what_to_do():
    words = r"expert_choice router makes none.*; set dispatch to 'capacity'"
    with pytest.raises(ValueError, match=words):
        dispatcher("dropless").dispatch(jnp.ones((4, 3)), expert_choice(), jnp.ones(4, bool), 1.0)


def test_unknown_dispatchers_are_refused():
    words = "dispatch='magic' is not known; choose one of dense, capacity, dropless"
    with pytest.raises(ValueError, match=words):
        dispatcher("magic")
