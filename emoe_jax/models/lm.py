"""Decoder language model with Mixture-of-Experts blocks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.config import LMConfig, require
from emoe_jax.layers import RMSNorm, row_product
from emoe_jax.losses import chunked_cross_entropy
from emoe_jax.models.stack import Stack
from emoe_jax.moe import Aux
from emoe_jax.routers import router_class
from emoe_jax.sharding import gathered, split_batch

Array = jax.Array
Tree = Any

HEAD_STD = 0.02
"""Deviation of an initial output head that is not tied (GPT-2's)."""


class EMoELM(nnx.Module):
    """Pre-norm decoder: token embedding, blocks of attention and experts, norm, head.

    Example:
        model = EMoELM(LMConfig(vocab_size=256, width=64), rngs=nnx.Rngs(0))
        logits, aux = model(tokens)  # tokens [B,S] int32, logits [B,S,256]

    Args:
        config: sizes and options.
        rngs: initial weights are drawn from its stream `params`.

    Raises:
        ValueError: the router looks at later tokens and `routing.acausal` does not say that this is
            meant; or another error of the configuration.

    Attributes:
        embedding: [N,D].
        head: [N,D], only where the head is not tied.
    """

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs) -> None:
        router = config.moe.router
        require(
            router_class(router).CAUSAL or bool(config.moe.routing.acausal),
            f"router={router!r} lets the route of a token depend on later tokens, so a language"
            " model trained with it cannot generate; choose another router, or set"
            " routing.acausal to True if you only want to compare",
        )
        self.config = config
        shape = (config.vocab_size, config.width)
        # Tokens enter the blocks with unit variance. A tied embedding is scaled up on the way in,
        # so that as a head it starts with logits of unit variance.
        std = config.width**-0.5 if config.tie_head else 1.0
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.blocks = Stack(config, rngs=rngs)
        self.norm = RMSNorm(config.width)
        if not config.tie_head:
            self.head = nnx.Param(HEAD_STD * jax.random.normal(rngs.params(), shape, jnp.float32))

    def __call__(self, tokens: Array, **context: Any) -> tuple[Array, dict[str, Aux]]:
        """Logits [B,S,N] float32 of the token after each position; see `features`."""
        hidden, aux = self.features(tokens, **context)
        return self.logits(hidden), aux

    def features(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segments: Array | None = None,
        rows: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, dict[str, Aux]]:
        """Hidden states before the head.

        Args:
            tokens: [B,S] int32 in [0,N).
            positions: [B,S] int32, position in the document; 0 to S-1 where omitted.
            segments: [B,S] int32, which document of the row, from 1; 0 is padding. One document
                where omitted.
            rows: [B] int32, position of each row in the global batch.
            key: random key for routers that need one.

        Returns:
            [B,S,D] in the compute dtype, and the `Aux` of the expert layers (see `Stack`).
        """
        B, S = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        if segments is None:
            segments = jnp.ones((B, S), jnp.int32)
        if rows is None:
            rows = jnp.arange(B, dtype=jnp.int32)
        x = self._embed(tokens)
        x, aux = self.blocks(x, positions, segments, tokens, rows, key)
        return self.norm(split_batch(x)), aux

    def logits(self, hidden: Array) -> Array:
        """Logits [...,N] float32 of hidden states [...,D]; for training there is `nll`."""
        head = gathered(self._output()[...].astype(hidden.dtype), "head")
        return row_product(hidden, head.T)

    def nll(
        self, batch: dict[str, Array], weights: Array, key: Array | None = None
    ) -> tuple[Array, dict[str, Aux]]:
        """Weighted sum of negative log-likelihoods in nats; never holds all logits.

        Args:
            batch: `tokens`, `targets`, `segments`, `positions` [B,S] int32 and `rows` [B].
            weights: [B,S] float32, zero for targets that do not count.
            key: as in `features`.
        """
        hidden, aux = self.features(
            batch["tokens"],
            positions=batch["positions"],
            segments=batch["segments"],
            rows=batch["rows"],
            key=key,
        )
        head, chunk = self._output()[...], self.config.loss_chunk
        return chunked_cross_entropy(hidden, head, batch["targets"], weights, chunk), aux

    def init_cache(self, batch: int, length: int) -> Tree:
        """Empty key-value caches for `decode`, for up to `length` positions."""
        return self.blocks.init_cache(batch, length, self.config.dtype)

    def decode(
        self, tokens: Array, cache: Tree, start: Array, key: Array | None = None
    ) -> tuple[Array, Tree]:
        """Continues documents: logits for S new tokens behind `start` cached positions.

        Args:
            tokens: [B,S] int32, positions start to start+S-1.
            cache: from `init_cache` or the last call.
            start: [] int32, positions already in the cache.
            key: random key for routers that need one.

        Returns:
            Logits [B,S,N] float32 and the cache with the new positions.
        """
        x = self._embed(tokens)
        x, cache = self.blocks.decode(x, cache, start, tokens, key)
        return self.logits(self.norm(x)), cache

    def _embed(self, tokens: Array) -> Array:
        x = gathered(self.embedding[...], "embedding")[tokens]
        if self.config.tie_head:
            x = x * math.sqrt(self.config.width)
        return x.astype(self.config.dtype)

    def _output(self) -> nnx.Param[Array]:
        """The head [N,D]: with `tie_head` the embedding, which lies as a head does on a mesh."""
        return self.embedding if self.config.tie_head else self.head
