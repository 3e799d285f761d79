"""Routers for comparison: expert choice, hash, random, soft."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from emoe_jax.config import MoEConfig, require
from emoe_jax.routers.base import (
    Context,
    ExpertChoice,
    Router,
    Routing,
    linear,
    make_routing,
    router_options,
    select_top_k,
    top_k_of_rows,
)
from emoe_jax.routers.softmax import init_kernel

Array = jax.Array


class ExpertChoiceRouter(Router):
    """Each expert takes the S·K/E best tokens of each sequence (arXiv 2202.09368).

    p = softmax(h W) over experts; expert k takes the tokens with the largest p_k, at least one,
    and p_k is the gate. Not causal: whether a token is taken depends on later ones, so a language
    model refuses this router unless `routing.acausal` says that this is meant.

    Attributes:
        kernel: W [D,E].
    """

    OPTIONS: ClassVar[frozenset[str]] = frozenset({"acausal"})
    CAUSAL: ClassVar[bool] = False

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        router_options(config, ExpertChoiceRouter)
        self.experts, self.top_k = config.experts, config.top_k
        self.kernel = init_kernel(rngs, width, config.experts)

    def __call__(self, tokens: Array, context: Context) -> ExpertChoice:
        """Routes tokens [T,D]; see the class."""
        B, S = context.mask.shape
        E = self.experts
        probs = jax.nn.softmax(linear(tokens, self.kernel[...]), axis=-1)
        taken = max(1, -(-S * self.top_k // E))
        ranked = jnp.where(context.mask[..., None], probs.reshape(B, S, E), -1.0)
        weights, positions = top_k_of_rows(ranked.transpose(0, 2, 1), min(taken, S))
        chosen = positions + S * jnp.arange(B, dtype=jnp.int32)[:, None, None]
        chosen = chosen.transpose(1, 0, 2)
        weights = jnp.maximum(weights, 0.0).transpose(1, 0, 2)
        return ExpertChoice(
            chosen.reshape(E, -1),
            weights.reshape(E, -1),
            probs,
            jnp.zeros((), jnp.float32),
            {},
            _expert_choice_stats(weights.reshape(E, -1), chosen.reshape(E, -1), context.mask),
        )


def _expert_choice_stats(weights: Array, tokens: Array, mask: Array) -> dict[str, Array]:
    """Loads count real tokens only; `gate` sums each token's largest gate."""
    real = mask.reshape(-1)
    largest = jnp.zeros(real.shape, jnp.float32).at[tokens.reshape(-1)].max(weights.reshape(-1))
    stats = {
        "tokens": jnp.sum(real, dtype=jnp.float32),
        "load": jnp.sum(real[tokens], axis=-1, dtype=jnp.float32),
        "gate": jnp.sum(largest),
    }
    return lax.stop_gradient(stats)


class HashRouter(Router):
    """Experts by a fixed hash of the token's id (hash layers, arXiv 2106.04426); gates 1/K.

    Needs `Context.ids`. The K experts of an id follow each other from the hashed one on.
    """

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        router_options(config, HashRouter)
        self.experts, self.top_k = config.experts, config.top_k

    def __call__(self, tokens: Array, context: Context) -> Routing:
        """Routes tokens [T,D]; see the class.

        Raises:
            ValueError: no ids are given.
        """
        if context.ids is None:
            raise ValueError("the hash router needs the tokens' ids; pass ids [B,S] to the layer")
        first = _mix(context.ids.reshape(-1)) % jnp.uint32(self.experts)
        return _fixed_routing(first.astype(jnp.int32), self.experts, self.top_k, context.mask)


def _mix(ids: Array) -> Array:
    """The finaliser of MurmurHash3: every input bit changes every output bit with chance one half.

    Args:
        ids: int32 of any shape.

    Returns:
        uint32 of that shape.
    """
    x = ids.astype(jnp.uint32)
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def _fixed_routing(first: Array, experts: int, k: int, mask: Array) -> Routing:
    """K experts in sequence from `first` [T], with gates 1/K and a uniform distribution."""
    steps = jnp.arange(k, dtype=jnp.int32)
    indices = (first[:, None] + steps[None, :]) % jnp.int32(experts)
    weights = jnp.full(indices.shape, 1.0 / k, jnp.float32)
    probs = jnp.full((first.shape[0], experts), 1.0 / experts, jnp.float32)
    return make_routing(indices, weights, probs, mask)


class RandomRouter(Router):
    """K different experts at random for each token, gates 1/K: a control.

    Needs `Context.key`. Each sequence folds its position in the global batch into the key, so the
    choice depends neither on microbatches nor on the mesh.
    """

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        router_options(config, RandomRouter)
        self.experts, self.top_k = config.experts, config.top_k

    def __call__(self, tokens: Array, context: Context) -> Routing:
        """Routes tokens [T,D]; see the class.

        Raises:
            ValueError: no key is given.
        """
        if context.key is None:
            raise ValueError("the random router needs a random key; pass key to the layer")
        B, S = context.mask.shape
        rows = jnp.arange(B, dtype=jnp.int32) if context.rows is None else context.rows
        keys = jax.vmap(jax.random.fold_in, (None, 0))(context.key, rows)
        draws = jax.vmap(lambda key: jax.random.uniform(key, (S, self.experts)))(keys)
        indices = select_top_k(draws.reshape(B * S, self.experts), self.top_k)
        weights = jnp.full(indices.shape, 1.0 / self.top_k, jnp.float32)
        probs = jnp.full((B * S, self.experts), 1.0 / self.experts, jnp.float32)
        return make_routing(indices, weights, probs, context.mask)


class SoftRouter(Router):
    """Every expert for every token, with the gates p = softmax(h W): K = E.

    Attributes:
        kernel: W [D,E].
    """

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        router_options(config, SoftRouter)
        require(
            config.top_k == config.experts,
            f"the soft router uses all experts={config.experts}, but top_k={config.top_k}; set"
            f" top_k to {config.experts}",
        )
        self.experts = config.experts
        self.kernel = init_kernel(rngs, width, config.experts)

    def __call__(self, tokens: Array, context: Context) -> Routing:
        """Routes tokens [T,D]; see the class."""
        probs = jax.nn.softmax(linear(tokens, self.kernel[...]), axis=-1)
        order = jnp.arange(self.experts, dtype=jnp.int32)
        indices = jnp.broadcast_to(order, (tokens.shape[0], self.experts))
        return make_routing(indices, probs, probs, context.mask)
