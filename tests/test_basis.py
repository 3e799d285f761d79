"""Bases: one factor by every method, its sign, its derivative, its guard."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax import basis as bases

pytestmark = pytest.mark.usefixtures("strict")

FOLLOW = jax.jit(bases.follow)
QR, CHOLESKY_QR, ERROR = map(jax.jit, (bases.qr, bases.cholesky_qr, bases.orthonormality_error))
ORTHONORMALIZE = jax.jit(bases.orthonormalize, static_argnums=1)
SHAPES = ((1, 1), (4, 4), (9, 3), (2, 8, 5))


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def near_orthonormal(shape, seed=0):
    """An orthonormal matrix and a step of Frobenius norm below 0.1 off it."""
    step = draw(shape, seed + 100)
    return QR(draw(shape, seed)) + 0.1 * step / np.linalg.norm(step)


def test_qr_of_a_matrix_worked_out_by_hand():
    # Column 1 is (3,4), of length 5; column 2 is (1,7) = 6.2 (0.6,0.8)·... its rest after taking
    # off 6.2·(0.6,0.8) = (3.72,4.96) is (-2.72,2.04) = 3.4·(-0.8,0.6).
    weight = jnp.array([[3.0, 1.0], [4.0, 7.0]])
    expected = jnp.array([[0.6, -0.8], [0.8, 0.6]])
    chex.assert_trees_all_close(bases.qr(weight), expected, atol=1e-6)
    chex.assert_trees_all_close(bases.cholesky_qr(weight), expected, atol=1e-5)


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10_000))
def test_qr_is_orthonormal_and_its_r_factor_has_a_positive_diagonal(shape, seed):
    weight = draw(shape, seed)
    q = QR(weight)
    assert np.max(ERROR(q)) < 1e-5
    r = np.einsum("...dr,...ds->...rs", q, weight)
    assert np.all(np.diagonal(r, axis1=-2, axis2=-1) > 0)
    np.testing.assert_allclose(np.tril(r, -1), 0.0, atol=1e-5 * np.abs(weight).max() * shape[-2])


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10_000))
def test_cholesky_qr_equals_qr_near_orthonormal_weights(shape, seed):
    weight = near_orthonormal(shape, seed)
    q = CHOLESKY_QR(weight)
    assert np.max(ERROR(q)) < 1e-5
    chex.assert_trees_all_close(q, QR(weight), atol=2e-6)
    chex.assert_trees_all_close(ORTHONORMALIZE(weight, "cholesky_qr"), q, atol=2e-6)


def test_an_orthonormal_weight_is_its_own_factor():
    q = bases.qr(draw((12, 5)))
    for method in ("qr", "cholesky_qr", "retraction"):
        chex.assert_trees_all_close(bases.orthonormalize(q, method), q, atol=1e-6)


def test_the_sign_makes_the_factor_continuous_where_plain_qr_jumps():
    # Householder reflections give column 1 the sign of -W[0,0]; these two weights differ by 2e-4.
    above = draw((6, 3)).at[0, 0].set(1e-4)
    below = above.at[0, 0].set(-1e-4)
    plain = jnp.linalg.qr(above)[0] - jnp.linalg.qr(below)[0]
    assert jnp.max(jnp.abs(plain)) > 0.5
    for factor in (bases.qr, bases.cholesky_qr):
        chex.assert_trees_all_close(factor(above), factor(below), atol=2e-3)


def analytic_tangent(weight, direction):
    """DQ = Q(L - Lᵀ) + (I - QQᵀ) dW R⁻¹, L the strict lower triangle of Qᵀ dW R⁻¹; float64.

    From dW = dQ R + Q dR with Qᵀ dQ skew and dR R⁻¹ upper triangular.
    """
    weight, direction = np.asarray(weight, np.float64), np.asarray(direction, np.float64)
    q, r = np.linalg.qr(weight)
    sign = np.where(np.diagonal(r) < 0, -1.0, 1.0)
    q, r = q * sign[None, :], r * sign[:, None]
    scaled = direction @ np.linalg.inv(r)
    lower = np.tril(q.T @ scaled, -1)
    return q @ (lower - lower.T) + scaled - q @ (q.T @ scaled)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "retraction"])
@pytest.mark.parametrize("shape", [(4, 4), (9, 3)])
def test_gradients_are_those_of_the_formula_and_of_differences(method, shape):
    weight, direction, cotangent = near_orthonormal(shape), draw(shape, 1), draw(shape, 2)

    @jax.jit
    def loss(weight):
        return jnp.sum(cotangent * bases.orthonormalize(weight, method))

    slope = float(jnp.sum(jax.jit(jax.grad(loss))(weight) * direction))
    exact = float(np.sum(np.asarray(cotangent) * analytic_tangent(weight, direction)))
    assert slope == pytest.approx(exact, rel=1e-4, abs=1e-4)
    step = 1e-2
    difference = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    assert slope == pytest.approx(float(difference), rel=2e-2, abs=2e-2)


def test_gradients_of_the_methods_agree_on_stacked_weights():
    weight, cotangent = jnp.stack([near_orthonormal((9, 4), i) for i in range(3)]), draw((3, 9, 4))
    by_method = {
        method: jax.jit(
            jax.grad(lambda w, m=method: jnp.sum(cotangent * bases.orthonormalize(w, m)))
        )(weight)
        for method in ("qr", "cholesky_qr")
    }
    chex.assert_trees_all_close(by_method["qr"], by_method["cholesky_qr"], rtol=1e-4, atol=1e-5)


def ill_conditioned():
    """Powers 0 to 7 of 12 points in [0,1]: condition number about 1e5."""
    return jnp.asarray(np.vander(np.linspace(0, 1, 12), 8).astype(np.float32))


def test_cholesky_guard_takes_qr_for_an_ill_conditioned_weight():
    weight = ill_conditioned()
    assert not jnp.all(jnp.isfinite(bases.cholesky_qr(weight)))
    guarded = bases.orthonormalize(weight, "cholesky_qr")
    chex.assert_trees_all_equal(guarded, bases.qr(weight))
    gradient = jax.grad(lambda w: jnp.sum(bases.orthonormalize(w, "cholesky_qr")[0]))(weight)
    chex.assert_tree_all_finite(gradient)


def test_cholesky_guard_covers_every_layer_of_a_stack():
    weight = jnp.stack([near_orthonormal((12, 8)), ill_conditioned()])
    guarded = bases.orthonormalize(weight, "cholesky_qr")
    chex.assert_trees_all_close(guarded, bases.qr(weight), atol=1e-6)
    assert jnp.max(bases.orthonormality_error(guarded)) < 1e-5


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "retraction"])
def test_more_directions_than_dimensions_are_refused(method):
    words = r"rank R=5 is more than width D=4; set basis.rank to 4 or less"
    with pytest.raises(ValueError, match=words):
        bases.orthonormalize(jnp.ones((4, 5)), method)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match=r"basis.method='svd' is not known; choose one of qr, "):
        bases.orthonormalize(jnp.ones((4, 2)), "svd")
    with pytest.raises(ValueError, match=r"basis.method='svd' is not known; choose one of qr, "):
        bases.prepare_bases({}, "svd")


def test_prepare_bases_touches_only_bases_and_all_of_them():
    params = {
        "a": {"router": {"basis": draw((2, 6, 3)), "masks": draw((2, 4, 3))}},
        "basis_like": draw((6, 3)),
        "basis": {"kernel": draw((6, 3))},
    }
    prepared = bases.prepare_bases(params)
    weight = params["a"]["router"]["basis"]
    for layer in range(2):
        chex.assert_trees_all_close(
            prepared["a"]["router"]["basis"][layer], bases.qr(weight[layer]), atol=1e-6
        )
    prepared["a"]["router"]["basis"] = weight
    chex.assert_trees_all_equal(prepared, params)


def test_prepare_bases_finds_those_of_an_nnx_state():
    class Holder(nnx.Module):
        def __init__(self):
            self.basis = nnx.Param(draw((4, 2)))
            self.kernel = nnx.Param(draw((4, 2), 1))

    state = nnx.state(Holder())
    prepared = bases.prepare_bases(state)
    assert float(ERROR(prepared["basis"][...])) < 1e-5
    chex.assert_trees_all_equal(prepared["kernel"][...], state["kernel"][...])


def test_prepare_bases_pulls_gradients_back_and_retraction_does_not():
    params = {"router": {"basis": draw((6, 3))}, "kernel": draw((2, 2))}
    cotangent = {"router": {"basis": draw((6, 3), 1)}, "kernel": draw((2, 2), 2)}
    _, pull = jax.vjp(bases.prepare_bases, params)
    _, pull_one = jax.vjp(bases.qr, params["router"]["basis"])
    pulled = pull(cotangent)[0]
    chex.assert_trees_all_close(
        pulled["router"]["basis"], pull_one(cotangent["router"]["basis"])[0], rtol=1e-5
    )
    chex.assert_trees_all_equal(pulled["kernel"], cotangent["kernel"])
    assert bases.prepare_bases(params, "retraction") is params


def test_orthonormality_error_by_hand():
    # QᵀQ - I = [[0, 0.5], [0.5, 0.25]]: the largest entry is 0.5.
    stack = jnp.stack([jnp.eye(3, 2), jnp.array([[1.0, 0.5], [0.0, 1.0], [0.0, 0.0]])])
    chex.assert_trees_all_close(bases.orthonormality_error(stack), jnp.array([0.0, 0.5]))
    chex.assert_trees_all_close(bases.orthonormality_error(stack[1]), jnp.array(0.5))


def test_drift_of_equal_and_of_orthogonal_subspaces():
    q = bases.qr(draw((8, 3)))
    turn = bases.qr(draw((3, 3), 1))
    assert bases.drift(q, q) < 1e-6
    assert bases.drift(q, q @ turn) < 1e-6
    first, last = jnp.eye(6)[:, :3], jnp.eye(6)[:, 3:]
    assert bases.drift(first, last) == pytest.approx(1.0, abs=1e-6)
    chex.assert_shape(bases.drift(jnp.stack([first] * 4), jnp.stack([last] * 4)), (4,))


@pytest.mark.parametrize("angle", [1e-5, 1e-3, 0.5, 1.2])
def test_drift_of_one_turned_direction_is_the_sine_over_the_root_of_the_rank(angle):
    before = jnp.eye(6)[:, :4]
    after = before.at[0, 0].set(jnp.cos(angle)).at[5, 0].set(jnp.sin(angle))
    expected = np.sin(angle) / 2
    assert float(bases.drift(before, after)) == pytest.approx(expected, rel=1e-4)
    projectors = before @ before.T - after @ after.T
    assert float(jnp.linalg.norm(projectors)) / np.sqrt(8) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "retraction"])
def test_prepared_in_a_pass(method):
    # Neither orthonormal nor of the signs that LAPACK would choose.
    weight = bases.qr(draw((6, 3), 3)) + 0.02 * draw((6, 3), 4)
    target = draw((6, 3), 5)
    value, pull = jax.vjp(lambda w: bases.prepare_in_pass(w, method), weight)
    (gradient,) = pull(target)
    factor, through = jax.vjp(bases.qr, weight)
    chex.assert_trees_all_close(value, factor, atol=1e-6)
    # As a free matrix with "retraction", through the factorisation otherwise.
    expected = target if method == "retraction" else through(target)[0]
    chex.assert_trees_all_close(gradient, expected, atol=1e-4)


# --- tracked bases and whitening --------------------------------------------------------------


def covariance(seed=0, size=5):
    factor = draw((size, size), seed)
    return factor @ factor.T


def with_singular_values(values):
    """An orthogonal matrix times a symmetric one of these eigenvalues, [L,R,R]; and the first."""
    values = jnp.asarray(values, jnp.float32)
    shape = (*values.shape, values.shape[1])
    orthogonal, turn = bases.qr(draw(shape)), bases.qr(draw(shape, 1))
    symmetric = jnp.einsum("lij,lj,lkj->lik", turn, values, turn)
    return jnp.einsum("lij,ljk->lik", orthogonal, symmetric), orthogonal


@pytest.mark.parametrize(
    ("least", "by_svd"), [(0.5, False), (0.15, False), (1e-3, True), (0, True)]
)
def test_the_polar_factor_is_the_orthogonal_part(least, by_svd, monkeypatch):
    """By products where no singular value of any layer of a stack is small, else by SVD."""
    matrix, orthogonal = with_singular_values([[1.0, 0.9, 0.7, least], [1.0, 0.95, 0.9, 0.8]])
    found = bases.polar(matrix)
    if least:
        chex.assert_trees_all_close(found, orthogonal, atol=1e-3)
    assert float(jnp.max(bases.orthonormality_error(found))) < bases.POLAR_ERROR
    monkeypatch.setattr(bases, "_polar_by_svd", lambda matrix: jnp.full_like(matrix, jnp.nan))
    assert bool(jnp.any(jnp.isnan(bases.polar(matrix)))) is by_svd


def test_one_small_singular_value_of_many_directions_is_seen():
    # Along a vector of equal entries: a gap of 0.1 of it is 1e-3 in each entry of a matrix of 128.
    flat = jnp.full((128,), 128**-0.5)
    matrix = jnp.eye(128) - (1 - 0.06) * flat[:, None] * flat[None, :]
    found = bases.polar(matrix)
    gap = found.T @ found - jnp.eye(128)
    assert float(jnp.linalg.norm(gap)) < bases.POLAR_ERROR


def test_a_layer_that_is_not_finite_leaves_the_others():
    matrix, orthogonal = with_singular_values([[1.0, 0.9], [0.8, 0.7]])
    found = bases.polar(matrix.at[0, 0, 0].set(jnp.nan))
    chex.assert_trees_all_close(found[1], orthogonal[1], atol=1e-5)


def test_following_finds_the_principal_subspace():
    # Variances 4 and 1 along the first two axes, 1/9 along the third: the gap is 1/9 a step.
    sigma = jnp.diag(jnp.array([4.0, 1.0, 1 / 9]))
    basis = bases.qr(jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    principal = jnp.eye(3)[:, :2]
    before = float(bases.drift(principal, basis))
    for _ in range(3):
        basis = bases.follow(sigma @ basis, basis)
    assert float(bases.drift(principal, basis)) < 0.01 * before
    assert float(bases.orthonormality_error(basis)) < 1e-6


def test_following_does_not_turn_what_spans_the_same_space():
    # Plain orthogonal iteration would turn these two directions onto the axes.
    basis = bases.qr(jnp.array([[1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]))
    image = jnp.diag(jnp.array([4.0, 1.0, 0.1])) @ basis
    chex.assert_trees_all_close(bases.follow(image, basis), basis, atol=1e-6)


def test_following_nothing_stays():
    basis = bases.qr(draw((2, 6, 3)))
    chex.assert_trees_all_close(bases.follow(jnp.zeros((2, 6, 3)), basis), basis, atol=1e-6)
    # Variance along one direction alone: the others stay orthonormal.
    image = basis.at[:, :, 1:].set(0.0)
    assert float(jnp.max(bases.orthonormality_error(bases.follow(image, basis)))) < 1e-5


def check_nearest(followed, image, basis, atol):
    """The orthonormal basis of the span of V, ridge included, that is nearest to Q."""
    R = basis.shape[-1]
    trace = jnp.einsum("...dr,...dr->...", image, basis)[..., None, None]
    moved = image + bases.RIDGE * trace / R * basis
    assert float(jnp.max(bases.drift(followed, QR(moved)))) < atol
    # No turn of it is nearer where its overlap with Q is symmetric and has no negative eigenvalue.
    overlap = jnp.einsum("...dr,...ds->...rs", followed, basis)
    skew = overlap - jnp.swapaxes(overlap, -1, -2)
    assert float(jnp.max(jnp.abs(skew))) < atol
    assert float(jnp.min(jnp.linalg.eigvalsh(overlap))) > -atol


@given(
    shape=st.sampled_from([(8, 3), (6, 5), (4, 1), (2, 7, 4)]),
    seed=st.integers(0, 10_000),
    settled=st.booleans(),
)
@settings(max_examples=20)
def test_following_takes_the_nearest_basis_of_the_span(shape, seed, settled):
    D = shape[-2]
    factor = draw((*shape[:-2], D, D), seed)
    sigma = factor @ jnp.swapaxes(factor, -1, -2) + 0.1 * jnp.eye(D)[(None,) * (len(shape) - 2)]
    basis = bases.qr(draw(shape, seed + 1))
    for _ in range(5 * settled):
        basis = FOLLOW(sigma @ basis, basis)
    check_nearest(FOLLOW(sigma @ basis, basis), sigma @ basis, basis, atol=1e-4)


def test_following_one_variance_far_above_the_others():
    sigma = jnp.diag(jnp.array([1e5, *jnp.linspace(2.0, 1.0, 9)]))
    basis = bases.qr(draw((10, 6)) + 3 * jnp.eye(10)[:, :6])
    for _ in range(3):
        image = sigma @ basis
        followed = FOLLOW(image, basis)
        check_nearest(followed, image, basis, atol=2e-3)
        assert float(bases.orthonormality_error(followed)) < 1e-6
        basis = followed


def test_following_an_image_at_right_angles():
    # QᵀV = 0: all of the next basis lies outside the span of the last.
    basis, image = jnp.eye(5)[:, :2], 3.0 * jnp.eye(5)[:, 2:4]
    followed = bases.follow(image, basis)
    assert float(bases.drift(followed, jnp.eye(5)[:, 2:4])) < 1e-5
    assert float(bases.orthonormality_error(followed)) < 1e-6


def test_a_basis_of_the_whole_space_has_nothing_to_follow():
    basis = bases.qr(draw((4, 4)))
    chex.assert_trees_all_equal(bases.follow(covariance(1, 4) @ basis, basis), basis)


def test_bases_stay_orthonormal_over_many_steps():
    @jax.jit
    def step(basis, sigma):
        return bases.follow(sigma @ basis, basis)

    basis = bases.qr(draw((5, 3)))
    for seed in range(200):
        basis = step(basis, covariance(seed))
    assert float(bases.orthonormality_error(basis)) < 1e-5


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
def test_whitening_by_hand(power):
    # A turned diag(9, 1), whose damped eigenvalues are 9.005 and 1.005.
    turn = jnp.array([[0.6, -0.8], [0.8, 0.6]])
    matrix, values = bases.whitener(turn @ jnp.diag(jnp.array([9.0, 1.0])) @ turn.T, power)
    chex.assert_trees_all_close(values, jnp.array([1.0, 9.0]), rtol=1e-5)
    damped = np.array([9.005, 1.005])
    scale = np.mean(damped ** (1 - 2 * power)) ** -0.5
    expected = turn @ np.diag(damped**-power * scale).astype(np.float32) @ turn.T
    chex.assert_trees_all_close(matrix, expected, rtol=1e-4, atol=1e-5)


def test_full_whitening_gives_unit_covariance_layer_by_layer():
    sigma = covariance(1) + jnp.eye(5)
    stacked = jnp.stack([sigma, 100.0 * sigma])
    matrix, _ = bases.whitener(stacked, 0.5)
    for layer in range(2):
        white = matrix[layer] @ stacked[layer] @ matrix[layer]
        # But for the ridge: a thousandth of a mean variance of about six.
        assert float(jnp.max(jnp.abs(white - jnp.eye(5)))) < 0.02


def test_no_variance_is_divided_by_nothing():
    matrix, values = bases.whitener(jnp.zeros((3, 3)), 0.5)
    chex.assert_tree_all_finite((matrix, values))
