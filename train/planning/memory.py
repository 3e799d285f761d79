"""Memory of a device in the training step, by formula, in bytes: no compiler.

What lives through the step (parameters, optimizer, batch) follows exactly from the abstract state
and its shardings. What the step needs besides is a model of XLA's schedule on TPU:

    kept activations + gradients + vocabulary + the largest of attention's, experts', loss's scratch

Its coefficients, `Scratch`, were read off the compiler's own buffer assignments; docs/planning.md
has the comparison with `memory_analysis()`, which is what counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from emoe_jax import pure
from emoe_jax.config import LMConfig, ViTConfig, moe_layers
from emoe_jax.dispatch.exchange import choose_exchange
from emoe_jax.dispatch.transport import TRANSPORTS
from emoe_jax.losses import chunk_positions
from emoe_jax.sharding import AXES, spec
from train.config import ExperimentConfig
from train.data.config import TextConfig
from train.flops import active_parameters, flops_per_unit, image_tokens
from train.run import model_maker


@dataclasses.dataclass(frozen=True)
class Scratch:
    """How many arrays of a kind are alive at once where the step needs most.

    Attributes:
        scores: float32 arrays [b,H,S,S] of attention that is not fused.
        again: the same where the whole block is computed again ("full", "exchange").
        hidden: float32 arrays [t,D] beside them.
        rows: arrays [rows,D] in the compute dtype while experts are differentiated.
        inner: arrays [rows,F], likewise.
        weights: copies of one layer's gathered experts in the compute dtype.
        vocabulary: float32 arrays [N,D] of the embedding's and head's gradients.
        logits: float32 arrays [loss_chunk,N] while the loss is differentiated.
    """

    scores: float = 2.0
    again: float = 3.5
    hidden: float = 6.0
    rows: float = 15.5
    inner: float = 6.0
    weights: float = 2.0
    vocabulary: float = 2.0
    logits: float = 1.35


SCRATCH = Scratch()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one device holds of a configuration on a mesh.

    Attributes:
        tokens: t, of one microbatch.
        sequences: b, likewise.
        length: S.
        rows: that the experts of a device take in one round of one chunk, slots that stay empty
            included.
        chunks: into which the exchange of a device's tokens is cut; 1 where there is none.
        width: D.
        layers: L.
        shards: sizes of the mesh axes.
    """

    tokens: int
    sequences: int
    length: int
    rows: int
    chunks: int
    width: int
    layers: int
    shards: Mapping[str, int]


def sizes_of(config: ExperimentConfig, mesh: Mapping[str, int]) -> Sizes:
    """Sizes on a mesh; see `Sizes`."""
    model = config.model
    length = length_of(config)
    routed = length if isinstance(model, LMConfig) else image_tokens(model)
    parts = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    b = math.ceil(config.batch / config.accumulate / parts)
    assignments = b * routed * model.moe.top_k
    return Sizes(
        tokens=b * length,
        sequences=b,
        length=length,
        rows=rows_here(config, assignments, mesh["expert"]),
        chunks=model.moe.exchange_chunks if mesh["expert"] > 1 else 1,
        width=model.width,
        layers=model.depth,
        shards=dict(mesh),
    )


