"""Blocks over the depth of a model: stacked and scanned where their pattern is periodic.

The blocks of a periodic pattern (say dense, experts, dense, experts) are kept as one module per
place in the period, whose arrays have a leading axis over the repeats, and run as a scan. A listed
pattern has one repeat and is unrolled. Block `repeat · period + place` of the model is
`groups[place]` at `repeat`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.attention import Attention
from emoe_jax.config import LMConfig, MoEConfig, ViTConfig, moe_layers
from emoe_jax.layers import MLP, LayerNorm, RMSNorm
from emoe_jax.moe import Aux, MoE
from emoe_jax.remat import remat
from emoe_jax.routers import router_class
from emoe_jax.sharding import split_batch

Array = jax.Array
Tree = Any


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm x), then + MLP or experts of norm x.

    In the adapter form (ViT) the block has an MLP, and experts follow as a branch
    h + alpha · MoE(h) that the class token passes by unless `ViTConfig.route_class` (EMoE, arXiv
    2601.12137, as released). With `ViTConfig.layer_scale` the factors `scale_attention` and
    `scale_mlp` [D] stand before the sums.

    Args:
        config: of the whole model.
        experts: whether this block has experts.
        rngs: for the initial weights.
    """

    def __init__(self, config: LMConfig | ViTConfig, experts: bool, *, rngs: nnx.Rngs) -> None:
        lm, D = isinstance(config, LMConfig), config.width
        norm = RMSNorm if lm else LayerNorm
        self.adapter = experts and isinstance(config, ViTConfig) and config.moe_form == "adapter"
        self.skips_class = (
            isinstance(config, ViTConfig) and config.has_class_token and not config.route_class
        )
        # Images are not packed: a token sees its whole image, and no mask is needed to say so.
        self.packed = lm
        self.layer_scale = isinstance(config, ViTConfig) and config.layer_scale > 0
        if isinstance(config, ViTConfig) and self.layer_scale:
            self.scale_attention = nnx.Param(jnp.full((D,), config.layer_scale, jnp.float32))
            self.scale_mlp = nnx.Param(jnp.full((D,), config.layer_scale, jnp.float32))
        self.experts = experts
        self.norm_attention = norm(D)
        self.attention = _make_attention(config, rngs)
        self.norm_mlp = norm(D)
        if not experts or self.adapter:
            activation = "swiglu" if lm else "gelu"
            self.mlp = MLP(
                D,
                config.mlp_hidden,
                activation,
                config.dtype,
                bias=not lm,
                out_scale=residual_scale(config),
                rngs=rngs,
            )
        if experts:
            scale = residual_scale(config)
            self.moe = MoE(config.moe, D, dtype=config.dtype, out_scale=scale, rngs=rngs)
        if self.adapter:
            self.alpha = nnx.Param(jnp.ones((), jnp.float32))

    def __call__(
        self, x: Array, positions: Array, segments: Array, extra: dict[str, Any]
    ) -> tuple[Array, Aux | None]:
        """Maps x [B,S,D] to its successor; `extra` holds what the experts are given besides."""
        x = split_batch(x)
        visible = segments if self.packed else None
        mixed = self.attention(self.norm_attention(x), positions, visible)
        return self._mix(x + self._scaled(mixed, "scale_attention"), segments > 0, extra)

    def first(
        self, x: Array, positions: Array, segments: Array, extra: dict[str, Any], read: int
    ) -> tuple[Array, Aux | None]:
        """The first `read` tokens of the successor, [B,read,D], where `tokens_read` gives `read`.

        A branch that these tokens pass by runs for the sake of `Aux` alone: where nobody looks at
        that, the compiler drops it.
        """
        x = split_batch(x)
        mixed = self.attention.first(self.norm_attention(x), positions, read)
        few = x[:, :read] + self._scaled(mixed, "scale_attention")
        few = few + self._scaled(self.mlp(self.norm_mlp(few)), "scale_mlp")
        return few, self(x, positions, segments, extra)[1] if self.adapter else None

    def decode(
        self, x: Array, cache: dict[str, Array], start: Array, extra: dict[str, Any]
    ) -> tuple[Array, dict[str, Array]]:
        """The same for S new positions behind a cache of keys and values."""
        mixed, cache = self.attention.decode(self.norm_attention(x), cache, start)
        x, _ = self._mix(x + mixed, jnp.ones(x.shape[:2], bool), extra)
        return x, cache

    def _mix(self, x: Array, mask: Array, extra: dict[str, Any]) -> tuple[Array, Aux | None]:
        if self.experts and not self.adapter:
            out, aux = self.moe(self.norm_mlp(x), mask=mask, **extra)
            return x + self._scaled(out, "scale_mlp"), aux
        x = x + self._scaled(self.mlp(self.norm_mlp(x)), "scale_mlp")
        return self._branch(x, mask, extra) if self.adapter else (x, None)

    def _branch(self, x: Array, mask: Array, extra: dict[str, Any]) -> tuple[Array, Aux]:
        first = 1 if self.skips_class else 0
        extra = extra | {"ids": extra["ids"][:, first:]}
        out, aux = self.moe(x[:, first:], mask=mask[:, first:], **extra)
        branch = self.alpha[...].astype(x.dtype) * out
        after = x.at[:, first:].add(branch)
        if aux.captured is None:
            return after, aux
        whole = {"branch_input": x, "branch_output": after}
        return after, aux._replace(captured=aux.captured | whole)

    def _scaled(self, x: Array, name: str) -> Array:
        return getattr(self, name)[...].astype(x.dtype) * x if self.layer_scale else x


