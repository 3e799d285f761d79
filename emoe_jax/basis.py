"""Orthonormal bases: QR reparameterisation, Cholesky-QR, and how to measure a basis.

A basis Q [D,R] has orthonormal columns. It is parameterised by a weight W of the same shape as
Q = qf(W), the Q factor of the QR decomposition whose R factor has a positive diagonal. That sign
makes qf one function on full-rank matrices, continuous and differentiable there. After each
optimizer step the weight is replaced by its own Q (`optim.retract_bases`), so its condition number
is one whenever it is factorised.

Beside these learned bases there are tracked ones, which follow the principal subspace of what
passes by (`follow`), and the whitening of projections on a basis (`whitener`).

All functions take leading axes, so that the bases of all layers are prepared in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from emoe_jax.config import BASIS_METHODS, require, require_choice

Array = jax.Array
Tree = Any

BASIS_KEYS = ("basis", "directions")
"""Names under which modules keep weights [...,D,R] with orthonormal columns among parameters."""

_HIGHEST = lax.Precision.HIGHEST


def qr(weight: Array) -> Array:
    """Sign-fixed QR factor of a weight.

    Args:
        weight: [...,D,R] float32 with R <= D, of full column rank.

    Returns:
        Q [...,D,R] with QᵀQ = I and QᵀW upper triangular with positive diagonal.
    """
    q, r = jnp.linalg.qr(weight)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    sign = jnp.where(diagonal < 0, -1.0, 1.0).astype(weight.dtype)
    return q * sign[..., None, :]


def cholesky_qr(weight: Array) -> Array:
    """The same factor as `qr` by Cholesky-QR done twice (CholeskyQR2, Yamamoto et al. 2015).

    Two Gram matrices, two R×R Cholesky factors and two triangular solves in place of Householder
    reflections. The rounding error grows with the square of the condition number: meant for
    weights near orthonormal, NaN in float32 from a condition number of about 1e4.

    Args:
        weight: [...,D,R] float32 with R <= D.

    Returns:
        Q [...,D,R].
    """
    return _cholesky_pass(_cholesky_pass(weight))


def _cholesky_pass(weight: Array) -> Array:
    lower = jnp.linalg.cholesky(_gram(weight))
    return lax.linalg.triangular_solve(lower, weight, left_side=False, lower=True, transpose_a=True)


def _gram(weight: Array) -> Array:
    return jnp.einsum("...dr,...ds->...rs", weight, weight, precision=_HIGHEST)


def _gram_gap(weight: Array) -> Array:
    """WᵀW - I [...,R,R]."""
    gram = _gram(weight)
    return gram - jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)


def orthonormalize(weight: Array, method: str = "qr") -> Array:
    """Q factor of a weight by the chosen method; differentiable.

    With "cholesky_qr" a weight that is not near orthonormal (an eigenvalue of WᵀW further than
    one half from 1, bounded by the Frobenius norm of WᵀW - I) takes Householder QR instead, so that
    no learning rate can make it NaN.

    Args:
        weight: [...,D,R] float32, R <= D.
        method: "qr", "cholesky_qr", or "retraction", which factorises as "qr" does and differs
            only in that `prepare_bases` leaves it out of the forward pass.

    Returns:
        Q [...,D,R].

    Raises:
        ValueError: R > D, or an unknown method.
    """
    require_choice("basis.method", method, BASIS_METHODS)
    D, R = weight.shape[-2:]
    require(R <= D, f"rank R={R} is more than width D={D}; set basis.rank to {D} or less")
    if method != "cholesky_qr":
        return qr(weight)
    gap = _gram_gap(lax.stop_gradient(weight))
    near = jnp.all(jnp.sum(jnp.square(gap), axis=(-2, -1)) < 0.25)
    return lax.cond(near, cholesky_qr, qr, weight)


def is_basis(path: tuple[Any, ...]) -> bool:
    """Whether a path of `jax.tree_util`, in dicts or an `nnx.State`, leads to a basis weight."""
    names = [part.key for part in path if hasattr(part, "key")]
    return bool(names) and names[-1] in BASIS_KEYS


def map_bases(function: Callable[[Array], Array], tree: Tree) -> Tree:
    """Applies a function to every basis in a tree of parameters, leaves the rest as it is."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf) if is_basis(path) else leaf, tree
    )


def prepare_bases(params: Tree, method: str = "qr") -> Tree:
    """Replaces every basis weight of a model by its orthonormal factor, once for all layers.

    Differentiable: `loss(prepare_bases(params))` is the reparameterised loss. A training step calls
    it once, outside the microbatch loop and remat, and pulls the accumulated gradients back through
    it once. With "retraction" it is the identity: the optimizer keeps the weight orthonormal.

    Args:
        params: nested dict of arrays or `nnx.State`; leaves named in `BASIS_KEYS` [...,D,R].
        method: see `orthonormalize`.

    Returns:
        The tree with prepared bases.
    """
    require_choice("basis.method", method, BASIS_METHODS)
    if method == "retraction":
        return params
    return map_bases(lambda weight: orthonormalize(weight, method), params)


def prepare_in_pass(weight: Array, method: str = "qr") -> Array:
    """The basis of one training pass, where `prepare_bases` was not called before it.

    "qr" and "cholesky_qr" factorise the weight, gradients pass through. "retraction" is the paper's
    released code: the forward pass sees the Q factor, and the gradient is that of Q as a free
    matrix. Signs are fixed, as everywhere here; the release takes LAPACK's, which may turn columns
    of a weight that was not retracted before (energies are even in z, so outputs are the same).

    Args:
        weight: [...,D,R].
        method: see `orthonormalize`.
    """
    if method != "retraction":
        return orthonormalize(weight, method)
    # w - stop(w) is an exact zero that carries the gradient.
    return lax.stop_gradient(qr(weight)) + (weight - lax.stop_gradient(weight))


