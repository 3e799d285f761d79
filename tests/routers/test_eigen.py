"""The paper's router: by hand, against the released code's own numbers, and its bounds."""

import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import basis as bases
from emoe_jax.config import BasisConfig, MoEConfig, RouterConfig
from emoe_jax.metrics import energy_captured
from emoe_jax.routers import Context, EigenRouter
from emoe_jax.routers.eigen import energy_scores, moment_stats, orthogonality_penalty

pytestmark = pytest.mark.usefixtures("strict")

PARITY = Path(__file__).parents[1] / "data" / "eigen_parity.npz"


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def build(basis, masks, gamma, bias, top_k, **options):
    """A router with the given parameters."""
    (D, R), E = basis.shape, masks.shape[0]
    config = MoEConfig(
        router="eigen",
        experts=E,
        top_k=top_k,
        basis=BasisConfig(rank=R),
        routing=RouterConfig(**options),
    )
    router = EigenRouter(config, D, rngs=nnx.Rngs(0))
    values = {"basis": basis, "masks": masks, "gamma": gamma, "bias": bias}
    for name, value in values.items():
        setattr(router, name, nnx.Param(jnp.asarray(value)))
    return router


def route(router, tokens, mask=None):
    mask = jnp.ones((1, tokens.shape[0]), bool) if mask is None else mask
    return jax.jit(lambda t, m: router(t, Context(m)))(tokens, mask)


def test_one_token_step_by_step():
    # 1. Q keeps the first two of three dimensions: z = (1,2), Σz² = 5, e = (0.2, 0.8).
    basis = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], np.float32)
    token = jnp.array([[1.0, 2.0, 7.0]])
    # 2. Softmax over experts, for each direction: m = [[3/4, 1/2], [1/4, 1/2]].
    masks = np.array([[math.log(3), 0.0], [0.0, 0.0]], np.float32)
    # 3. s_0 = 2·3/4·0.2 + 1·1/2·0.8 = 0.7; s_1 = 2·1/4·0.2 + 1·1/2·0.8 + 0.1 = 0.6.
    gamma, bias = np.array([2.0, 1.0], np.float32), np.array([0.0, 0.1], np.float32)
    scores = energy_scores(token @ basis, jnp.asarray(masks), jnp.asarray(gamma), jnp.asarray(bias))
    np.testing.assert_allclose(scores, [[0.7, 0.6]], atol=1e-6)
    # 4. τ = 0.5: p = softmax(1.4, 1.2); the larger is the gate as it is.
    routing = route(build(basis, masks, gamma, bias, 1, temperature=0.5), token)
    high = 1 / (1 + math.exp(-0.2))
    np.testing.assert_allclose(routing.probs, [[high, 1 - high]], atol=1e-6)
    np.testing.assert_array_equal(routing.indices, [[0]])
    np.testing.assert_allclose(routing.weights, [[high]], atol=1e-6)


def test_a_zero_token_scores_the_bias_alone():
    scores = energy_scores(jnp.zeros((1, 2)), draw((3, 2)), jnp.ones(2), jnp.arange(3.0))
    np.testing.assert_allclose(scores, [[0.0, 1.0, 2.0]], atol=1e-7)


