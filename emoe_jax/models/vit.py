"""Vision Transformer with Mixture-of-Experts blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.config import ViTConfig, require
from emoe_jax.layers import LayerNorm, Linear, PatchEmbed
from emoe_jax.models.stack import Stack
from emoe_jax.moe import Aux

Array = jax.Array

POSITION_STD = 0.5
"""Deviation of the initial positions. Patches of normalised images embed to about unit variance, in
which ViT's 0.02 (arXiv 2010.11929) drowns: trained from scratch on digits for 600 steps, positions
of 0.02 reach 81 % and positions of 0.5 reach 98 %."""

CLASS_TOKEN_STD = 0.02
"""Deviation of the initial class token (arXiv 2010.11929, and timm)."""


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
        position: [S,D], the class token's first.
        class_token: [1,D], only with pooling "class".
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        D = config.width
        self.pools_class = config.pooling == "class"
        count = (config.image_size // config.patch) ** 2 + self.pools_class
        self.patches = PatchEmbed(config.patch, config.channels, D, config.dtype, rngs=rngs)
        self.position = nnx.Param(
            POSITION_STD * jax.random.normal(rngs.params(), (count, D), jnp.float32)
        )
        if self.pools_class:
            self.class_token = nnx.Param(
                CLASS_TOKEN_STD * jax.random.normal(rngs.params(), (1, D), jnp.float32)
            )
        self.blocks = Stack(config, rngs=rngs)
        self.norm = LayerNorm(D)
        self.head = Linear(D, config.classes, "float32", bias=True, rngs=rngs)

    def __call__(
        self,
        images: Array,
        *,
        mask: Array | None = None,
        rows: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, dict[str, Aux]]:
        """Class logits.

        Args:
            images: [B,height,width,channels] float32, normalised.
            mask: [B] bool, False for images that only pad the batch, which no router counts.
            rows: [B] int32, position of each image in the global batch.
            key: random key for routers that need one.

        Returns:
            Logits [B,N] float32, and the `Aux` of the expert layers (see `Stack`).

        Raises:
            ValueError: the images have another size than the model.
        """
        size, channels = self.config.image_size, self.config.channels
        require(
            images.shape[1:] == (size, size, channels),
            f"images have shape {images.shape[1:]}, the model takes ({size}, {size}, {channels});"
            " resize them, or set image_size and channels",
        )
        x = self.patches(images)
        B = x.shape[0]
        if self.pools_class:
            first = jnp.broadcast_to(self.class_token[...], (B, 1, x.shape[2]))
            x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
        x = x + self.position[...].astype(x.dtype)
        S = x.shape[1]
        order = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        rows = jnp.arange(B, dtype=jnp.int32) if rows is None else rows
        real = jnp.ones((B,), jnp.int32) if mask is None else mask.astype(jnp.int32)
        segments = jnp.broadcast_to(real[:, None], (B, S))
        x, aux = self.blocks(x, order, segments, order, rows, key)
        x = self.norm(x)
        pooled = x[:, 0] if self.pools_class else jnp.mean(x.astype(jnp.float32), axis=1)
        return self.head(pooled), aux
