"""The balanced eigenbasis router: the theorem, its state, and what it refuses to be broken by."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from emoe_jax import basis as bases
from emoe_jax import pure
from emoe_jax.config import BasisConfig, MoEConfig, RouterConfig
from emoe_jax.metrics import energy_captured, max_violation
from emoe_jax.routers import Context, RouterState, WhitenedRouter, make_router
from emoe_jax.routers.offset import rates
from tests.routers.updates import after_batches

pytestmark = pytest.mark.usefixtures("strict")

D, E, T = 8, 4, 20_000
START, END = jnp.zeros(()), jnp.ones(())


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def config(experts=E, top_k=1, rank=D, **options):
    return MoEConfig(
        router="whitened",
        experts=experts,
        top_k=top_k,
        basis=BasisConfig(rank=rank),
        routing=RouterConfig(**options),
    )


def state_of(router):
    return {k: v[...] for k, v in vars(router).items() if isinstance(v, RouterState)}


@functools.partial(jax.jit, static_argnames=("config", "updates"))
def settle(config, tokens, directions, updates=12):
    """Loads and routes of tokens [T,D] whose statistics have caught up."""
    graph, params, state = pure.split(make_router(config, tokens.shape[1], rngs=nnx.Rngs(0)))
    params = params | {"directions": directions}
    context = Context(jnp.ones((1, tokens.shape[0]), bool))

    def body(_, state):
        stats = graph.bind(params, state)(tokens, context).stats
        return WhitenedRouter.update(config, state, stats, END)

    state = jax.lax.fori_loop(0, updates, body, state)
    routing = graph.bind(params, state)(tokens, context)
    return routing.stats["load"], routing.indices


def directions(config, seed=0):
    R = config.basis.rank
    shape = (max(R, config.experts), min(R, config.experts))
    return bases.orthonormalize(draw(shape, seed))


FULL = config(whitening=0.5, offset=False)
"""Full whitening and no offset: what the theorem speaks of."""


# --- the theorem ------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    law=st.sampled_from(["normal", "student", "shell"]),
    some=st.sampled_from(
        [
            FULL,
            config(experts=D, top_k=3, whitening=0.5, offset=False),  # as many as directions
            config(top_k=2, rank=D - 3, subspace="fixed", whitening=0.5, offset=False),
        ]
    ),
)
@settings(max_examples=12)
def test_elliptical_tokens_of_any_mean_and_covariance_are_balanced(seed, law, some):
    rng = np.random.default_rng(seed)
    sphere = rng.standard_normal((T, D))
    if law == "student":  # t with 5 degrees of freedom: one radius for all coordinates
        sphere = sphere / np.sqrt(rng.chisquare(5, (T, 1)) / 5)
    if law == "shell":
        sphere = sphere / np.linalg.norm(sphere, axis=1, keepdims=True)
    scales = np.exp(rng.uniform(-1.5, 1.5, D))
    turn, _ = np.linalg.qr(rng.standard_normal((D, D)))
    tokens = jnp.asarray((sphere * scales) @ turn + rng.normal(size=D) * 3, jnp.float32)
    load, _ = settle(some, tokens, directions(some, seed))
    # Sampling error of a share of 1/2 in 20,000 tokens is 0.0035: five of them.
    np.testing.assert_allclose(np.asarray(load) / T, some.top_k / some.experts, atol=0.0175)


def test_without_whitening_the_same_tokens_are_not_balanced():
    plain = config(whitening=0.0, offset=False)
    tokens = draw((T, D)) * jnp.array([8.0, 1, 1, 1, 1, 1, 1, 1])[None, :]
    skew = jnp.eye(D)[:, :E] * 1.0
    # Expert 0 reads the long axis alone: its scores are spread eight times as wide.
    unbalanced, _ = settle(plain, tokens, skew)
    balanced, _ = settle(FULL, tokens, skew)
    assert float(max_violation(unbalanced)) > 0.5
    assert float(max_violation(balanced)) < 0.05


def test_a_frame_of_more_experts_than_directions_is_balanced_by_the_offset():
    wide = config(experts=12, top_k=2, rank=4)
    tokens = draw((T, D)) @ jnp.diag(jnp.arange(1.0, D + 1.0))
    load, _ = settle(wide, tokens, directions(wide), updates=150)
    assert float(max_violation(load)) < 0.02


def test_what_is_not_elliptical_the_offset_takes_up():
    tokens = jnp.exp(1.5 * draw((T, D)))
    without, _ = settle(FULL, tokens, directions(FULL))
    with_offset = config(whitening=0.5)
    load, _ = settle(with_offset, tokens, directions(FULL), updates=150)
    assert float(max_violation(without)) > 0.1
    assert float(max_violation(load)) < 0.02


@given(
    seed=st.integers(0, 1000),
    scale=st.floats(0.05, 20.0),
    shift=st.floats(-10.0, 10.0),
    rank=st.sampled_from([D, D - 1]),  # with D directions the basis stays as it is
)
@settings(max_examples=8)
def test_shift_and_scale_of_all_tokens_change_no_route(seed, scale, shift, rank):
    # Without the offset, which forgets its first update, that knows no mean, only by and by.
    some = config(offset=False, rank=rank)
    tokens = draw((500, D), seed)
    moved = jnp.float32(scale) * tokens + jnp.float32(shift)
    routes = [settle(some, x, directions(some))[1] for x in (tokens, moved)]
    assert np.mean(np.asarray(routes[0] == routes[1])) > 0.99  # but for ties by rounding


def test_the_offset_of_other_tokens_is_forgotten():
    # With the offset, whose first update knows no mean, a shift shows until that is forgotten.
    tokens = draw((500, D))
    moved = 3.0 * tokens + 2.0
    routes = [settle(config(), x, directions(config()), updates=200)[1] for x in (tokens, moved)]
    assert np.mean(np.asarray(routes[0] == routes[1])) > 0.98


def test_an_invertible_map_keeps_the_loads_of_elliptical_tokens():
    tokens = draw((T, D))
    mapped = tokens @ (draw((D, D), 5) + 2 * jnp.eye(D))
    loads = [settle(FULL, x, directions(FULL))[0] / T for x in (tokens, mapped)]
    np.testing.assert_allclose(loads[0], loads[1], atol=0.0155)


def test_full_whitening_leaves_of_an_invertible_map_a_rotation():
    # Of tokens of any law: the products of whitened tokens with each other stay as they are.
    some, tokens = config(whitening=0.5), jnp.exp(0.5 * draw((400, D)))
    grams = []
    for seen in (tokens, tokens @ (draw((D, D), 5) + 4 * jnp.eye(D))):
        state, _ = after(some, seen, steps=1)
        white = (seen - state["mean"][None, :]) @ state["basis"] @ state["whitener"]
        grams.append(white @ white.T)
    # But for the ridge of a thousandth.
    np.testing.assert_allclose(grams[0], grams[1], atol=0.02 * float(jnp.max(grams[0])))


def test_permuting_experts_permutes_loads():
    order = np.array([2, 0, 3, 1])
    tokens = jnp.asarray(np.random.default_rng(0).exponential(size=(2000, D)), jnp.float32)
    columns = directions(FULL)
    load, routes = settle(FULL, tokens, columns)
    permuted, other = settle(FULL, tokens, columns[:, order])
    np.testing.assert_array_equal(permuted, np.asarray(load)[order])
    np.testing.assert_array_equal(order[np.asarray(other)], routes)


# --- one step -----------------------------------------------------------------------------------


def test_scores_by_hand():
    router = make_router(config(experts=2, rank=2, whitening=0.5), 3, rngs=nnx.Rngs(0))
    router.basis[...] = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    router.mean[...] = jnp.array([1.0, 1.0, 1.0])
    router.whitener[...] = jnp.array([[0.5, 0.0], [0.0, 2.0]])
    router.directions[...] = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    router.offset[...] = jnp.array([0.25, -0.25])
    router.log_temperature[...] = jnp.zeros(())
    # z = (2, 1) and u = (1, 2): expert 0 reads the second direction, expert 1 the first.
    routing = router(jnp.array([[3.0, 2.0, 9.0]]), Context(jnp.ones((1, 1), bool)))
    chex.assert_trees_all_close(routing.probs[0], jax.nn.softmax(jnp.array([2.25, 0.75])))
    assert routing.indices.tolist() == [[0]]
    stats = routing.stats
    chex.assert_trees_all_equal(stats["token_sum"], jnp.array([2.0, 1.0, 8.0]))
    chex.assert_trees_all_equal(stats["z_gram"], jnp.array([[4.0, 2.0], [2.0, 1.0]]))
    chex.assert_trees_all_equal(stats["image_sum"], jnp.array([[4.0, 2.0], [2.0, 1.0], [16.0, 8]]))


def test_the_basis_finds_the_principal_subspace_and_stays_orthonormal():
    some = config(rank=2)
    # Variances 9 and 4 along two axes, 1/4 along the others.
    tokens = draw((4000, D)) * jnp.array([0.5, 3, 0.5, 0.5, 2, 0.5, 0.5, 0.5])[None, :]
    router = make_router(some, D, rngs=nnx.Rngs(0))
    context = Context(jnp.ones((1, 4000), bool))
    for _ in range(60):
        stats = router(tokens, context).stats
        for name, value in WhitenedRouter.update(some, state_of(router), stats, END).items():
            getattr(router, name)[...] = value
    assert float(bases.orthonormality_error(router.basis[...])) < 1e-5
    principal = jnp.zeros((D, 2)).at[1, 0].set(1.0).at[4, 1].set(1.0)
    assert float(bases.drift(principal, router.basis[...])) < 0.05
    assert float(energy_captured(router(tokens, context).stats)) == pytest.approx(
        13 / 14.5, abs=0.02
    )


def test_running_moments_are_those_of_the_weighted_tokens():
    # The mean moves by one from batch to batch: its drift belongs to the covariance.
    some = config(subspace="fixed", offset=False)
    graph, params, state = pure.split(make_router(some, D, rngs=nnx.Rngs(0)))
    state = state | {"basis": jnp.eye(D)}
    weights, seen = [], []
    for number in range(6):
        tokens = draw((40, D), number) + number
        stats = graph.bind(params, state)(tokens, Context(jnp.ones((1, 40), bool))).stats
        rate = float(rates(state["updates"], START).statistics)
        state = WhitenedRouter.update(some, state, stats, START)
        weights = [weight * (1 - rate) for weight in weights] + [rate]
        seen.append(np.asarray(tokens, np.float64))
    shares = np.repeat(weights, 40) / 40
    together = np.concatenate(seen)
    np.testing.assert_allclose(state["mean"], shares @ together, rtol=1e-5)
    expected = np.cov(together, rowvar=False, aweights=shares, ddof=0)
    np.testing.assert_allclose(state["covariance"], expected, rtol=1e-4)


def test_a_route_depends_on_no_other_token():
    router = make_router(config(top_k=2), D, rngs=nnx.Rngs(0))
    tokens = draw((6, D))
    whole = router(tokens, Context(jnp.ones((1, 6), bool)))
    first = router(tokens[:3], Context(jnp.ones((1, 3), bool)))
    chex.assert_trees_all_equal(whole.indices[:3], first.indices)
    chex.assert_trees_all_close(whole.weights[:3], first.weights, rtol=1e-6)


def test_gradients_reach_tokens_directions_and_temperature_and_no_statistics():
    router = make_router(config(top_k=2, rank=D - 1), D, rngs=nnx.Rngs(0))
    graph, params, state = pure.split(router)
    context = Context(jnp.ones((1, 6), bool))

    def loss(params, state, tokens):
        routing = graph.bind(params, state)(tokens, context)
        return jnp.sum(routing.weights[:, 0] * jnp.arange(6.0))

    # The state is no parameter: a training step takes no gradient of it.
    grads = jax.grad(loss, argnums=(0, 2))(params, state, draw((6, D)))
    assert set(grads[0]) == {"directions", "log_temperature"}
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))

    # The statistics pass no gradient.
    def counted(tokens):
        stats = router(tokens, context).stats
        return sum(jnp.sum(stats[name]) for name in ("z_gram", "image_sum", "token_square"))

    assert not np.any(np.asarray(jax.grad(counted)(draw((6, D)))))


def routed(subspace, rank):
    """Probabilities by a router with some state, the same by plain products, and its parameters."""
    router = make_router(config(subspace=subspace, rank=rank), D, rngs=nnx.Rngs(0))
    graph, params, state = pure.split(router)
    state = state | {
        "mean": draw((D,)),
        "whitener": draw((rank, rank), 1),
        "offset": draw((E,), 2),
    }

    def probs(params, tokens, mask):
        return graph.bind(params, state)(tokens, Context(mask[None])).probs

    def plain(params, tokens, mask):
        directions = params["directions"]
        if rank < E:  # a frame
            directions = directions.T * jnp.float32((E / rank) ** 0.5)
        good = mask & jnp.all(jnp.isfinite(tokens), axis=-1)
        centred = jnp.where(good[:, None], tokens - state["mean"][None, :], 0.0)
        scores = centred @ (params | state)["basis"] @ state["whitener"] @ directions
        scores = scores + state["offset"][None, :]
        return jax.nn.softmax(scores / jnp.exp(params["log_temperature"]))

    return probs, plain, params


RANKS = [D, D - 2, E, E - 1]


@pytest.mark.parametrize("subspace", ["fixed", "learned"])
@pytest.mark.parametrize("rank", RANKS)
def test_gradients_are_those_of_the_chain_rule(subspace, rank):
    """In whatever order the router multiplies, with padding and a token that is not finite."""
    probs, plain, params = routed(subspace, rank)
    tokens = draw((6, D), 3).at[1, 2].set(jnp.inf)
    mask = jnp.array([True, True, True, False, True, True])
    expected, pull = jax.vjp(lambda *args: plain(*args, mask), params, tokens)
    found, pull_found = jax.vjp(lambda *args: probs(*args, mask), params, tokens)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    cotangent = draw((6, E), 4)
    gradients = pull_found(cotangent)
    chex.assert_trees_all_close(gradients, pull(cotangent), rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(gradients[1])[[1, 3]])


@pytest.mark.parametrize("rank", RANKS)
def test_inside_somebodys_shard_map_gradients_are_those_of_all_tokens(rank):
    probs, plain, params = routed("fixed", rank)
    tokens, mask = draw((8, D), 3), jnp.ones(8, bool)
    types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("rows", "more"), axis_types=types, devices=jax.devices()[:4])

    def loss(function, params, tokens, mask):
        return jnp.sum(jnp.sin(3 * function(params, tokens, mask)))

    rows, whole = PartitionSpec(("rows", "more")), PartitionSpec()
    spread = jax.shard_map(
        lambda *args: jax.lax.psum(loss(probs, *args), ("rows", "more")),
        mesh=mesh,
        in_specs=(whole, rows, rows),
        out_specs=whole,
    )
    found = jax.jit(jax.value_and_grad(spread, (0, 1)))(params, tokens, mask)
    expected = jax.value_and_grad(functools.partial(loss, plain), (0, 1))(params, tokens, mask)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_learned_basis_is_a_parameter():
    learned = make_router(config(subspace="learned"), D, rngs=nnx.Rngs(0))
    assert set(pure.split(learned)[1]) == {"basis", "directions", "log_temperature"}
    assert not {"basis", "image"} & set(state_of(learned))


@pytest.mark.parametrize(
    "some", [config(subspace="fixed", rank=3), config(rank=D)], ids=["fixed", "whole"]
)
def test_a_basis_that_is_fixed_or_of_the_whole_space_never_moves(some):
    router = make_router(some, D, rngs=nnx.Rngs(0))
    stats = router(draw((50, D)), Context(jnp.ones((1, 50), bool))).stats
    assert "image_sum" not in stats
    state = state_of(router)
    # Of a checkpoint it may be anything.
    state |= {"image": draw((D, D))} if "image" in state else {}
    new = WhitenedRouter.update(some, state, stats, START)
    assert set(new) == set(state)
    for name in {"basis", "image"} & set(state):
        chex.assert_trees_all_equal(new[name], state[name])


def test_a_training_pass_of_its_own_prepares_the_directions():
    router = make_router(config(subspace="learned"), D, rngs=nnx.Rngs(0))
    tokens, mask = draw((6, D)), jnp.ones((1, 6), bool)
    expected = router(tokens, Context(mask)).probs
    router.directions[...] = 3.0 * router.directions[...]
    router.basis[...] = 2.0 * router.basis[...]
    chex.assert_trees_all_close(
        router(tokens, Context(mask, train=True)).probs, expected, rtol=1e-5
    )


# --- bad data -------------------------------------------------------------------------------------


def after(config, tokens, steps=3):
    """State and routing after some updates with the same tokens."""
    router = make_router(config, tokens.shape[1], rngs=nnx.Rngs(0))
    context = Context(jnp.ones((1, tokens.shape[0]), bool))
    for _ in range(steps):
        stats = router(tokens, context).stats
        for name, value in WhitenedRouter.update(config, state_of(router), stats, START).items():
            getattr(router, name)[...] = value
    return state_of(router), router(tokens, context)


@pytest.mark.parametrize("whitening", [0.0, 0.25, 0.5])
@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(np.full((20, D), 3.0, np.float32), id="constant"),
        pytest.param(np.zeros((20, D), np.float32), id="zero"),
        pytest.param(np.outer(np.arange(20.0), np.ones(D)).astype(np.float32), id="rank one"),
        pytest.param(np.ones((1, D), np.float32), id="one token"),
        pytest.param(np.full((20, D), 1e30, np.float32), id="huge"),
        pytest.param(np.full((20, D), 1e-30, np.float32), id="tiny"),
    ],
)
def test_degenerate_tokens_leave_everything_finite(tokens, whitening):
    state, routing = after(config(whitening=whitening, rank=D - 1), jnp.asarray(tokens))
    chex.assert_tree_all_finite(state)
    chex.assert_tree_all_finite((routing.weights, routing.probs))
    assert float(bases.orthonormality_error(state["basis"])) < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_one_bad_token_is_left_out_of_the_statistics(bad):
    tokens = draw((20, D))
    spoilt = jnp.concatenate([tokens, jnp.full((1, D), bad)])
    clean, _ = after(config(rank=D - 1), tokens)
    state, routing = after(config(rank=D - 1), spoilt)
    chex.assert_trees_all_close(state, clean, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(routing.weights))


@pytest.mark.parametrize("rank", [D, D - 2])
@pytest.mark.parametrize("far", [1e3, 1e8, 1e15])
def test_one_far_token_is_soon_forgotten(far, rank):
    some, tokens = config(rank=rank), draw((200, D))
    spoilt = tokens.at[3].mul(far)
    state = after_batches(some, [tokens] * 3 + [spoilt] + [tokens] * 3)
    clean = after_batches(some, [tokens] * 7)
    # Of 200 tokens one counts as 100 deviations: at a rate of 0.28 as 14 times the variance.
    assert float(jnp.sum(state["spectrum"])) < 20 * float(jnp.sum(clean["spectrum"]))
    assert float(bases.orthonormality_error(state["basis"])) < 1e-5


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_what_moves_all_tokens_is_followed(scale):
    some, tokens = config(), draw((200, D))
    moved = scale * tokens + scale
    state = after_batches(some, [tokens] * 3 + [moved] * 100)
    clean = after_batches(some, [moved] * 100)
    chex.assert_trees_all_close(state["spectrum"], clean["spectrum"], rtol=1e-3)


def test_a_far_token_is_routed_as_it_is_and_counts_as_one_that_is_nearer():
    # Two directions of variance 1: 100 deviations are 100 sqrt(2); z is (2000, 0) and (0, 1).
    router = make_router(config(experts=2, rank=2), 3, rngs=nnx.Rngs(0))
    router.basis[...] = jnp.eye(3)[:, :2]
    router.updates[...] = jnp.ones(())
    tokens = jnp.array([[2000.0, 0.0, 2000.0], [0.0, 1.0, 0.0]])
    stats = router(tokens, Context(jnp.ones((1, 2), bool))).stats
    near = 100 * 2**0.5
    chex.assert_trees_all_close(stats["token_sum"], jnp.array([near, 1.0, near]), rtol=1e-6)
    chex.assert_trees_all_close(stats["z_gram"], jnp.diag(jnp.array([near**2, 1.0])), rtol=1e-6)
    gram = jnp.zeros((3, 2)).at[0, 0].set(near**2).at[2, 0].set(near**2).at[1, 1].set(1.0)
    chex.assert_trees_all_close(stats["image_sum"], gram, rtol=1e-6)
    apart = [router(row[None], Context(jnp.ones((1, 1), bool))).probs for row in tokens]
    router.updates[...] = jnp.zeros(())  # without limit
    free = router(tokens, Context(jnp.ones((1, 2), bool)))
    chex.assert_trees_all_close(free.probs, jnp.concatenate(apart), rtol=1e-6)
    assert float(free.stats["z_gram"][0, 0]) == 2000.0**2


def test_padding_is_in_no_statistic():
    router = make_router(config(), D, rngs=nnx.Rngs(0))
    tokens = draw((6, D))
    mask = jnp.array([[True, True, False], [True, False, True]])
    real = np.asarray(mask).reshape(-1)
    padded = router(tokens, Context(mask)).stats
    alone = router(tokens[real], Context(jnp.ones((1, 4), bool))).stats
    chex.assert_trees_all_close(padded, alone, rtol=1e-6, atol=1e-6)


def test_a_batch_of_padding_alone_moves_nothing():
    router = make_router(config(), D, rngs=nnx.Rngs(0))
    stats = router(draw((6, D)), Context(jnp.zeros((2, 3), bool))).stats
    new = WhitenedRouter.update(config(), state_of(router), stats, START)
    chex.assert_trees_all_equal(new, state_of(router))


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (2, 2), (256, 8), (5, 3)])
def test_any_number_of_experts(experts, top_k):
    some = config(experts=experts, top_k=top_k)
    state, routing = after(some, draw((30, D)))
    assert routing.indices.shape == (30, top_k)
    chex.assert_tree_all_finite((state, routing.weights))
    load, _ = settle(some, draw((4000, D)), directions(some), updates=100)
    assert float(max_violation(load)) < 0.1


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ValueError, match=r"basis.rank=9 is more than width=8.*to 8 or less"):
        make_router(config(rank=9), D, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("value", [-0.1, 0.6])
def test_a_power_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=f"routing.whitening={value} must lie between 0"):
        RouterConfig(whitening=value)


def test_an_unknown_subspace_is_refused():
    with pytest.raises(ValueError, match=r"routing.subspace='best' is not known; choose one of tr"):
        RouterConfig(subspace="best")
