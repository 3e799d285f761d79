"""Linear routers: losses computed by hand, the loss-free bias."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax.config import MoEConfig, RouterConfig
from emoe_jax.routers import Context, LossFreeRouter, RouterState, make_router
from emoe_jax.routers.softmax import balance_loss, z_loss

pytestmark = pytest.mark.usefixtures("strict")

LN3 = math.log(3)
# With the identity as kernel tokens are logits: p = (3/4, 1/4) three times, then (1/4, 3/4).
TOKENS = jnp.array([[LN3, 0.0], [LN3, 0.0], [LN3, 0.0], [0.0, LN3]])
MASK = jnp.ones((2, 2), bool)
START = jnp.zeros(())


def build(name, kernel=None, top_k=1, **options):
    E = 2 if kernel is None else kernel.shape[1]
    config = MoEConfig(router=name, experts=E, top_k=top_k, routing=RouterConfig(**options))
    router = make_router(config, E, rngs=nnx.Rngs(0))
    router.kernel = nnx.Param(jnp.eye(E) if kernel is None else kernel)
    return router


def route(router, tokens=TOKENS, mask=MASK):
    return jax.jit(lambda t, m: router(t, Context(m)))(tokens, mask)


def test_gates_are_the_largest_probabilities():
    routing = route(build("softmax"))
    chex.assert_trees_all_equal(routing.indices, jnp.array([[0], [0], [0], [1]], jnp.int32))
    chex.assert_trees_all_close(routing.weights, jnp.full((4, 1), 0.75), rtol=1e-6)
    assert float(routing.aux_loss) == 0.0
    both = route(build("softmax", top_k=2))
    chex.assert_trees_all_close(both.weights, jnp.array([[0.75, 0.25]] * 4), rtol=1e-6)


def test_temperature_divides_the_scores():
    # τ = 1/2 squares the odds: 9 to 1.
    routing = route(build("softmax", temperature=0.5))
    chex.assert_trees_all_close(routing.weights, jnp.full((4, 1), 0.9), rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "switch", "loss_free"])
def test_renormalized_gates_sum_to_one(name):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4), np.float32))
    tokens = jnp.eye(4)
    plain = route(build(name, kernel, 2), tokens)
    unit = route(build(name, kernel, 2, renormalize=True), tokens)
    chex.assert_trees_all_close(jnp.sum(unit.weights, axis=1), jnp.ones((4,)), rtol=1e-6)
    total = jnp.sum(plain.weights, axis=1, keepdims=True)
    chex.assert_trees_all_close(unit.weights, plain.weights / total, rtol=1e-6)
    assert not np.allclose(total, 1.0)


def test_switch_loss_by_hand():
    # f = (3/4, 1/4); P = ((3·3/4 + 1/4)/4, …) = (5/8, 3/8); 2·(15/32 + 3/32) = 9/8.
    assert float(route(build("switch")).aux_loss) == pytest.approx(0.01 * 1.125, rel=1e-6)
    weighed = route(build("switch", balance_weight=2.0))
    assert float(weighed.aux_loss) == pytest.approx(2.25, rel=1e-6)
    assert float(route(build("switch", balance_weight=0.0)).aux_loss) == 0.0


def test_switch_loss_without_padding_by_hand():
    # Without the last token: f = (1, 0), P = (3/4, 1/4), 2·3/4 = 3/2.
    routing = route(build("switch"), mask=jnp.array([[True, True], [True, False]]))
    assert float(routing.aux_loss) == pytest.approx(0.015, rel=1e-6)


def test_balance_loss_is_one_at_balance_and_shares_count_all_choices():
    uniform, real = jnp.full((4, 2), 0.5), jnp.ones((4,), bool)
    even = jnp.array([[0], [1], [0], [1]], jnp.int32)
    assert float(balance_loss(uniform, even, real)) == pytest.approx(1.0)
    both = jnp.array([[0, 1]] * 4, jnp.int32)
    skewed = jnp.array([[0.9, 0.1]] * 4)
    assert float(balance_loss(skewed, both, real)) == pytest.approx(1.0)


def test_balance_loss_has_the_gradient_of_the_mean_probability():
    # d/dp[t,k] = E f_k / T: (2·3/4/4, 2·1/4/4), and none through f.
    probs = jax.nn.softmax(TOKENS)
    indices = jnp.argmax(probs, axis=1)[:, None].astype(jnp.int32)
    gradient = jax.grad(balance_loss)(probs, indices, jnp.ones((4,), bool))
    chex.assert_trees_all_close(gradient, jnp.array([[0.375, 0.125]] * 4), rtol=1e-6)
    gradient = jax.grad(balance_loss)(probs, indices, jnp.array([True, False, False, True]))
    chex.assert_trees_all_close(gradient[:2], jnp.array([[0.5, 0.5], [0.0, 0.0]]), rtol=1e-6)


def test_z_loss_by_hand():
    # logsumexp = ln(3 + 1) for every token, and ln 2 of a padded (0,0) must not count.
    expected = math.log(4) ** 2
    assert float(z_loss(TOKENS, jnp.ones((4,), bool))) == pytest.approx(expected, rel=1e-6)
    padded = TOKENS.at[0].set(0.0)
    real = jnp.array([False, True, True, True])
    assert float(z_loss(padded, real)) == pytest.approx(expected, rel=1e-6)
    assert float(route(build("softmax", z_weight=0.5)).aux_loss) == pytest.approx(expected / 2)
    mixed = route(build("switch", z_weight=0.5)).aux_loss
    assert float(mixed) == pytest.approx(expected / 2 + 0.01125, rel=1e-6)


def test_z_loss_gradient_by_hand():
    # d/ds of lse² = 2 lse p, averaged over 4 tokens.
    gradient = jax.grad(z_loss)(TOKENS, jnp.ones((4,), bool))
    expected = 2 * math.log(4) * jax.nn.softmax(TOKENS) / 4
    chex.assert_trees_all_close(gradient, expected, rtol=1e-5)


def with_bias(bias, **options):
    router = build("loss_free", **options)
    router.bias = RouterState(jnp.asarray(bias))
    return router


def test_loss_free_bias_turns_the_choice_and_not_the_gate():
    # sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2; a bias above 1/4 on expert 1 turns the choice.
    plain = route(with_bias([0.0, 0.0]))
    chex.assert_trees_all_equal(plain.indices[:, 0], jnp.array([0, 0, 0, 1]))
    chex.assert_trees_all_close(plain.weights, jnp.full((4, 1), 0.75), rtol=1e-6)
    chex.assert_trees_all_close(plain.probs[0], jnp.array([0.6, 0.4]), rtol=1e-6)
    turned = route(with_bias([0.0, 0.3]))
    chex.assert_trees_all_equal(turned.indices[:, 0], jnp.array([1, 1, 1, 1]))
    expected = jnp.array([[0.5], [0.5], [0.5], [0.75]])
    chex.assert_trees_all_close(turned.weights, expected, rtol=1e-6)
    softmax = route(with_bias([0.0, 0.6], score="softmax"))
    expected = jnp.array([[0.25], [0.25], [0.25], [0.75]])
    chex.assert_trees_all_close(softmax.weights, expected, rtol=1e-6)


def test_loss_free_bias_is_state_and_no_parameter():
    router = with_bias([0.0, 0.0])
    _, params, state = nnx.split(router, nnx.Param, RouterState)
    assert list(params) == ["kernel"]
    assert list(state) == ["bias"]
    assert float(route(router).aux_loss) == 0.0


def test_loss_free_update_raises_the_idle_and_lowers_the_busy():
    config = MoEConfig(router="loss_free", experts=3)
    # Mean load 2: expert 0 is above, 1 at it, 2 below.
    stats = {"load": jnp.array([3.0, 2.0, 1.0])}
    new = LossFreeRouter.update(config, {"bias": jnp.array([0.5, 0.5, 0.5])}, stats, START)
    chex.assert_trees_all_close(new, {"bias": jnp.array([0.499, 0.5, 0.501])}, rtol=1e-6)


def test_loss_free_update_works_on_stacked_layers_at_the_given_rate():
    config = MoEConfig(router="loss_free", experts=2, routing=RouterConfig(bias_rate=0.25))
    stats = {"load": jnp.array([[4.0, 0.0], [0.0, 4.0], [2.0, 2.0]])}
    new = LossFreeRouter.update(config, {"bias": jnp.zeros((3, 2))}, stats, START)
    expected = jnp.array([[-0.25, 0.25], [0.25, -0.25], [0.0, 0.0]])
    chex.assert_trees_all_equal(new, {"bias": expected})


def test_loss_free_gradients_are_those_of_the_gates():
    # dσ = σ(1 - σ): 3/16 at ln 3, times the token, for the chosen expert's column alone.
    router = with_bias([0.0, 0.0])
    graph, params, state = nnx.split(router, nnx.Param, RouterState)

    def loss(params):
        return jnp.sum(nnx.merge(graph, params, state)(TOKENS, Context(MASK)).weights)

    gradient = jax.jit(jax.grad(loss))(params)["kernel"][...]
    expected = 3 / 16 * jnp.array([[3 * LN3, 0.0], [0.0, LN3]])
    chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-7)