def orthonormality_error(basis: Array) -> Array:
    """Largest |QᵀQ - I| of a basis [...,D,R], shape [...]."""
    return jnp.max(jnp.abs(_gram_gap(basis)), axis=(-2, -1))


RIDGE = 1e-3
"""Added to every eigenvalue, as a share of their mean: what whitening may amplify is bounded."""

TINY = 1e-12
"""Added as well, so that nothing is divided by the zero variance of constant tokens."""


def follow(image: Array, basis: Array) -> Array:
    """The next basis of a tracked principal subspace: one orthogonal iteration, without spin.

    With the image V = ΣQ of a basis Q under a covariance Σ, the span of V is nearer to the
    principal subspace of Σ than that of Q (Golub and Van Loan, Matrix Computations, section 8.2.4).
    Of its orthonormal bases this is the one nearest to Q (orthogonal Procrustes), so that
    directions do not turn within the subspace from step to step. Directions without variance stay.

    Args:
        image: V [...,D,R] float32.
        basis: Q [...,D,R], orthonormal.

    Returns:
        [...,D,R], orthonormal.
    """
    D, R = basis.shape[-2:]
    if D == R:  # all bases span the whole space, and the nearest one is Q
        return basis
    # V has tr(QᵀΣQ) on the diagonal of QᵀV: a share of it keeps directions without variance.
    trace = jnp.sum(image * basis, axis=(-2, -1), keepdims=True)
    floor = RIDGE * jnp.abs(trace) / R + TINY
    span = qr(image + floor * basis)
    turn = polar(jnp.einsum("...dr,...ds->...rs", span, basis, precision=_HIGHEST))
    turned = jnp.einsum("...dr,...rs->...ds", span, turn, precision=_HIGHEST)
    # One more step takes the rounding of the products out, which updates would add up.
    return _newton_schulz(turned)


POLAR_STEPS = 8
"""Newton-Schulz steps: a singular value of 0.15 becomes one that is within 1e-5 of 1."""

POLAR_ERROR = 1e-3
"""Frobenius norm of QᵀQ - I which one step more takes to the rounding of float32: it is squared."""


def polar(matrix: Array) -> Array:
    """The orthogonal matrix nearest to one whose singular values are at most 1, but for rounding.

    By products alone, Newton-Schulz steps (Higham, Functions of Matrices, 2008, section 8.3), which
    every platform is fast at; by SVD where they do not get there, as some singular value is small.

    Args:
        matrix: [...,R,R] float32, such as the product of two bases.

    Returns:
        [...,R,R], orthogonal to `POLAR_ERROR`.
    """
    x = matrix
    for _ in range(POLAR_STEPS):
        x = _newton_schulz(x)
    left = jnp.sum(jnp.square(_gram_gap(x)), axis=(-2, -1))
    near = jnp.all(left < POLAR_ERROR**2)
    return lax.cond(near, lambda _, x: x, lambda matrix, _: _polar_by_svd(matrix), matrix, x)


def _polar_by_svd(matrix: Array) -> Array:
    left, _, right = jnp.linalg.svd(matrix)
    return jnp.einsum("...rs,...st->...rt", left, right, precision=_HIGHEST)


def _newton_schulz(x: Array) -> Array:
    """X(3I - XᵀX)/2 of X [...,D,R]: nearer to orthonormal columns."""
    return x - 0.5 * jnp.einsum("...dr,...rs->...ds", x, _gram_gap(x), precision=_HIGHEST)


def whitener(covariance: Array, power: float) -> tuple[Array, Array]:
    """The matrix that divides projections by a power of their covariance.

    With C = UΛUᵀ and λ̃ = λ + 10⁻³ mean λ it is U diag(λ̃^-α) Uᵀ / sqrt(mean λ̃^(1-2α)), so that the
    result has unit variance on average over its directions. α = 1/2 whitens fully, α = 0 only
    scales. By `eigh`, which is stable where C is singular and takes any power.

    Args:
        covariance: C [...,R,R] float32, symmetric.
        power: α.

    Returns:
        The matrix [...,R,R], and the eigenvalues λ [...,R], ascending and not below zero.
    """
    values, vectors = jnp.linalg.eigh(covariance)
    values = jnp.maximum(values, 0.0)
    damped = values + RIDGE * jnp.mean(values, axis=-1, keepdims=True) + TINY
    scale = jnp.mean(damped ** (1.0 - 2.0 * power), axis=-1, keepdims=True) ** -0.5
    weighted = vectors * (damped**-power * scale)[..., None, :]
    return jnp.einsum("...rs,...ts->...rt", weighted, vectors, precision=_HIGHEST), values


def drift(before: Array, after: Array) -> Array:
    """Distance between the subspaces of two bases [D,R]: ‖QQᵀ - Q'Q'ᵀ‖_F / sqrt(2R), in [0,1].

    0 for the same subspace, 1 for orthogonal ones. ‖QQᵀ - Q'Q'ᵀ‖² = 2R - 2‖QᵀQ'‖² is twice the
    square of what Q' has outside the span of Q, Q' - QQᵀQ', which is summed here: the difference of
    squares would round a drift below 1e-3 away in float32.
    """
    R = before.shape[-1]
    overlap = jnp.einsum("...dr,...ds->...rs", before, after, precision=_HIGHEST)
    inside = jnp.einsum("...dr,...rs->...ds", before, overlap, precision=_HIGHEST)
    return jnp.sqrt(jnp.sum(jnp.square(after - inside), axis=(-2, -1)) / R)
