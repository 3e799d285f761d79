"""The balanced eigenbasis router: whitened projections, orthonormal experts, an offset.

Centred tokens are projected on a basis that follows their principal subspace, divided by a power of
their covariance there, and scored against orthonormal expert directions. If tokens are elliptically
distributed and whitened fully, every permutation of the experts is a rotation of what is scored, so
all experts get the same load; what is not elliptical the offset takes up. docs/routing.md has the
theorem and the measurements.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from emoe_jax import basis as bases
from emoe_jax.config import MoEConfig
from emoe_jax.routers.base import (
    Context,
    Router,
    RouterState,
    Routing,
    State,
    linear,
    router_options,
)
from emoe_jax.routers.offset import (
    TEMPERATURE,
    accept,
    choose_by_offset,
    move_offset,
    rates,
    reach,
    usable,
)
from emoe_jax.sharding import varying_alike

Array = jax.Array

WHITENING = 0.25
"""alpha: half way between none and full, which amplifies rare directions too much on text."""


class WhitenedRouter(Router):
    """Routes a token by its whitened coordinates in an eigenbasis of the tokens.

    1. z = Qᵀ(h - μ); u = C^-α z, scaled to unit variance on average (`basis.whitener`).
    2. s = Aᵀu, with A [R,E] of orthonormal columns; for E > R of orthonormal rows, a tight frame,
       times sqrt(E/R), so that columns have unit length on average.
    3. The K largest s + b are chosen; the gates are softmax((s + b)/τ), or its sigmoids with
       `score`, see `offset`.
    4. After each step μ, Q, C and b move (`update`), from sums over the global batch. A step routes
       by the state of the step before, so a route depends on no other token; evaluation moves
       nothing.

    The directions are used as they stand: `basis.prepare_bases` orthonormalises their weight, once
    per step, as it does the basis where `routing.subspace` is "learned".

    Attributes:
        directions: weight of A, [R,E], or [E,R] for E > R.
        log_temperature: log τ [].
        basis: Q [D,R]; a parameter where it is learned, running state otherwise.
        mean: μ [D], running state, as all that follow.
        image: V [D,R], covariance of h and z, near ΣQ; only where the basis is tracked. Where
            R = D the basis spans the whole space, has nowhere to move, and this stays as it is: it
            is there for checkpoints that have it.
        covariance: C [R,R], of z.
        whitener: C^-α, scaled, [R,R].
        spectrum: eigenvalues of C [R], ascending.
        offset: b [E], only with `routing.offset`.
        updates: n [], updates so far.
    """

    OPTIONS: ClassVar[frozenset[str]] = frozenset(
        {"temperature", "score", "renormalize", "offset", "subspace", "whitening"}
    )
    CALIBRATES: ClassVar[bool] = True

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        E, R = config.experts, config.basis.rank_of(width)
        options = _options(config)
        self.top_k = config.top_k
        self.method = config.basis.method
        self.score = options["score"]
        self.renormalize = options["renormalize"]
        self.subspace = options["subspace"]
        tall = (max(R, E), min(R, E))
        weight = jax.random.normal(rngs.params(), tall, jnp.float32)
        self.directions = nnx.Param(bases.orthonormalize(weight))
        self.is_frame = E > R
        self.log_temperature = nnx.Param(jnp.log(jnp.float32(options["temperature"])))
        drawn = bases.orthonormalize(jax.random.normal(rngs.params(), (width, R), jnp.float32))
        learned = self.subspace == "learned"
        self.basis = nnx.Param(drawn) if learned else RouterState(drawn)
        self.mean = RouterState(jnp.zeros((width,), jnp.float32))
        if self.subspace == "tracked":
            self.image = RouterState(jnp.zeros((width, R), jnp.float32))
        self.covariance = RouterState(jnp.eye(R, dtype=jnp.float32))
        self.whitener = RouterState(jnp.eye(R, dtype=jnp.float32))
        self.spectrum = RouterState(jnp.ones((R,), jnp.float32))
        self.has_offset = options["offset"]
        if self.has_offset:
            self.offset = RouterState(jnp.zeros((E,), jnp.float32))
        self.updates = RouterState(jnp.zeros((), jnp.float32))

    def __call__(self, tokens: Array, context: Context) -> Routing:
        """Routes tokens [T,D]; see the class. Tokens that are not finite go where the mean goes."""
        basis, directions = self.basis[...], self.directions[...]
        if context.train:
            directions = bases.prepare_in_pass(directions, self.method)
            if self.subspace == "learned":
                basis = bases.prepare_in_pass(basis, self.method)
        h = tokens.astype(jnp.float32)
        good = usable(h, context.mask.reshape(-1))
        centred = jnp.where(good[:, None], h - self.mean[...][None, :], 0.0)
        weights = linear(self.whitener[...], self._frame(directions))
        learned = self.subspace == "learned"
        score = _project_and_score if learned else _on_given_basis
        z, scores = score(centred, basis, weights)
        none = jnp.zeros((weights.shape[1],), jnp.float32)
        return choose_by_offset(
            scores,
            self.offset[...] if self.has_offset else none,
            self.log_temperature[...],
            context,
            k=self.top_k,
            score=self.score,
            renormalize=self.renormalize,
            metrics=self._metrics(basis),
            good=good,
            stats=_moments(centred, z, self._far(), moving=self._moves(basis)),
        )

    def _moves(self, basis: Array) -> bool:
        """Whether the basis follows the tokens."""
        return self.subspace == "tracked" and basis.shape[1] < basis.shape[0]

    def _far(self) -> Array:
        """The length of z [] that statistics take a token to have at most, see `offset.FAR`."""
        return reach(jnp.sum(self.spectrum[...]), self.updates[...])

    def _frame(self, directions: Array) -> Array:
        """A [R,E]."""
        if not self.is_frame:
            return directions
        E, R = directions.shape
        return directions.T * jnp.float32((E / R) ** 0.5)

    def _metrics(self, basis: Array) -> dict[str, Array]:
        """What the state says before this step."""
        spectrum = self.spectrum[...]
        return {
            "orthonormality_error": bases.orthonormality_error(lax.stop_gradient(basis)),
            "condition": spectrum[-1] / jnp.maximum(spectrum[0], 1e-6 * spectrum[-1] + bases.TINY),
        }

    @staticmethod
    def update(config: MoEConfig, state: State, stats: dict[str, Array], progress: Array) -> State:
        """Moves mean, basis, covariance, whitening and offset; see `offset.rates`."""
        rate = rates(state["updates"], progress)
        rho = rate.statistics
        # Means over tokens less the running mean μ; it moves by ρ times the first.
        batch = _means(stats, ("token_sum", "z_sum", "z_gram", "image_sum"))
        shift, turned = batch["token_sum"], batch["z_sum"]
        square = covariance_target(batch["z_gram"], turned, turned, rho)
        covariance = _towards(state["covariance"], square, rho)
        whitener, spectrum = bases.whitener(covariance, _options(config)["whitening"])
        new: dict[str, Any] = {
            "mean": state["mean"] + rho[..., None] * shift,
            "covariance": covariance,
            "whitener": whitener,
            "spectrum": spectrum,
            "updates": state["updates"] + 1.0,
        }
        if "image_sum" in batch:
            image = covariance_target(batch["image_sum"], shift, turned, rho)
            new["image"] = _towards(state["image"], image, rho)
            new["basis"] = bases.follow(new["image"], state["basis"])
        if "offset" in state:
            new["offset"] = move_offset(
                state["offset"], stats["counted_load"], rate.offset, config.top_k
            )
        # A basis that does not move stays as it is.
        return state | accept(new, state, stats["counted"])


def _options(config: MoEConfig) -> dict[str, Any]:
    return router_options(
        config,
        WhitenedRouter,
        temperature=TEMPERATURE,
        score="softmax",
        renormalize=False,
        offset=True,
        subspace="tracked",
        whitening=WHITENING,
    )


def _project_and_score(tokens: Array, basis: Array, weights: Array) -> tuple[Array, Array]:
    """Projections [T,R] of tokens [T,D] on a basis [D,R], and scores [T,E] by weights [R,E]."""
    z = linear(tokens, basis)
    return z, linear(z, weights)


def _on_given_basis(tokens: Array, basis: Array, weights: Array) -> tuple[Array, Array]:
    """The same on a basis that is no parameter, with projections for statistics alone.

    Neither passes a gradient. With g that of the scores, that of the tokens is g(QW)ᵀ or, as the
    chain rule has it, (gWᵀ)Qᵀ: the same, of which the one is taken that has fewer products a token.
    Differentiable in reverse mode.
    """
    basis = lax.stop_gradient(basis)
    (D, R), E = basis.shape, weights.shape[1]
    if merged_is_cheaper(D, R, E):
        z, scores = _by_merged_map(*varying_alike(tokens, basis, weights))
    else:
        z, scores = _project_and_score(tokens, basis, weights)
    return lax.stop_gradient(z), scores


def merged_is_cheaper(D: int, R: int, E: int) -> bool:
    """Whether g(QW)ᵀ, of E·D products a token, takes fewer than (gWᵀ)Qᵀ, of R·(E + D).

    QW itself takes D·R·E, once for all tokens.
    """
    return E * D < R * (E + D)


_by_merged_map = jax.custom_vjp(_project_and_score)


def _merged_forward(tokens: Array, basis: Array, weights: Array) -> tuple[Any, Any]:
    z, scores = _project_and_score(tokens, basis, weights)
    return (z, scores), (z, basis, weights)


def _merged_backward(kept: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    z, basis, weights = kept
    _, of_scores = cotangents
    of_tokens = linear(of_scores, linear(basis, weights).T)
    return of_tokens, None, linear(z.T, of_scores)


_by_merged_map.defvjp(_merged_forward, _merged_backward)


def _means(stats: dict[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
    """Sums over counted tokens as means."""
    count = jnp.maximum(stats["counted"], 1.0)
    return {
        name: stats[name] / count.reshape(count.shape + (1,) * (stats[name].ndim - count.ndim))
        for name in names
        if name in stats
    }


def covariance_target(moment: Array, left: Array, right: Array, rate: Array) -> Array:
    """E[xyᵀ] - ρ E[x]E[y]ᵀ: what a running covariance moves to while its mean moves by ρE[x].

    x and y are tokens less the running mean, and a covariance that is (1 - ρ) of what it was and ρ
    of this is exactly that of the law which is (1 - ρ) the running one and ρ the batch's (West
    1979). The first update, ρ = 1, takes the covariance of the batch, wherever its tokens lie.

    Args:
        moment: E[xyᵀ] [...,M,N].
        left: E[x] [...,M].
        right: E[y] [...,N].
        rate: ρ [...].
    """
    return moment - rate[..., None, None] * left[..., :, None] * right[..., None, :]


def _towards(running: Array, value: Array, rate: Array) -> Array:
    """Moves a running mean [...,M,N] by `rate` [...] towards a value."""
    return running + rate[..., None, None] * (value - running)


def _moments(centred: Array, z: Array, far: Array, *, moving: bool) -> dict[str, Array]:
    """Sums over counted tokens: D + R + R² + 2 numbers, and D·R for a basis that moves.

    A token whose z is longer than `far` counts as the one on its way to the mean that is as long.

    Args:
        centred: h - μ [T,D], zero for tokens that do not count.
        z: Qᵀ(h - μ) [T,R].
        far: [], infinite where there is no limit.
        moving: whether the basis follows them.
    """
    h, z = lax.stop_gradient((centred, z))
    length = jnp.sqrt(jnp.sum(jnp.square(z), axis=-1, keepdims=True))
    share = jnp.where(length > far, far / jnp.maximum(length, bases.TINY), 1.0)
    weighed = z * jnp.square(share)
    products = {
        "z_gram": jnp.einsum("tr,ts->rs", z, weighed, precision=lax.Precision.HIGHEST),
    }
    if moving:
        products["image_sum"] = jnp.einsum("td,tr->dr", h, weighed, precision=lax.Precision.HIGHEST)
    return products | {
        "token_sum": jnp.sum(h * share, axis=0),
        "token_square": jnp.sum(jnp.square(h * share)),
        "z_sum": jnp.sum(z * share, axis=0),
        "z_square": jnp.trace(products["z_gram"]),
    }
