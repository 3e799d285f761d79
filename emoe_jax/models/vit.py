"""Vision Transformer with Mixture-of-Experts blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.config import ViTConfig, require
from emoe_jax.layers import LayerNorm, Linear, PatchEmbed
from emoe_jax.models.stack import Stack, block_numbers
from emoe_jax.moe import Aux

Array = jax.Array

POSITION_STD = 0.5
"""Deviation of the initial positions. Patches of normalised images embed to about unit variance, in
which ViT's 0.02 (arXiv 2010.11929) drowns: trained from scratch on digits for 600 steps, positions
of 0.02 reach 81 % and positions of 0.5 reach 98 %."""

PREFIX_STD = 0.02
"""Deviation of the initial class, distillation and register tokens (arXiv 2010.11929)."""


class EMoEViT(nnx.Module):
    """Patches, learned positions, blocks, norm, pooling, head (arXiv 2010.11929).

    Experts replace the MLP of the chosen blocks, or follow them as the paper's adapter branch; see
    `ViTConfig.moe_form`.

    Example:
        model = EMoEViT(ViTConfig(image_size=8, patch=2), rngs=nnx.Rngs(0))
        logits, aux = model(images)  # images [B,8,8,1], logits [B,10]

    Args:
        config: sizes and options.
        rngs: initial weights are drawn from its stream `params`.

    Attributes:
        position: [S,D], those of class, distillation and register tokens first if they have any.
        class_token: [1,D], only with `ViTConfig.has_class_token`.
        distillation_token: [1,D], only with `ViTConfig.distilled`, and `head_distilled` with it.
        registers: [n,D], only with `ViTConfig.registers`.
        norm: the last norm, before the pooling; `norm_pooled` with `ViTConfig.norm_after_pooling`.
        head: D to N, only with `ViTConfig.classes`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        D = config.width

        def normal(count: int, std: float) -> nnx.Param[Array]:
            return nnx.Param(std * jax.random.normal(rngs.params(), (count, D), jnp.float32))

        count = (config.image_size // config.patch) ** 2
        self.patches = PatchEmbed(config.patch, config.channels, D, config.dtype, rngs=rngs)
        self.position = normal(count + config.prefix * config.embed_prefix, POSITION_STD)
        if config.has_class_token:
            self.class_token = normal(1, PREFIX_STD)
        if config.distilled:
            self.distillation_token = normal(1, PREFIX_STD)
        if config.registers:
            self.registers = normal(config.registers, PREFIX_STD)
        self.blocks = Stack(config, rngs=rngs)
        if config.norm_after_pooling:
            self.norm_pooled = LayerNorm(D)
        else:
            self.norm = LayerNorm(D)
        if config.classes:
            self.head = Linear(D, config.classes, "float32", bias=True, rngs=rngs)
        if config.classes and config.distilled:
            self.head_distilled = Linear(D, config.classes, "float32", bias=True, rngs=rngs)

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        capture: bool = False,
        mask: Array | None = None,
        rows: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Any, ...]:
        """Class logits.

        Args:
            images: [B,height,width,channels] float32, normalised.
            train: whether this is a training pass over weights that `basis.prepare_bases` did not
                prepare (the training program prepares them); see `routers.base.Context`.
            capture: whether to return the routing of every expert layer.
            mask: [B] bool, False for images that only pad the batch, which no router counts.
            rows: [B] int32, position of each image in the global batch.
            key: random key for routers that need one.

        Returns:
            Logits [B,N] float32 (pooled features [B,D] of a model without classes), and the `Aux`
            of the expert layers (see `Stack`), whose losses `moe.auxiliary_loss` adds up. With
            `capture` also a dict: for each block i with experts "router.i.input" [B,S',D],
            "router.i.probs" [B,S',E], "router.i.weights" and "router.i.indices" [B,S',K]; in the
            adapter form "branch.i.input" and "branch.i.output" [B,S,D]. S' leaves out the class
            token where it is not routed.

        Raises:
            ValueError: the images have another size than the model.
        """
        config = self.config
        size, channels = config.image_size, config.channels
        require(
            images.shape[1:] == (size, size, channels),
            f"images have shape {images.shape[1:]}, the model takes ({size}, {size}, {channels});"
            " resize them, or set image_size and channels",
        )
        x = self._embed(images)
        B, S, _ = x.shape
        order = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        rows = jnp.arange(B, dtype=jnp.int32) if rows is None else rows
        real = jnp.ones((B,), jnp.int32) if mask is None else mask.astype(jnp.int32)
        segments = jnp.broadcast_to(real[:, None], (B, S))
        x, aux = self.blocks(x, order, segments, order, rows, key, train=train, capture=capture)
        logits = self._classify(x)
        if not capture:
            return logits, aux
        return logits, _without_captured(aux), _captured(config, aux)

    def _embed(self, images: Array) -> Array:
        """Tokens [B,S,D]: the prefix, then patches, with their positions."""
        config = self.config
        x = self.patches(images)
        position = self.position[...].astype(x.dtype)
        names = {
            "class_token": config.has_class_token,
            "distillation_token": config.distilled,
            "registers": config.registers > 0,
        }
        prefix = [
            getattr(self, name)[...].astype(x.dtype) for name, there in names.items() if there
        ]
        if not prefix:
            return x + position
        first = jnp.concatenate(prefix)
        first = jnp.broadcast_to(first, (x.shape[0], *first.shape))
        if config.embed_prefix:
            return jnp.concatenate([first, x], axis=1) + position
        return jnp.concatenate([first, x + position], axis=1)

    def _classify(self, x: Array) -> Array:
        config = self.config
        if not config.norm_after_pooling:
            x = self.norm(x)
        if config.pooling == "class":
            pooled = x[:, 0]
        else:
            pooled = jnp.mean(x[:, config.prefix :].astype(jnp.float32), axis=1)
        if config.norm_after_pooling:
            pooled = self.norm_pooled(pooled)
        if not config.classes:
            return pooled.astype(jnp.float32)
        if not config.distilled:
            return self.head(pooled)
        return (self.head(pooled) + self.head_distilled(x[:, 1])) / 2


def _without_captured(aux: dict[str, Aux]) -> dict[str, Aux]:
    return {place: layer._replace(captured=None) for place, layer in aux.items()}


def _captured(config: ViTConfig, aux: dict[str, Aux]) -> dict[str, Array]:
    """What the layers captured, by block number."""
    named = {}
    for place, blocks in block_numbers(config).items():
        for key, stacked in (aux[place].captured or {}).items():
            part, _, name = key.rpartition("_")
            for repeat, block in enumerate(blocks):
                named[f"{part or 'router'}.{block}.{name}"] = stacked[repeat]
    return named
