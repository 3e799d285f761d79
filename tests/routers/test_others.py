"""Expert choice, hash, random, soft."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax.config import MoEConfig
from emoe_jax.routers import Context, make_router

pytestmark = pytest.mark.usefixtures("strict")


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def build(name, experts, top_k, width=2, kernel=None):
    router = make_router(
        MoEConfig(router=name, experts=experts, top_k=top_k), width, rngs=nnx.Rngs(0)
    )
    if kernel is not None:
        router.kernel = nnx.Param(kernel)
    return router


def test_expert_choice_takes_the_best_of_each_sequence():
    # Two sequences of three tokens; the logits are (x, 0), so expert 0 ranks by x, 1 by -x. Each
    # takes ceil(3·1/2) = 2 of each sequence.
    router = build("expert_choice", 2, 1, kernel=jnp.eye(2))
    x = jnp.array([1.0, 3.0, 2.0, -1.0, 5.0, 0.0])
    tokens = jnp.stack([x, jnp.zeros((6,))], axis=1)
    choice = router(tokens, Context(jnp.ones((2, 3), bool)))
    chex.assert_trees_all_equal(choice.tokens, jnp.array([[1, 2, 4, 5], [0, 2, 3, 5]], jnp.int32))
    expected = jnp.stack(
        [jax.nn.sigmoid(x[choice.tokens[0]]), jax.nn.sigmoid(-x[choice.tokens[1]])]
    )
    chex.assert_trees_all_close(choice.weights, expected, rtol=1e-5)
    chex.assert_trees_all_equal(choice.stats["load"], jnp.array([4.0, 4.0]))
    assert float(choice.stats["tokens"]) == 6.0
    # Each token's largest gate: the expert that takes it, the better one of two.
    gates = [0.2689414, 0.9525741, 0.8807971, 0.7310586, 0.9933071, 0.5]
    assert float(choice.stats["gate"]) == pytest.approx(sum(gates), rel=1e-5)


@pytest.mark.parametrize(
    ("S", "E", "K", "taken"), [(1, 8, 1, 1), (3, 8, 2, 1), (8, 4, 1, 2), (8, 3, 1, 3), (2, 2, 2, 2)]
)
def test_expert_choice_takes_at_least_one_and_at_most_all(S, E, K, taken):
    router = build("expert_choice", E, K, width=3)
    choice = router(draw((2 * S, 3)), Context(jnp.ones((2, S), bool)))
    chex.assert_shape(choice.tokens, (E, 2 * taken))
    rows = np.asarray(choice.tokens) // S
    np.testing.assert_array_equal(rows, [[0] * taken + [1] * taken] * E)


def test_expert_choice_gives_padding_no_weight_and_counts_it_nowhere():
    router = build("expert_choice", 2, 1, width=3)
    mask = jnp.array([[True, False, False], [False, False, False]])
    choice = router(draw((6, 3)), Context(mask))
    weights, tokens = np.asarray(choice.weights), np.asarray(choice.tokens)
    assert np.all(weights[tokens != 0] == 0)
    assert np.all(weights[:, 0] > 0)
    np.testing.assert_array_equal(tokens[:, 0], [0, 0])
    chex.assert_trees_all_equal(choice.stats["load"], jnp.array([1.0, 1.0]))
    assert float(choice.stats["tokens"]) == 1.0


def test_expert_choice_gradient_is_that_of_the_gates():
    tokens, mask = draw((6, 3)), jnp.ones((2, 3), bool).at[1, 2].set(False)
    graph, params = nnx.split(build("expert_choice", 2, 1, width=3, kernel=draw((3, 2), 1)))
    cotangent = draw((2, 4), 2)
    chosen = nnx.merge(graph, params)(tokens, Context(mask)).tokens
    real = mask.reshape(-1)[chosen]

    def ours(params):
        return jnp.sum(cotangent * nnx.merge(graph, params)(tokens, Context(mask)).weights)

    def plain(params):
        probs = jax.nn.softmax(tokens @ params["kernel"][...])
        gates = jnp.stack([probs[chosen[e], e] for e in range(2)])
        return jnp.sum(jnp.where(real, cotangent * gates, 0.0))

    chex.assert_trees_all_close(jax.grad(ours)(params), jax.grad(plain)(params), rtol=1e-4)


def test_hash_is_a_function_of_the_id_alone():
    router = build("hash", 5, 2)
    ids = jnp.array([[7, 9, 7], [7, 1_000_000, 9]], jnp.int32)
    mask = jnp.ones((2, 3), bool)
    one = router(draw((6, 2)), Context(mask, ids=ids))
    two = router(draw((6, 2), 1), Context(mask, ids=ids, key=jax.random.key(0)))
    chex.assert_trees_all_equal(one, two)
    first = np.asarray(one.indices)
    np.testing.assert_array_equal(first[[0, 1]], first[[3, 5]])
    np.testing.assert_array_equal((first[:, 0] + 1) % 5, first[:, 1])
    chex.assert_trees_all_equal(one.weights, jnp.full((6, 2), 0.5))


def test_hash_spreads_neighbouring_ids_evenly():
    ids = jnp.arange(8000, dtype=jnp.int32).reshape(1, 8000)
    routing = build("hash", 8, 1)(jnp.zeros((8000, 2)), Context(jnp.ones((1, 8000), bool), ids=ids))
    # 1000 each, with a deviation of 30 were it random.
    assert float(jnp.max(jnp.abs(routing.stats["load"] - 1000))) < 120


def test_hash_needs_ids_and_random_needs_a_key():
    context = Context(jnp.ones((1, 2), bool))
    with pytest.raises(ValueError, match=r"hash router needs the tokens' ids; pass ids \[B,S\]"):
        build("hash", 4, 1)(jnp.ones((2, 2)), context)
    with pytest.raises(ValueError, match="random router needs a random key; pass key to the layer"):
        build("random", 4, 1)(jnp.ones((2, 2)), context)


def route_random(B, S, rows=None, seed=0, experts=4, top_k=2):
    router = build("random", experts, top_k)
    context = Context(jnp.ones((B, S), bool), rows=rows, key=jax.random.key(seed))
    return jax.jit(router.__call__)(jnp.zeros((B * S, 2)), context)


def test_random_choices_follow_the_row_in_the_global_batch():
    whole = route_random(4, 3).indices.reshape(4, 3, 2)
    order = jnp.array([2, 0], jnp.int32)
    part = route_random(2, 3, rows=order).indices.reshape(2, 3, 2)
    chex.assert_trees_all_equal(part, whole[order])
    assert not np.array_equal(whole[0], whole[1])
    assert not np.array_equal(whole, route_random(4, 3, seed=1).indices.reshape(4, 3, 2))


def test_random_experts_are_different_and_even():
    routing = route_random(50, 40)
    indices = np.asarray(routing.indices)
    assert np.all(indices[:, 0] != indices[:, 1])
    # 4000 assignments, 1000 an expert, deviation about 22.
    assert float(jnp.max(jnp.abs(routing.stats["load"] - 1000))) < 100
    chex.assert_trees_all_equal(routing.weights, jnp.full((2000, 2), 0.5))


def test_soft_uses_every_expert_with_its_probability():
    tokens = draw((5, 2))
    routing = build("soft", 3, 3, kernel=draw((2, 3), 1))(tokens, Context(jnp.ones((1, 5), bool)))
    chex.assert_trees_all_equal(routing.indices, jnp.array([[0, 1, 2]] * 5, jnp.int32))
    chex.assert_trees_all_close(
        routing.weights, jax.nn.softmax(tokens @ draw((2, 3), 1)), rtol=1e-5
    )
    chex.assert_trees_all_equal(routing.stats["load"], jnp.array([5.0, 5.0, 5.0]))


def test_soft_refuses_fewer_experts_than_all():
    words = "the soft router uses all experts=4, but top_k=2; set top_k to 4"
    with pytest.raises(ValueError, match=words):
        build("soft", 4, 2)
