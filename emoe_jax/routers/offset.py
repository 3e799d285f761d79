"""Balance without a loss: an offset of the scores, moved by the loads; and its plainest router.

A token of scores s [E] goes to the K experts with the largest s + b. With tokens drawn from any law
without atoms in the differences of its scores, F(b) = E[sum of the K largest of s + b] - (K/E) Σ b
is convex with gradient P(k chosen) - K/E, so an offset b that balances the loads exists, and
b ← b - rate · (load - mean load) is stochastic descent on F. No gradient of F reaches the model.

Scores are standardised, so their distribution has a known density at the threshold, and the step is
near Newton's, with no scale to tune. How fast statistics and offset move follows the training's
progress, because what they follow drifts with the learning rate.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from emoe_jax.config import MoEConfig
from emoe_jax.routers.base import (
    Context,
    Router,
    RouterState,
    Routing,
    State,
    count,
    gates_of,
    gather_gates,
    linear,
    make_routing,
    router_options,
    select_top_k,
)
from emoe_jax.routers.softmax import init_kernel

Array = jax.Array

TEMPERATURE = 0.6
"""First value of the learned temperature τ."""

STATISTICS_RATE = 0.03
"""ρ₀, the rate of running means at the last step of training."""

OFFSET_RATE = 0.05
"""η₀, the rate of the offset at the last step of training, in steps of Newton's."""


class Rates(NamedTuple):
    """How far an update moves the state: `statistics` ρ and `offset` η, both [...]."""

    statistics: Array
    offset: Array


def rates(updates: Array, progress: Array) -> Rates:
    """ρ = max(ρ₀ + a/4, 1/(n+1)) and η = max(η₀ + a/5, 0.5/(1 + n/10)), a = (1 + cos π·progress)/2.

    The first updates average over all so far; then both follow a cosine, as learning rates do. When
    the weights no longer move, the m-th batch has ρ₀/(1 + ρ₀m) in place of ρ₀ + a/4, a mean over
    these batches in which what was before counts as 1/ρ₀, and η = η₀/(1 + η₀m/2), towards 2/m. Of
    an offset that is wrong, steps of 2/m leave a share of m^(-2κ) where loads follow offsets κ
    times as fast as `curvature` says, and κ is small where many tokens are alike.

    Args:
        updates: n [...] float32, updates so far.
        progress: [] float32, as of `Router.update`; m = progress - 1.
    """
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    after = jnp.maximum(progress - 1.0, 0.0)
    statistics = STATISTICS_RATE / (1.0 + STATISTICS_RATE * after) + 0.25 * cosine
    training = jnp.maximum(OFFSET_RATE + 0.2 * cosine, 0.5 / (1.0 + 0.1 * updates))
    settling = OFFSET_RATE / (1.0 + 0.5 * OFFSET_RATE * after)
    return Rates(
        jnp.maximum(statistics, 1.0 / (updates + 1.0)),
        jnp.where(after > 0.0, settling, training),
    )


@functools.lru_cache
def curvature(experts: int, k: int) -> float:
    """The curvature c = (E/K)·E[φ(t)], t the K-th largest of E-1 standard normals.

    It is the relative growth of an expert's load with its offset where the scores of a token are
    independent and standard normal: an expert is chosen if its score is above the K-th largest of
    the others'. 1.42 for E=8, K=1; zero for K = E, where every expert is always chosen.
    """
    if k == experts:
        return 0.0
    others = experts - 1
    x = np.linspace(-9.0, 9.0, 20_001)
    density = np.exp(-0.5 * np.square(x)) / math.sqrt(2 * math.pi)
    below = 0.5 * (1.0 + np.array([math.erf(value / math.sqrt(2)) for value in x]))
    # Of the others k-1 lie above t and others-k below; logarithms, as factorials overflow.
    log_count = math.lgamma(others + 1) - math.lgamma(k) - math.lgamma(others - k + 1)
    with np.errstate(divide="ignore"):
        log_law = log_count + (k - 1) * np.log1p(-np.minimum(below, 1 - 1e-16))
        log_law = log_law + (others - k) * np.log(np.maximum(below, 1e-300))
    law = np.exp(log_law) * density
    return float(experts / k * np.sum(law * density) * (x[1] - x[0]))


def move_offset(offset: Array, load: Array, rate: Array, k: int) -> Array:
    """The next offset: b ← b - (η/c)·clip(f - 1, ±1), centred.

    f_k is the load of expert k over the mean load.

    Args:
        offset: b [...,E].
        load: [...,E] assignments of a global batch.
        rate: η [...].
        k: K.
    """
    c = curvature(offset.shape[-1], k)
    if c == 0.0:
        return offset
    excess = load / jnp.maximum(jnp.mean(load, axis=-1, keepdims=True), 1e-9) - 1.0
    moved = offset - rate[..., None] / c * jnp.clip(excess, -1.0, 1.0)
    return moved - jnp.mean(moved, axis=-1, keepdims=True)


def accept(new: State, old: State, counted: Array) -> State:
    """The new state of each layer where some token was counted and all of it is finite, or the old.

    Args:
        new: arrays [...,*] by name.
        old: of the same shapes.
        counted: [...] tokens that the statistics hold.
    """

    def finite(leaf: Array) -> Array:
        return jnp.all(jnp.isfinite(leaf), axis=tuple(range(counted.ndim, leaf.ndim)))

    good = functools.reduce(jnp.logical_and, map(finite, new.values()), counted > 0)

    def choose(after: Array, before: Array) -> Array:
        return jnp.where(good.reshape(good.shape + (1,) * (after.ndim - good.ndim)), after, before)

    return {name: choose(new[name], old[name]) for name in new}


