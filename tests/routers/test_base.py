"""What all routers share: selection, gates, counts, options, additive statistics."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.config import BasisConfig, MoEConfig, RouterConfig
from emoe_jax.routers import ROUTERS, Context, ExpertChoice, Router, make_router, router_class
from emoe_jax.routers.base import (
    count,
    gather_gates,
    linear,
    make_routing,
    mean_over,
    select_top_k,
)

pytestmark = pytest.mark.usefixtures("strict")

B, S, D, E = 4, 3, 6, 4


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def build(name, **options):
    k = E if name == "soft" else 2
    config = MoEConfig(
        router=name, experts=E, top_k=k, basis=BasisConfig(rank=3), routing=RouterConfig(**options)
    )
    return make_router(config, D, rngs=nnx.Rngs(0))


def test_top_k_takes_the_best_first_and_the_lower_index_of_equals():
    scores = jnp.array([[0.1, 0.5, 0.3], [0.2, 0.2, 0.2], [0.0, 0.7, 0.7]])
    chosen = select_top_k(scores, 2)
    chex.assert_trees_all_equal(chosen, jnp.array([[1, 2], [0, 1], [1, 2]], jnp.int32))


def gates_by_indexing(gates, indices, renormalize):
    chosen = jnp.take_along_axis(gates, indices, axis=-1)
    return chosen / jnp.sum(chosen, axis=-1, keepdims=True) if renormalize else chosen


@pytest.mark.parametrize("renormalize", [False, True])
def test_gates_equal_plain_indexing_with_gradients(renormalize):
    gates = jax.nn.softmax(draw((7, E)))
    indices = select_top_k(gates, 2)
    cotangent = draw((7, 2), 1)
    ours, pull = jax.vjp(lambda g: gather_gates(g, indices, renormalize=renormalize), gates)
    plain, pull_plain = jax.vjp(lambda g: gates_by_indexing(g, indices, renormalize), gates)
    chex.assert_trees_all_close(ours, plain, rtol=1e-6)
    chex.assert_trees_all_close(pull(cotangent), pull_plain(cotangent), rtol=1e-5, atol=1e-6)


def test_gates_need_no_scatter_backward_and_selection_passes_no_gradient():
    def loss(scores):
        return jnp.sum(jnp.square(gather_gates(scores, select_top_k(scores, 2))))

    scores = draw((3, E))
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(scores))
    picked = np.argsort(-np.asarray(scores), axis=1)[:, :2]
    expected = np.zeros((3, E), np.float32)
    np.put_along_axis(expected, picked, 2 * np.take_along_axis(np.asarray(scores), picked, 1), 1)
    chex.assert_trees_all_close(jax.grad(loss)(scores), expected, rtol=1e-6)


def test_gates_of_zero_stay_finite_when_renormalized():
    weights = gather_gates(jnp.zeros((1, 3)), jnp.array([[0, 1]], jnp.int32), renormalize=True)
    chex.assert_trees_all_equal(weights, jnp.zeros((1, 2)))


@given(seed=st.integers(0, 10_000))
def test_counts_equal_bincount_of_real_tokens(seed):
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, E, (9, 2)).astype(np.int32)
    real = rng.uniform(size=9) < 0.6
    counted = count(jnp.asarray(indices), jnp.asarray(real), E)
    np.testing.assert_array_equal(counted, np.bincount(indices[real].ravel(), minlength=E))


def test_mean_over_real_tokens_and_over_none():
    values = jnp.array([1.0, 2.0, 30.0])
    assert float(mean_over(values, jnp.array([True, True, False]))) == 1.5
    assert float(mean_over(values, jnp.zeros((3,), bool))) == 0.0


def test_linear_is_float32_for_bfloat16_tokens():
    tokens, kernel = draw((3, D)).astype(jnp.bfloat16), draw((D, E), 1)
    out = linear(tokens, kernel)
    assert out.dtype == jnp.float32
    expected = np.asarray(tokens, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_make_routing_masks_and_counts():
    indices = jnp.array([[0, 1], [1, 0], [1, 2], [2, 0]], jnp.int32)
    weights = jnp.array([[0.6, 0.3], [0.5, 0.4], [0.7, 0.2], [0.8, 0.1]])
    mask = jnp.array([[True, True], [False, True]])
    routing = make_routing(indices, weights, jnp.full((4, 3), 1 / 3), mask)
    chex.assert_trees_all_equal(routing.weights[2], jnp.zeros((2,)))
    chex.assert_trees_all_equal(routing.weights[3], weights[3])
    assert float(routing.aux_loss) == 0.0
    assert float(routing.stats["tokens"]) == 3.0
    chex.assert_trees_all_equal(routing.stats["load"], jnp.array([3.0, 2.0, 1.0]))
    assert float(routing.stats["gate"]) == pytest.approx(0.6 + 0.5 + 0.8)


def test_router_names_are_checked():
    words = (
        "router='top' is not known; choose one of whitened, eigen, softmax, switch, loss_free, s"
    )
    with pytest.raises(ValueError, match=words):
        router_class("top")


def test_only_expert_choice_looks_ahead():
    assert [name for name, router in ROUTERS.items() if not router.CAUSAL] == ["expert_choice"]


def test_the_contract_itself_routes_nothing():
    with pytest.raises(NotImplementedError):
        Router()(jnp.ones((1, D)), Context(jnp.ones((1, 1), bool)))
    state = {"bias": jnp.ones((E,))}
    assert Router.update(MoEConfig(), state, {}, jnp.zeros(())) is state


VALUES = {
    "temperature": 2.0,
    "score": "softmax",
    "renormalize": True,
    "balance_weight": 0.1,
    "z_weight": 0.1,
    "bias_rate": 0.1,
    "offset": False,
    "subspace": "fixed",
    "whitening": 0.5,
    "orthogonality_weight": 0.1,
    "acausal": True,
}


@pytest.mark.parametrize("name", ROUTERS)
def test_options_that_a_router_does_not_read_are_refused(name):
    assert set(RouterConfig(**VALUES).given()) == set(VALUES)
    reads = ROUTERS[name].OPTIONS
    for option, value in VALUES.items():
        if option in reads:
            build(name, **{option: value})
            continue
        words = (
            f"routing.{option}={value!r} is set, but the router {name!r} does not read it; set it"
            f" to None (it reads {', '.join(sorted(reads)) or 'no option'})"
        )
        with pytest.raises(ValueError, match=re.escape(words)):
            build(name, **{option: value})


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_of_a_batch_is_the_routing_of_its_halves(name):
    router = build(name)
    tokens, mask = draw((B, S, D)), jnp.ones((B, S), bool).at[1, 1:].set(False)
    ids = jnp.arange(B * S, dtype=jnp.int32).reshape(B, S)
    rows, key = jnp.arange(B, dtype=jnp.int32), jax.random.key(3)

    @jax.jit
    def route(tokens, mask, ids, rows):
        return router(tokens.reshape(-1, D), Context(mask, ids, rows, key))

    whole = route(tokens, mask, ids, rows)
    parts = [route(tokens[i], mask[i], ids[i], rows[i]) for i in (slice(0, 2), slice(2, 4))]
    summed = jax.tree.map(lambda a, b: a + b, parts[0].stats, parts[1].stats)
    chex.assert_trees_all_close(summed, whole.stats, rtol=1e-5, atol=1e-5)
    joined = jnp.concatenate([part.probs for part in parts])
    chex.assert_trees_all_close(joined, whole.probs, rtol=1e-6, atol=1e-8)
    if isinstance(whole, ExpertChoice):
        taken = [parts[0].tokens, parts[1].tokens + 2 * S]
        chex.assert_trees_all_equal(jnp.concatenate(taken, axis=1), whole.tokens)
        return
    joined = jnp.concatenate([part.indices for part in parts])
    chex.assert_trees_all_equal(joined, whole.indices)
    assert whole.indices.dtype == jnp.int32
    assert whole.weights.dtype == whole.probs.dtype == jnp.float32
    assert np.all(np.diff(np.sort(np.asarray(whole.indices), axis=1), axis=1) > 0)
    assert float(jnp.sum(whole.stats["load"])) == (B * S - 2) * whole.indices.shape[1]