def rows_here(config: ExperimentConfig, assignments: int, devices: int) -> int:
    """Rows in the buffers of the experts of one device, for A assignments of its own tokens."""
    moe = config.model.moe
    name = choose_exchange(moe)
    if devices == 1:
        return assignments
    if name == "all_gather":
        return assignments * devices
    room = TRANSPORTS[name].room(assignments // moe.exchange_chunks, devices, moe.buffer_factor)
    return room * (devices if name == "all_to_all" else 1)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step.

    Attributes:
        parameters: float32, their shard.
        optimizer: both moments.
        other: router state, batch, counters.
        activations: kept from the forward to the backward pass.
        gradients: of all parameters, and the vocabulary's arrays.
        exchange: what is sent and what arrives, in one round.
        scratch: the rest that is alive where most is.
    """

    parameters: float
    optimizer: float
    other: float
    activations: float
    gradients: float
    exchange: float
    scratch: float

    @property
    def arguments(self) -> float:
        """What lives through the step."""
        return self.parameters + self.optimizer + self.other

    @property
    def total(self) -> float:
        """All of it."""
        held = self.arguments + self.activations + self.gradients
        return held + self.exchange + self.scratch


@dataclasses.dataclass(frozen=True)
class Weights:
    """What the model's parameters come to, by part: enough to size them on any mesh.

    Attributes:
        parts: "experts", "blocks" (all else in them), "vocabulary" (embedding and head) and "rest",
            each as bytes in float32 by the mesh axes that split them.
        state: bytes of the routers' running state, which every device holds whole.
        count: of all numbers.
        active: that one token passes, see `train.flops`.
        per_unit: model FLOPs of a token or an image, see `train.flops`.
        common: for each mesh axis the greatest common divisor of the dimensions that it splits.
    """

    parts: Mapping[str, Mapping[tuple[str, ...], float]]
    state: float
    count: int
    active: int
    per_unit: float
    common: Mapping[str, int]

    def held(self, mesh: Mapping[str, int], *names: str) -> float:
        """Bytes of parts, or of all, on one device."""
        return sum(
            size / math.prod(mesh[axis] for axis in axes)
            for name in names or self.parts
            for axes, size in self.parts[name].items()
        )


def weigh(config: ExperimentConfig) -> Weights:
    """The parameters of a configuration, from its abstract tree and the rules of sharding."""
    return _weigh(config.model, length_of(config))


@functools.lru_cache(maxsize=16)
def _weigh(model: LMConfig | ViTConfig, length: int) -> Weights:
    _, params, router = pure.abstract_split(model_maker(model, 0))
    parts: dict[str, dict[tuple[str, ...], float]] = {
        name: {} for name in ("experts", "blocks", "vocabulary", "rest")
    }
    common = dict.fromkeys(AXES, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = spec(path, len(leaf.shape))
        for size, axis in zip(leaf.shape, where, strict=False):
            if axis is not None:
                common[axis] = math.gcd(common[axis], size)
        axes = tuple(axis for axis in where if axis is not None)
        part = parts[_part([str(getattr(key, "key", key)) for key in path])]
        part[axes] = part.get(axes, 0.0) + float(math.prod(leaf.shape) * leaf.dtype.itemsize)
    return Weights(
        parts=parts,
        state=float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(router))),
        count=sum(leaf.size for leaf in jax.tree.leaves(params)),
        active=active_parameters(model, params),
        per_unit=flops_per_unit(model, params, length),
        common={axis: size or 1 for axis, size in common.items()},
    )


def _part(names: list[str]) -> str:
    if names[0] in ("embedding", "head"):
        return "vocabulary"
    if names[0] != "blocks":
        return "rest"
    return "experts" if "experts" in names else "blocks"


def length_of(config: ExperimentConfig) -> int:
    """S: positions of a sequence, or tokens of an image."""
    if isinstance(config.data, TextConfig):
        return config.data.sequence_length
    assert isinstance(config.model, ViTConfig)
    return (config.model.image_size // config.model.patch) ** 2 + config.model.prefix


def predict(
    config: ExperimentConfig,
    weights: Weights,
    mesh: Mapping[str, int],
    scratch: Scratch = Scratch(),
) -> Memory:
    """Memory by formula.

    Args:
        config: the experiment, of a text or vision model.
        weights: its parameters.
        mesh: sizes of the mesh axes.
        scratch: see there.
    """
    sizes = sizes_of(config, mesh)
    held = weights.held(mesh)
    batch = 4.0 * 4 * sizes.tokens * config.accumulate
    kept = kept_bytes(config, sizes)
    buffers = exchange_bytes(config, sizes)
    attention = _attention_scratch(config, sizes, scratch)
    experts = _expert_scratch(config, sizes, scratch)
    gradients = _gradient_bytes(config, weights, mesh, scratch)
    # Of this microbatch's gradients there are only the head's when the loss is differentiated.
    earlier = weights.held(mesh) if config.accumulate > 1 else 0.0
    loss = _loss_scratch(config, sizes, scratch) + earlier - gradients
    return Memory(
        parameters=held,
        optimizer=2 * held,
        other=batch + weights.state,
        activations=kept,
        gradients=gradients,
        exchange=buffers,
        # They take the same room one after the other.
        scratch=max(attention, experts, loss) - buffers,
    )


def kept_bytes(config: ExperimentConfig, sizes: Sizes) -> float:
    """Activations that the blocks keep for the backward pass, by the policy of `remat`."""
    model, t, D = config.model, sizes.tokens, sizes.width
    c = jnp.dtype(model.dtype).itemsize
    tp = sizes.shards["tensor"]
    dim = model.head_dim or D // model.heads
    kv = (model.kv_heads or model.heads) if isinstance(model, LMConfig) else model.heads
    block = t * D * c  # the block's input
    if model.remat in ("full", "exchange"):
        kept = _named_bytes(config, sizes) if model.remat == "exchange" else 0.0
        return block * sizes.layers + kept * sum(moe_layers(model))
    heads = t * (model.heads + 2 * kv) * dim * c / tp
    total = 0.0
    for experts in moe_layers(model):
        total += block + heads + t * D * c
        if experts:
            total += t * model.moe.experts * 4
            if model.moe.shared_hidden:
                total += _mlp_bytes(config, t, model.moe.shared_hidden / tp, model.moe.activation)
        else:
            activation = "swiglu" if isinstance(model, LMConfig) else "gelu"
            total += _mlp_bytes(config, t, model.mlp_hidden / tp, activation)
        if model.remat == "none":
            total += 3 * heads + _scores(config, sizes) * 1.5 + 6 * t * D * c
            if experts:
                F = model.moe.hidden / tp
                total += sizes.rows * sizes.chunks * (4 * D + 3 * F) * c
    return total


def _mlp_bytes(config: ExperimentConfig, t: int, hidden: float, activation: str) -> float:
    """What a dense MLP keeps: its maps' results, and the last one's input, unless by "dots"."""
    maps = 2 if activation == "swiglu" else 1
    inner = maps + (config.model.remat == "none")
    return t * (inner * hidden + config.model.width) * jnp.dtype(config.model.dtype).itemsize


def _named_bytes(config: ExperimentConfig, sizes: Sizes) -> float:
    """What bears a name of `emoe_jax.remat` in an expert layer: choices, orders, exchanged rows."""
    chosen = 4.0 * sizes.tokens * config.model.moe.top_k
    if sizes.shards["expert"] == 1:
        return 2 * chosen
    rows = sizes.rows * sizes.chunks
    if choose_exchange(config.model.moe) == "all_gather":
        # Tokens of the whole group once, and their choices, gates and order.
        size = jnp.dtype(config.model.dtype).itemsize
        return chosen + rows * (sizes.width * size / config.model.moe.top_k + 12.0)
    return exchange_bytes(config, sizes) * sizes.chunks + 2 * chosen + 4.0 * rows


def _scores(config: ExperimentConfig, sizes: Sizes) -> float:
    """Bytes of one layer's attention scores in float32; none where the kernel is fused."""
    if config.model.attention in ("splash", "cudnn"):
        return 0.0
    heads = config.model.heads / sizes.shards["tensor"]
    return 4.0 * sizes.sequences * heads * sizes.length**2


def exchange_bytes(config: ExperimentConfig, sizes: Sizes) -> float:
    """Rows that leave and rows that arrive."""
    if sizes.shards["expert"] == 1 or not any(moe_layers(config.model)):
        return 0.0
    return 2.0 * sizes.rows * sizes.width * jnp.dtype(config.model.dtype).itemsize


def _attention_scratch(config: ExperimentConfig, sizes: Sizes, scratch: Scratch) -> float:
    hidden = scratch.hidden * sizes.tokens * sizes.width * 4
    whole = config.model.remat in ("full", "exchange")
    alive = scratch.again if whole else scratch.scores
    return alive * _scores(config, sizes) + hidden


def _expert_scratch(config: ExperimentConfig, sizes: Sizes, scratch: Scratch) -> float:
    model = config.model
    if not any(moe_layers(model)):
        return 0.0
    c, tp = jnp.dtype(model.dtype).itemsize, sizes.shards["tensor"]
    F = model.moe.hidden / tp
    rows = sizes.rows * (scratch.rows * sizes.width + scratch.inner * F) * c
    matrices = 3 if model.moe.activation == "swiglu" else 2
    here = model.moe.experts / sizes.shards["expert"]
    return rows + scratch.weights * here * matrices * sizes.width * F * c


def _loss_scratch(config: ExperimentConfig, sizes: Sizes, scratch: Scratch) -> float:
    """Logits of a chunk, the head in the compute dtype, and its gradient."""
    model = config.model
    if isinstance(model, ViTConfig):
        return 0.0
    classes = model.vocab_size / sizes.shards["tensor"]
    head = (4 + jnp.dtype(model.dtype).itemsize) * classes * model.width
    chunk = sizes.sequences * loss_positions(model, sizes)
    return 4 * scratch.logits * chunk * classes + head


def loss_positions(model: LMConfig, sizes: Sizes) -> int:
    """Positions of each sequence whose logits a device holds at once."""
    return chunk_positions(model.loss_chunk, sizes.sequences, sizes.length)


def _gradient_bytes(
    config: ExperimentConfig, weights: Weights, mesh: Mapping[str, int], scratch: Scratch
) -> float:
    """Gradients as the optimizer takes them, twice where microbatches are summed."""
    blocks = weights.held(mesh, "blocks", "experts")
    times = 2 if config.accumulate > 1 else 1
    model = config.model
    if isinstance(model, ViTConfig):
        return times * weights.held(mesh)
    whole = 4.0 * model.vocab_size * model.width / mesh["tensor"]
    c = jnp.dtype(model.dtype).itemsize
    copies = 2 - model.tie_head
    return times * blocks + whole * (scratch.vocabulary + copies * c / 4)