def usable(tokens: Array, real: Array) -> Array:
    """[T] bool: real tokens [T,D] whose squared norm is finite in float32."""
    return real & jnp.isfinite(jnp.sum(jnp.square(tokens), axis=-1))


FAR = 100.0
"""Deviations beyond which statistics take a token, or a score, to be that far and no further. One
that is a million times the others would else be all that a layer's state knows, for as long as a
running mean takes to forget it. What moves all tokens is followed all the same: a variance may grow
by the square of this, times its rate, in a step. The first batch of all has no limit."""


def reach(variance: Array, updates: Array) -> Array:
    """`FAR` deviations, the shape of a running variance; no limit where it knows of none yet."""
    known = (variance > 0.0) & (updates > 0.0)
    return jnp.where(known, FAR * jnp.sqrt(variance), jnp.inf)


def choose_by_offset(
    scores: Array,
    offset: Array,
    log_temperature: Array,
    context: Context,
    *,
    k: int,
    score: str,
    renormalize: bool,
    good: Array,
    metrics: dict[str, Array],
    stats: dict[str, Array],
) -> Routing:
    """Chooses the K largest s + b; the gates are softmax((s + b)/τ) over all experts, or sigmoids.

    Args:
        scores: s [T,E], standardised.
        offset: b [E].
        log_temperature: log τ [].
        context: of the tokens.
        k: K.
        score: "softmax" or "sigmoid".
        renormalize: whether gates are divided by their sum over K.
        good: [T] bool, the tokens whose loads and moments move the state.
        metrics: the router's own.
        stats: the router's own.
    """
    shifted = scores + offset[None, :]
    gates, probs = gates_of(shifted * jnp.exp(-log_temperature), score)
    indices = select_top_k(shifted, k)
    common = {
        "offset": jnp.max(jnp.abs(offset)),
        "temperature": jnp.exp(lax.stop_gradient(log_temperature)),
    }
    return make_routing(
        indices,
        gather_gates(gates, indices, renormalize=renormalize),
        probs,
        context.mask,
        metrics=common | metrics,
        stats=stats
        | {
            "counted": jnp.sum(good, dtype=jnp.float32),
            "counted_load": count(indices, good, scores.shape[-1]),
        },
    )


class SoftmaxOffsetRouter(Router):
    """A linear softmax router, its scores standardised per expert, balanced by the offset.

    s = (h W - m)/sqrt(v) with running mean m and variance v of each expert's scores. The control of
    the whitened router: gates, temperature, offset, rates, calibration and settling are the same,
    and in place of its basis, whitening and orthonormal directions stands a free linear map.

    Attributes:
        kernel: W [D,E].
        log_temperature: log τ [].
        mean: m [E], running state.
        variance: v [E], likewise.
        offset: b [E], likewise.
        updates: n [], updates of the state.
    """

    OPTIONS: ClassVar[frozenset[str]] = frozenset({"temperature", "score", "renormalize"})
    CALIBRATES: ClassVar[bool] = True

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        E = config.experts
        options = router_options(
            config,
            SoftmaxOffsetRouter,
            temperature=TEMPERATURE,
            score="softmax",
            renormalize=False,
        )
        self.top_k = config.top_k
        self.score = options["score"]
        self.renormalize = options["renormalize"]
        self.kernel = init_kernel(rngs, width, E)
        self.log_temperature = nnx.Param(jnp.log(jnp.float32(options["temperature"])))
        self.mean = RouterState(jnp.zeros((E,), jnp.float32))
        self.variance = RouterState(jnp.ones((E,), jnp.float32))
        self.offset = RouterState(jnp.zeros((E,), jnp.float32))
        self.updates = RouterState(jnp.zeros((), jnp.float32))

    def __call__(self, tokens: Array, context: Context) -> Routing:
        """Routes tokens [T,D]; see the class. Tokens that are not finite score as the mean does."""
        h = tokens.astype(jnp.float32)
        good = usable(h, context.mask.reshape(-1))
        raw = linear(jnp.where(good[:, None], h, 0.0), self.kernel[...]) - self.mean[...][None, :]
        raw = jnp.where(good[:, None], raw, 0.0)
        far = reach(self.variance[...], self.updates[...])[None, :]
        seen = jnp.clip(lax.stop_gradient(raw), -far, far)
        return choose_by_offset(
            raw * lax.rsqrt(self.variance[...] + 1e-9)[None, :],
            self.offset[...],
            self.log_temperature[...],
            context,
            k=self.top_k,
            score=self.score,
            renormalize=self.renormalize,
            good=good,
            metrics={},
            stats={
                "score_sum": jnp.sum(seen, axis=0),
                "score_square": jnp.sum(jnp.square(seen), axis=0),
            },
        )

    @staticmethod
    def update(config: MoEConfig, state: State, stats: dict[str, Array], progress: Array) -> State:
        """Moves mean, variance and offset; see `rates`."""
        rate = rates(state["updates"], progress)
        counted = jnp.maximum(stats["counted"], 1.0)[..., None]
        rho = rate.statistics[..., None]
        # Sums are of scores less the running mean, which moves: see `whitened.covariance_target`.
        gap, square = stats["score_sum"] / counted, stats["score_square"] / counted
        square = square - rho * jnp.square(gap)
        new: dict[str, Any] = {
            "mean": state["mean"] + rho * gap,
            "variance": state["variance"] + rho * (square - state["variance"]),
            "offset": move_offset(
                state["offset"], stats["counted_load"], rate.offset, config.top_k
            ),
            "updates": state["updates"] + 1.0,
        }
        return accept(new, state, stats["counted"])