def _make_attention(config: LMConfig | ViTConfig, rngs: nnx.Rngs) -> Attention:
    """Causal and rotary for language models; bidirectional, with biases, for images."""
    lm = isinstance(config, LMConfig)
    norm = RMSNorm if lm else LayerNorm
    return Attention(
        config.width,
        config.heads,
        config.kv_heads if isinstance(config, LMConfig) and config.kv_heads else config.heads,
        config.head_dim or config.width // config.heads,
        causal=lm,
        rope_base=config.rope_base if isinstance(config, LMConfig) else None,
        qk_norm=norm if config.qk_norm else None,
        bias=isinstance(config, ViTConfig) and config.qkv_bias,
        out_bias=not lm,
        implementation=config.attention,
        dtype=config.dtype,
        out_scale=residual_scale(config),
        rngs=rngs,
    )


def residual_scale(config: LMConfig | ViTConfig) -> float:
    """1/sqrt(2 L): factor of the initial matrices that write to the residual stream (GPT-2).

    The 2 L branches of L blocks then add up to about unit variance.
    """
    return float((2 * config.depth) ** -0.5)


class Stack(nnx.Module):
    """All blocks of a model.

    Attributes:
        groups: one `Block` per place in the period, its arrays stacked over the repeats.
    """

    def __init__(self, config: LMConfig | ViTConfig, *, rngs: nnx.Rngs) -> None:
        pattern = moe_layers(config)
        self.period = _period(config, pattern)
        self.repeats = len(pattern) // self.period
        self.remat = config.remat
        self.read = tokens_read(config)
        blocks = [Block(config, experts, rngs=rngs) for experts in pattern]
        self.groups = nnx.List(
            [_stack_modules(blocks[place :: self.period]) for place in range(self.period)]
        )

    def __call__(
        self,
        x: Array,
        positions: Array,
        segments: Array,
        ids: Array,
        rows: Array,
        key: Array | None,
        *,
        train: bool = False,
        capture: bool = False,
    ) -> tuple[Array, dict[str, Aux]]:
        """Runs all blocks.

        Args:
            x: [B,S,D].
            positions: [B,S] int32.
            segments: [B,S] int32, 0 for padding.
            ids: [B,S] int32.
            rows: [B] int32.
            key: random key, or None.
            train: see `routers.base.Context`.
            capture: whether `Aux.captured` is wanted; all tokens are computed then.

        Returns:
            [B,S,D], or of the first tokens alone where `tokens_read` says so; and for each place in
            the period that has experts, by its number as a string, their `Aux` with a leading axis
            over the repeats.
        """
        read = None if capture else self.read

        def step(block: Block, carry: Array, place: int, layer: Array, _: Any) -> Any:
            fold = None if key is None else jax.random.fold_in(key, layer)
            extra = {"ids": ids, "rows": rows, "key": fold, "train": train, "capture": capture}
            if read is not None and place == self.period - 1:
                return block.first(carry, positions, segments, extra, read)
            return block(carry, positions, segments, extra)

        x, auxes = self._run(x, step, None)
        return x, {place: aux for place, aux in auxes.items() if aux is not None}

    def decode(
        self, x: Array, caches: Tree, start: Array, ids: Array, key: Array | None
    ) -> tuple[Array, Tree]:
        """Runs all blocks on S new positions behind caches, see `init_cache`."""
        rows = jnp.arange(x.shape[0], dtype=jnp.int32)

        def step(block: Block, carry: Array, place: int, layer: Array, cache: Any) -> Any:
            fold = None if key is None else jax.random.fold_in(key, layer)
            return block.decode(carry, cache, start, {"ids": ids, "rows": rows, "key": fold})

        return self._run(x, step, caches)

    def init_cache(self, batch: int, length: int, dtype: str) -> Tree:
        """Empty caches of keys and values for `length` positions of `batch` sequences."""
        attention = self.groups[0].attention
        shape = (self.repeats, batch, length, attention.kv_heads, attention.head_dim)
        empty = {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
        return {str(place): empty for place in range(self.period)}

    def _run(self, x: Array, step: Callable[..., Any], inputs: Tree) -> tuple[Array, Tree]:
        """Threads x through step(block, x, place, layer, input) for all blocks in order.

        Args:
            x: the carry.
            step: returns the new carry and an output.
            inputs: per place, trees with a leading axis over repeats; or None.

        Returns:
            The last carry, and per place the outputs with a leading axis over repeats.
        """
        split = [nnx.split(group) for group in self.groups]
        states = {str(place): state for place, (_, state) in enumerate(split)}

        def body(carry: Array, xs: Any) -> tuple[Array, Tree]:
            repeat, states, inputs = xs
            outputs = {}
            for place, (graph, _) in enumerate(split):
                name = str(place)

                def run(
                    state: Any, carry: Array, given: Any, place: int = place, graph: Any = graph
                ) -> Any:
                    layer = repeat * self.period + place
                    return step(nnx.merge(graph, state), carry, place, layer, given)

                given = None if inputs is None else inputs[name]
                carry, outputs[name] = remat(run, self.remat)(states[name], carry, given)
            return carry, outputs

        xs = (jnp.arange(self.repeats, dtype=jnp.int32), states, inputs)
        if self.repeats > 1:
            return jax.lax.scan(body, x, xs)
        x, outputs = body(x, jax.tree.map(lambda leaf: leaf[0], xs))
        return x, jax.tree.map(lambda leaf: leaf[None], outputs)


def update_router_state(
    config: MoEConfig, router: Tree, aux: dict[str, Aux], progress: Array
) -> Tree:
    """The routers' state of the next step.

    Args:
        config: of the expert layers.
        router: running state of a whole model, as nested dicts; empty where there is none.
        aux: of an optimizer step, its statistics summed over microbatches.
        progress: [] float32, the share of the training's steps that are done; 1 + n at the n-th
            batch after them, which moves nothing but this state.
    """
    if not router:
        return router
    update = router_class(config.router).update
    groups = router["blocks"]["groups"]
    new = {
        place: {
            "moe": {"router": update(config, groups[place]["moe"]["router"], layer.stats, progress)}
        }
        for place, layer in aux.items()
    }
    return {"blocks": {"groups": new}}


def block_numbers(config: LMConfig | ViTConfig) -> dict[str, tuple[int, ...]]:
    """Numbers of the expert layers' blocks for each place of `Stack`, by repeat."""
    pattern = moe_layers(config)
    period = _period(config, pattern)
    return {
        str(place): tuple(range(place, len(pattern), period))
        for place in range(period)
        if pattern[place]
    }


def layer_names(config: LMConfig | ViTConfig) -> dict[str, tuple[str, ...]]:
    """Names "layer_03" of the expert layers, counted by block, for each place of `Stack`."""
    numbers = block_numbers(config).items()
    return {place: tuple(f"layer_{i:02d}" for i in blocks) for place, blocks in numbers}


def tokens_read(config: LMConfig | ViTConfig) -> int | None:
    """How many tokens of the last block's result, from the first on, are computed; None is all.

    A class token (and a distillation token) is all that a head reads. What the others become in the
    last block matters to nobody, unless that block's experts route them together with those that
    are read. Blocks of a scan are all alike.
    """
    pattern = moe_layers(config)
    if not isinstance(config, ViTConfig) or config.pooling != "class":
        return None
    if _period(config, pattern) != len(pattern):
        return None
    passed_by = config.moe_form == "adapter" and not (config.route_class or config.distilled)
    return 1 + config.distilled if passed_by or not pattern[-1] else None


def idle_places(config: LMConfig | ViTConfig) -> tuple[str, ...]:
    """Places of `Stack` whose experts no output depends on, by number as a string.

    That is the branch of the last block where the class token, which alone is read, passes it by,
    as in the paper's release.
    """
    pattern = moe_layers(config)
    idle = pattern[-1] and tokens_read(config) is not None
    return (str(len(pattern) - 1),) if idle else ()


def _period(config: LMConfig | ViTConfig, pattern: tuple[bool, ...]) -> int:
    """The period of the pattern where `moe_every` made it; the whole depth where it was listed."""
    if config.moe_blocks:
        return len(pattern)
    return max(config.moe_every, 1)


def _stack_modules(modules: list[Block]) -> Block:
    """One module whose arrays are those of `modules`, stacked on a new first axis."""
    split = [nnx.split(module) for module in modules]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[state for _, state in split])
    return nnx.merge(split[0][0], stacked)