@pytest.mark.parametrize(("case", "top_k"), [("soft", 4), ("top1", 1), ("top2", 2)])
def test_parity_with_the_released_code(case, top_k):
    with np.load(PARITY) as stored:
        data = {k.split(".")[1]: v for k, v in stored.items() if k.startswith(case + ".")}
    router = build(
        *(data[name] for name in ("basis", "masks", "gamma", "bias")),
        top_k,
        temperature=float(data["temperature"]),
    )
    routing = route(router, jnp.asarray(data["input"]))
    np.testing.assert_allclose(routing.probs, data["probs"], rtol=0, atol=1e-5)
    if case == "soft":
        gates = np.take_along_axis(np.asarray(routing.probs), np.asarray(routing.indices), axis=1)
        np.testing.assert_allclose(routing.weights, gates, rtol=1e-6)
        np.testing.assert_array_equal(np.sort(routing.indices, axis=1), [[0, 1, 2, 3]] * 32)
        return
    np.testing.assert_allclose(routing.weights, data["weights"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(routing.indices, data["indices"])


def fresh(D=8, R=4, E=4, K=2, **options):
    config = MoEConfig(
        router="eigen",
        experts=E,
        top_k=K,
        basis=BasisConfig(rank=R),
        routing=RouterConfig(**options),
    )
    return EigenRouter(config, D, rngs=nnx.Rngs(0))


def test_a_new_router_is_orthonormal_and_its_parameters_start_as_in_the_paper():
    router = fresh()
    assert bases.orthonormality_error(router.basis[...]) < 1e-5
    chex.assert_trees_all_equal(router.gamma[...], jnp.ones((4,)))
    chex.assert_trees_all_equal(router.bias[...], jnp.zeros((4,)))
    chex.assert_shape(router.masks[...], (4, 4))


def test_no_gate_of_a_new_router_exceeds_the_papers_bound():
    # Scores lie in [0,1] where γ=1, b=0, τ=1: p ≤ e / (e + E - 1). Extreme masks come close.
    router = build(np.eye(8, 4, dtype=np.float32), 50 * np.eye(4), np.ones(4), np.zeros(4), 1)
    routing = route(router, jnp.concatenate([draw((50, 8)), jnp.eye(8)[:4]]))
    bound = math.e / (math.e + 3)
    assert float(jnp.max(routing.weights)) <= bound + 1e-6
    assert float(jnp.max(routing.weights)) == pytest.approx(bound, abs=1e-4)


def test_routes_do_not_depend_on_the_length_of_a_token():
    router, tokens = fresh(), draw((6, 8))
    chex.assert_trees_all_close(
        route(router, tokens).probs, route(router, 10 * tokens).probs, atol=1e-5
    )


def test_orthogonality_penalty_by_hand():
    # QᵀQ - I = [[0,1],[1,1]]: 0 + 1 + 1 + 1 = 3.
    basis = jnp.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert float(orthogonality_penalty(basis)) == pytest.approx(3.0)
    router = build(basis, np.zeros((2, 2)), np.ones(2), np.zeros(2), 1)
    assert float(route(router, draw((4, 3))).aux_loss) == pytest.approx(3 * 5e-4)
    router = build(basis, np.zeros((2, 2)), np.ones(2), np.zeros(2), 1, orthogonality_weight=0.1)
    routing = route(router, draw((4, 3)))
    assert float(routing.aux_loss) == pytest.approx(0.3)
    assert float(routing.metrics["orthonormality_error"]) == pytest.approx(1.0)


def test_the_penalty_of_an_orthonormal_basis_is_rounding():
    assert float(route(fresh(), draw((4, 8))).aux_loss) < 1e-12


def test_gradients_reach_every_parameter_and_match_differences():
    # Of the probabilities: the choice of the top K jumps under a finite step.
    router, tokens, cotangent = fresh(), draw((6, 8)), draw((6, 4), 1)
    graph, params = nnx.split(router)
    mask = jnp.ones((2, 3), bool)

    @jax.jit
    def loss(params):
        return jnp.sum(cotangent * nnx.merge(graph, params)(tokens, Context(mask)).probs)

    gradients = jax.jit(jax.grad(loss))(params)
    leaves, structure = jax.tree.flatten(params)
    for i, gradient in enumerate(jax.tree.leaves(gradients)):
        assert float(jnp.max(jnp.abs(gradient))) > 1e-4
        step = 1e-2 * draw(gradient.shape, i)

        def moved(sign, i=i, step=step):
            new = [leaf + sign * step if j == i else leaf for j, leaf in enumerate(leaves)]
            return loss(jax.tree.unflatten(structure, new))

        difference = float(moved(1.0) - moved(-1.0)) / 2
        slope = float(jnp.sum(gradient * step))
        assert slope == pytest.approx(difference, rel=5e-2, abs=2e-5)


def test_statistics_give_the_energy_captured():
    tokens, real = draw((40, 6)) + 1.0, jnp.arange(40) < 30
    basis = bases.qr(draw((6, 3), 1))
    stats = moment_stats(tokens, tokens @ basis, real) | {"tokens": jnp.float32(30)}
    covariance = np.cov(np.asarray(tokens)[:30].T, bias=True)
    expected = np.trace(basis.T @ covariance @ basis) / np.trace(covariance)
    assert float(energy_captured(stats)) == pytest.approx(float(expected), rel=1e-5)
