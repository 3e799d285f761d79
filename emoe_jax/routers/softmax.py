"""Linear routers: softmax top-k, Switch balance loss, z-loss, and the loss-free selection bias."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

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
    mean_over,
    router_options,
    select_top_k,
)

Array = jax.Array


def init_kernel(rngs: nnx.Rngs, width: int, experts: int) -> nnx.Param[Array]:
    """Weights [D,E] of a linear router: normal with deviation 1/sqrt(D).

    The scores of normalised tokens start with unit variance, whatever the width.
    """
    return nnx.Param(jax.random.normal(rngs.params(), (width, experts), jnp.float32) * width**-0.5)


class SoftmaxRouter(Router):
    """p = softmax(h W / τ); the K largest p are chosen and are the gates.

    The gates are renormalised over the chosen K only with `renormalize`. "switch" is this router
    with the Switch balance loss at weight 0.01 (arXiv 2101.03961, section 2.2).

    Attributes:
        kernel: W [D,E].
    """

    OPTIONS: ClassVar[frozenset[str]] = frozenset({"temperature", "renormalize", "z_weight"})
    BALANCE_WEIGHT: ClassVar[float] = 0.0

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        options = router_options(
            config,
            type(self),
            temperature=1.0,
            renormalize=False,
            z_weight=0.0,
            balance_weight=self.BALANCE_WEIGHT,
        )
        self.top_k = config.top_k
        self.temperature = options["temperature"]
        self.renormalize = options["renormalize"]
        self.z_weight = options["z_weight"]
        self.balance_weight = options["balance_weight"]
        self.kernel = init_kernel(rngs, width, config.experts)

    def __call__(self, tokens: Array, context: Context) -> Routing:
        """Routes tokens [T,D]; see the class."""
        scores = linear(tokens, self.kernel[...]) / self.temperature
        probs = jax.nn.softmax(scores, axis=-1)
        indices = select_top_k(probs, self.top_k)
        real = context.mask.reshape(-1)
        loss = self.z_weight * z_loss(scores, real)
        loss += self.balance_weight * balance_loss(probs, indices, real)
        weights = gather_gates(probs, indices, renormalize=self.renormalize)
        return make_routing(indices, weights, probs, context.mask, aux_loss=loss)


class SwitchRouter(SoftmaxRouter):
    """The softmax router with the Switch balance loss, α = 0.01 (arXiv 2101.03961)."""

    OPTIONS: ClassVar[frozenset[str]] = SoftmaxRouter.OPTIONS | {"balance_weight"}
    BALANCE_WEIGHT: ClassVar[float] = 0.01


def balance_loss(probs: Array, indices: Array, real: Array) -> Array:
    """E Σ_k f_k P_k (arXiv 2101.03961, equation 4), 1 at balance.

    f_k is the share of the assignments that expert k gets (no gradient), P_k the mean of its
    probability over tokens. Not linear in the batch: its value, and so its gradient, depends on how
    a batch is split into microbatches.

    Args:
        probs: [T,E].
        indices: [T,K].
        real: [T] bool.
    """
    E = probs.shape[-1]
    load = count(indices, real, E)
    share = load / jnp.maximum(jnp.sum(load), 1.0)
    total = jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1.0)
    mean_prob = jnp.sum(jnp.where(real[:, None], probs, 0.0), axis=0) / total
    return E * jnp.sum(share * mean_prob)


def z_loss(scores: Array, real: Array) -> Array:
    """Mean over tokens of logsumexp(scores)² (arXiv 2202.08906, equation 5).

    Over microbatches of unequal numbers of real tokens the mean of means is not this mean: with
    padding, its value depends on how a batch is split.
    """
    return mean_over(jnp.square(jax.nn.logsumexp(scores, axis=-1)), real)


class LossFreeRouter(Router):
    """Loss-free balancing (arXiv 2408.15664): a bias in the selection, none in the gates.

    s = sigmoid(h W) (or softmax); the K largest s + b are chosen, the gates are their s. After each
    step b ← b + u sign(mean load - load). The gates are renormalised only with `renormalize`.

    Attributes:
        kernel: W [D,E].
        bias: b [E], running state.
    """

    OPTIONS: ClassVar[frozenset[str]] = frozenset({"score", "renormalize", "bias_rate"})
    BIAS_RATE: ClassVar[float] = 0.001

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        options = router_options(
            config, LossFreeRouter, score="sigmoid", renormalize=False, bias_rate=self.BIAS_RATE
        )
        self.top_k = config.top_k
        self.score = options["score"]
        self.renormalize = options["renormalize"]
        self.kernel = init_kernel(rngs, width, config.experts)
        self.bias = RouterState(jnp.zeros((config.experts,), jnp.float32))

    def __call__(self, tokens: Array, context: Context) -> Routing:
        """Routes tokens [T,D]; see the class."""
        scores = linear(tokens, self.kernel[...])
        gates, probs = gates_of(scores, self.score)
        indices = select_top_k(gates + self.bias[...][None, :], self.top_k)
        weights = gather_gates(gates, indices, renormalize=self.renormalize)
        return make_routing(indices, weights, probs, context.mask)

    @staticmethod
    def update(config: MoEConfig, state: State, stats: dict[str, Array], progress: Array) -> State:
        """Bias b ← b + u sign(mean load - load), elementwise over stacked layers [...,E]."""
        given = config.routing.bias_rate
        rate = LossFreeRouter.BIAS_RATE if given is None else given
        load = stats["load"]
        gap = jnp.mean(load, axis=-1, keepdims=True) - load
        return {"bias": state["bias"] + rate * jnp.sign(gap)}
