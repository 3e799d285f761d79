"""The offset: its curvature, its rates, what it does to loads; and the linear router with it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax import pure
from emoe_jax.config import MoEConfig, RouterConfig
from emoe_jax.metrics import max_violation
from emoe_jax.routers import Context, RouterState, make_router
from emoe_jax.routers.offset import (
    SoftmaxOffsetRouter,
    accept,
    choose_by_offset,
    curvature,
    move_offset,
    rates,
    reach,
)
from tests.routers.updates import after_batches

pytestmark = pytest.mark.usefixtures("strict")

D, E = 6, 4
PLAIN = {"score": "softmax", "renormalize": False, "metrics": {}, "stats": {}}
START, END = jnp.zeros(()), jnp.ones(())


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def test_curvature_of_two_experts_is_the_density_of_one_normal():
    # The other's score is the threshold: 2 E[phi(x)] = 2 / (2 sqrt(pi)).
    assert curvature(2, 1) == pytest.approx(1 / np.sqrt(np.pi), rel=1e-6)


def test_curvature_of_eight_experts_is_that_of_the_design():
    assert curvature(8, 1) == pytest.approx(1.42, abs=0.005)
    assert curvature(4, 4) == 0.0
    assert np.isfinite(curvature(256, 8))


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 3), (32, 2)])
def test_curvature_is_the_growth_of_a_load_with_its_offset(experts, k):
    scores = np.random.default_rng(0).standard_normal((400_000, experts))
    step = 0.05
    chosen = []
    for sign in (1, -1):
        moved = scores.copy()
        moved[:, 0] += sign * step
        threshold = np.partition(moved[:, 1:], -k, axis=1)[:, -k]
        chosen.append(np.mean(moved[:, 0] > threshold))
    slope = experts / k * (chosen[0] - chosen[1]) / (2 * step)
    assert curvature(experts, k) == pytest.approx(slope, rel=0.03)


def test_rates_average_at_first_and_follow_a_cosine_later():
    first = rates(jnp.zeros(()), START)
    assert (float(first.statistics), float(first.offset)) == (1.0, 0.5)
    late = rates(jnp.full((2,), 1e6), END)
    chex.assert_trees_all_close(
        tuple(late), (jnp.full((2,), 0.03), jnp.full((2,), 0.05)), rtol=1e-5
    )
    middle = rates(jnp.float32(1e6), jnp.float32(0.5))
    assert float(middle.statistics) == pytest.approx(0.03 + 0.125)
    assert float(middle.offset) == pytest.approx(0.05 + 0.1)


@pytest.mark.parametrize("updates", [60, 310, 1e6])
def test_rates_after_training_are_those_of_a_mean(updates):
    # What was before counts as 1/0.03 batches in the mean; the offset starts from 1/0.05 = 20 and
    # takes twice the step.
    fifth = rates(jnp.float32(updates), jnp.float32(1 + 5))
    assert float(fifth.statistics) == pytest.approx(1 / (1 / 0.03 + 5))
    assert float(fifth.offset) == pytest.approx(2 / (2 * 20 + 5))
    # Before there were as many, the mean is of all that was seen.
    assert float(rates(jnp.float32(9), jnp.float32(1 + 5)).statistics) == pytest.approx(1 / 10)


def test_the_offset_falls_for_the_busy_and_rises_for_the_idle():
    # Loads of 3, 1, 0, 0 of a mean of 1: the excess 2 is clipped to 1.
    moved = move_offset(jnp.zeros((4,)), jnp.array([3.0, 1.0, 0.0, 0.0]), jnp.float32(0.1), 1)
    step = 0.1 / curvature(4, 1)
    expected = np.array([-step, 0.0, step, step])
    chex.assert_trees_all_close(moved, expected - expected.mean(), rtol=1e-5)
    assert float(jnp.sum(moved)) == pytest.approx(0.0, abs=1e-6)


def test_the_offset_of_stacked_layers_moves_layer_by_layer():
    loads = jnp.array([[2.0, 0.0], [1.0, 1.0]])
    moved = move_offset(jnp.zeros((2, 2)), loads, jnp.array([0.1, 0.1]), 1)
    assert float(moved[0, 0]) < 0 < float(moved[0, 1])
    chex.assert_trees_all_equal(moved[1], jnp.zeros((2,)))


def test_an_offset_balances_scores_of_any_law():
    # Exponential scores of different scales and shifts: no expert is like another.
    rng = np.random.default_rng(0)
    scores = jnp.asarray(
        rng.exponential(size=(20_000, E)) * [0.5, 1.0, 1.5, 2.0] + [0.0, 1.0, 0.0, 0.5], jnp.float32
    )
    context = Context(jnp.ones((1, 20_000), bool))

    @jax.jit
    def load(offset):
        return choose_by_offset(
            scores, offset, START, context, k=2, **PLAIN, good=context.mask[0]
        ).stats["load"]

    offset = jnp.zeros((E,))
    assert float(max_violation(load(offset))) > 0.5
    for _ in range(200):
        offset = move_offset(offset, load(offset), jnp.float32(0.2), 2)
    assert float(max_violation(load(offset))) < 0.01


def test_gates_are_the_softmax_of_what_was_chosen():
    scores, offset = jnp.array([[1.0, 0.0, 0.5]]), jnp.array([0.0, 2.0, 0.0])
    context = Context(jnp.ones((1, 1), bool))
    routing = choose_by_offset(
        scores, offset, jnp.log(2.0), context, k=2, **PLAIN, good=context.mask[0]
    )
    probs = np.exp([0.5, 1.0, 0.25]) / np.sum(np.exp([0.5, 1.0, 0.25]))
    chex.assert_trees_all_close(routing.probs[0], probs, rtol=1e-6)
    chex.assert_trees_all_equal(routing.indices, jnp.array([[1, 0]], jnp.int32))
    chex.assert_trees_all_close(routing.weights[0], probs[[1, 0]], rtol=1e-6)
    assert float(routing.metrics["offset"]) == 2.0
    assert float(routing.metrics["temperature"]) == pytest.approx(2.0)


def test_sigmoid_gates_are_of_each_expert_alone_and_may_sum_to_more_than_one():
    scores, offset = jnp.array([[1.0, 0.0, 0.5]]), jnp.array([0.0, 2.0, 0.0])
    context = Context(jnp.ones((1, 1), bool))

    def route(scores, score="sigmoid"):
        return choose_by_offset(
            scores,
            offset,
            jnp.log(2.0),
            context,
            k=2,
            **PLAIN | {"score": score},
            good=context.mask[0],
        )

    routing = route(scores)
    gates = 1 / (1 + np.exp(-np.array([0.5, 1.0, 0.25])))
    chex.assert_trees_all_equal(routing.indices, route(scores, "softmax").indices)
    chex.assert_trees_all_close(routing.weights[0], gates[[1, 0]], rtol=1e-6)
    chex.assert_trees_all_close(routing.probs[0], gates / gates.sum(), rtol=1e-6)
    gradient = jax.grad(lambda scores: route(scores).weights[0, 0])(scores)
    assert gradient[0, 0] == gradient[0, 2] == 0.0
    chex.assert_trees_all_close(gradient[0, 1], gates[1] * (1 - gates[1]) / 2, rtol=1e-5)


@pytest.mark.parametrize("router", ["whitened", "softmax_offset"])
def test_the_routers_with_an_offset_read_the_kind_of_their_gates(router):
    tokens = draw((7, D))
    made = {
        score: make_router(
            MoEConfig(router=router, experts=E, top_k=2, routing=RouterConfig(score=score)),
            D,
            rngs=nnx.Rngs(0),
        )(tokens, Context(jnp.ones((1, 7), bool)))
        for score in ("softmax", "sigmoid")
    }
    chex.assert_trees_all_equal(made["softmax"].indices, made["sigmoid"].indices)
    shares = {
        score: routing.weights / jnp.take_along_axis(routing.probs, routing.indices, axis=1)
        for score, routing in made.items()
    }
    chex.assert_trees_all_close(shares["softmax"], jnp.ones((7, 2)), rtol=1e-6)
    assert np.all(np.abs(shares["sigmoid"] - 1.0) > 0.1)  # the sum of all gates


def test_a_layer_that_saw_nothing_or_no_number_keeps_its_state():
    old = {"mean": jnp.zeros((3, 2)), "updates": jnp.zeros((3,))}
    new = {"mean": jnp.array([[1.0, 2.0], [1.0, jnp.nan], [1.0, 2.0]]), "updates": jnp.ones((3,))}
    kept = accept(new, old, jnp.array([5.0, 5.0, 0.0]))
    chex.assert_trees_all_equal(kept["mean"], jnp.array([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))
    chex.assert_trees_all_equal(kept["updates"], jnp.array([1.0, 0.0, 0.0]))


def test_statistics_reach_a_hundred_deviations_and_without_limit_where_none_is_known():
    variance = jnp.array([4.0, 0.0])
    chex.assert_trees_all_equal(reach(variance, jnp.ones(())), jnp.array([200.0, jnp.inf]))
    chex.assert_trees_all_equal(reach(variance, jnp.zeros(())), jnp.full((2,), jnp.inf))


# --- the linear router ----------------------------------------------------------------------------


def config(**options):
    routing = RouterConfig(**options)
    return MoEConfig(router="softmax_offset", experts=E, top_k=1, routing=routing)


def train_state(router):
    return {k: v[...] for k, v in vars(router).items() if isinstance(v, RouterState)}


@given(scale=st.floats(0.1, 10.0), shift=st.floats(-5.0, 5.0), seed=st.integers(0, 100))
def test_standardised_scores_do_not_see_scale_and_shift(scale, shift, seed):
    tokens = draw((64, D), seed)
    base = route_after_batches(tokens)
    other = route_after_batches(jnp.float32(scale) * tokens + jnp.float32(shift))
    same = np.mean(np.asarray(base == other))
    assert same > 0.98  # but for ties by rounding


@jax.jit
def route_after_batches(tokens):
    graph, params, state = pure.split(make_router(config(), D, rngs=nnx.Rngs(0)))
    context = Context(jnp.ones((1, tokens.shape[0]), bool))
    for _ in range(3):
        stats = graph.bind(params, state)(tokens, context).stats
        stats = stats | {"counted_load": jnp.ones((E,))}
        state = SoftmaxOffsetRouter.update(config(), state, stats, END)
    return graph.bind(params, state)(tokens, context).indices


def test_statistics_are_those_of_the_scores():
    router = make_router(config(), D, rngs=nnx.Rngs(0))
    tokens = draw((50, D))
    stats = router(tokens, Context(jnp.ones((5, 10), bool))).stats
    new = SoftmaxOffsetRouter.update(config(), train_state(router), stats, START)
    raw = np.asarray(tokens) @ np.asarray(router.kernel[...])
    chex.assert_trees_all_close(new["mean"], raw.mean(0), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(new["variance"], raw.var(0), rtol=1e-4)
    assert float(new["updates"]) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_token_is_routed_as_the_mean_and_not_counted(bad):
    router = make_router(config(), D, rngs=nnx.Rngs(0))
    tokens = draw((3, D)).at[1, 2].set(bad)
    routing = router(tokens, Context(jnp.ones((1, 3), bool)))
    assert np.all(np.isfinite(routing.weights))
    assert float(routing.stats["counted"]) == 2.0
    new = SoftmaxOffsetRouter.update(config(), train_state(router), routing.stats, START)
    chex.assert_tree_all_finite(new)


@pytest.mark.parametrize("far", [1e3, 1e8, 1e15])
def test_one_far_token_is_soon_forgotten(far):
    some, tokens = config(), draw((200, D))
    spoilt = tokens.at[3].mul(far)
    state = after_batches(some, [tokens] * 3 + [spoilt] + [tokens] * 3)
    clean = after_batches(some, [tokens] * 7)
    # Of 200 scores one counts as 100 deviations: at a rate of 0.28 at most 14 variances.
    assert np.all(np.asarray(state["variance"]) < 20 * np.asarray(clean["variance"]))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_what_moves_all_tokens_is_followed(scale):
    some, tokens = config(), draw((200, D))
    state = after_batches(some, [tokens] * 3 + [scale * tokens + scale] * 100)
    clean = after_batches(some, [scale * tokens + scale] * 100)
    chex.assert_trees_all_close(state["variance"], clean["variance"], rtol=1e-3)
