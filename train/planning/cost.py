"""Time of a training step by formula: products, memory traffic, and what crosses links.

Everything here is arithmetic on the configuration and the mesh; `docs/planning.md` writes the
formulas out. Peaks of the chip give the shortest time that the model allows. Rates fitted by
`train.planning.calibrate` give the hardware at hand.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from emoe_jax.config import BASIS_ROUTERS, LMConfig, moe_layers
from emoe_jax.dispatch.exchange import choose_exchange
from emoe_jax.routers.whitened import merged_is_cheaper
from train.config import ExperimentConfig
from train.planning.memory import Sizes, Weights, loss_positions, sizes_of
from train.planning.topology import Topology, abstract_shape
from train.planning.wires import exchange_rate, ring_rate

SCORE_PASSES = 14.0
"""How often a float32 array of attention scores is written or read in a step, where the kernel is
not fused, with the recomputation of `remat`: forward, again, and backward."""

HIDDEN_PASSES = 40.0
"""The same of arrays [t,D] in the compute dtype in a block: norms, maps, residuals."""

ROW_PASSES = 24.0
"""The same of arrays [rows,D] in the compute dtype in a layer of experts."""

LOGIT_PASSES = 6.0
"""The same of float32 arrays [t,N] in the loss: once by the product, twice for the sums, and in the
compute dtype written and read by two products for the gradients."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What of the chip's peaks a program reaches, and what each collective costs besides.

    Attributes:
        products: share of the peak of products.
        memory: share of the memory's bandwidth.
        links: share of the links' bandwidth.
        latency: seconds for each collective.
        fixed: seconds for each step.
    """

    products: float = 1.0
    memory: float = 1.0
    links: float = 1.0
    latency: float = 0.0
    fixed: float = 0.0


PEAK = Rates()
"""The chip's own."""


@dataclasses.dataclass(frozen=True)
class Flow:
    """Collectives of one purpose in a step.

    Attributes:
        purpose: as in `train.planning.hlo`.
        axes: over which.
        received: bytes that one device receives.
        seconds: at the chip's peak.
        count: collectives.
    """

    purpose: str
    axes: tuple[str, ...]
    received: float
    seconds: float
    count: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step asks of one device, and the time that follows.

    Attributes:
        model_flops: of all devices, by `train.flops`.
        products: FLOPs that one device executes, recomputation included.
        traffic: bytes between its memory and its cores.
        flows: its collectives.
        units: tokens or images of a step, over all devices.
        devices: how many.
        topology: where.
        rounds: of the exchange, above 1 where the buffers overflow.
    """

    model_flops: float
    products: float
    traffic: float
    flows: tuple[Flow, ...]
    units: int
    devices: int
    topology: Topology
    rounds: int

    def parts(self, rates: Rates) -> dict[str, float]:
        """Seconds by what bounds them, one after another."""
        chip = self.topology.chip
        parts = {
            "products": self.products / chip.flops / rates.products,
            "memory": self.traffic / chip.hbm / rates.memory,
        }
        for flow in self.flows:
            took = flow.seconds / rates.links + flow.count * rates.latency
            parts[flow.purpose] = parts.get(flow.purpose, 0.0) + took
        return parts

    def seconds(self, rates: Rates, hidden: float = 0.0) -> float:
        """Projected time of a step.

        Products and memory traffic run beside each other, so the longer one counts; collectives
        come on top, but for the share of them that is hidden behind work.

        Args:
            rates: see there.
            hidden: share of the collectives' time that runs beside products, as far as these last.
        """
        parts = self.parts(rates)
        work = max(parts.pop("products"), parts.pop("memory"))
        moving = sum(parts.values())
        beside = min(hidden * moving, work)
        return rates.fixed + work + moving - beside

    def mfu(self, seconds: float) -> float:
        """Model FLOPs over what the devices' peaks would do in that time."""
        return self.model_flops / (seconds * self.devices * self.topology.chip.flops)

    def bound(self, rates: Rates) -> str:
        """What takes most of the step."""
        parts = self.parts(rates)
        return max(parts, key=lambda name: parts[name])


def predict(
    config: ExperimentConfig, weights: Weights, topology: Topology, max_vio: float = 0.0
) -> Cost:
    """Cost of a step.

    Args:
        config: the experiment.
        weights: its parameters.
        topology: the devices.
        max_vio: how far the fullest expert is above the mean load (MaxVio); 0 is even.
    """
    mesh = abstract_shape(topology, config.mesh)
    sizes = sizes_of(config, mesh)
    skew = _skew(config, mesh, max_vio)
    rounds = 1
    if mesh["expert"] > 1 and choose_exchange(config.model.moe) != "all_gather":
        rounds = max(1, math.ceil(round(skew / config.model.moe.buffer_factor, 6)))
    held = weights.held(mesh)
    units = config.batch * (sizes.length if isinstance(config.model, LMConfig) else 1)
    flows = _exchange(config, sizes, topology, rounds) + _weights(config, weights, sizes, topology)
    return Cost(
        model_flops=weights.per_unit * units,
        products=_products(config, sizes, skew),
        traffic=_traffic(config, sizes, held, rounds),
        flows=tuple(flow for flow in flows if flow.received),
        units=units,
        devices=topology.devices,
        topology=topology,
        rounds=rounds,
    )


def _skew(config: ExperimentConfig, mesh: dict[str, int], max_vio: float) -> float:
    """Load of the fullest device over the mean: one expert at 1 + MaxVio, others at the mean."""
    return 1 + max_vio * mesh["expert"] / config.model.moe.experts


def _again(config: ExperimentConfig, kept: bool) -> int:
    """Forward passes of a product in a step: a second where the backward pass lacks its result."""
    remat = config.model.remat
    again = {"none": False, "dots": not kept, "full": True, "exchange": True}
    return 2 if again[remat] else 1


def _products(config: ExperimentConfig, sizes: Sizes, skew: float) -> float:
    """FLOPs of one device: 2·m·n·k a product, twice that backward, again where recomputed."""
    model, t, D = config.model, sizes.tokens, sizes.width
    tp = sizes.shards["tensor"]
    dim = model.head_dim or D // model.heads
    lm = isinstance(model, LMConfig)
    kv = (model.kv_heads or model.heads) if isinstance(model, LMConfig) else model.heads
    maps = 2.0 * t * D * dim * (2 * model.heads + 2 * kv) / tp
    scores = 4.0 * t * sizes.length * model.heads * dim / tp
    total = 0.0
    for experts in moe_layers(model):
        total += maps * (2 + _again(config, True)) + scores * (2 + _again(config, False))
        matrices = 3 if model.moe.activation == "swiglu" else 2
        if experts:
            rows = t * model.moe.top_k * skew
            one = 2.0 * matrices * rows * D * model.moe.hidden / tp
            shared = 2.0 * matrices * t * D * model.moe.shared_hidden / tp
            total += one * (2 + _again(config, False)) + shared * (2 + _again(config, True))
            if _returned_rows_kept(config, sizes):
                # Those of the first round; further rounds keep nothing.
                total -= one / matrices * min(1.0, model.moe.buffer_factor / skew)
            total += _router_products(config, t)
        else:
            dense = 2.0 * (3 if lm else 2) * t * D * model.mlp_hidden / tp
            total += dense * (2 + _again(config, True))
    if isinstance(model, LMConfig):
        total += 3 * 2.0 * t * D * model.vocab_size / tp
    return total * config.accumulate


def _returned_rows_kept(config: ExperimentConfig, sizes: Sizes) -> bool:
    """Whether what the experts' last product gave has travelled and is kept, so not made again."""
    travels = sizes.shards["expert"] > 1 and choose_exchange(config.model.moe) != "all_gather"
    return travels and config.model.remat == "exchange"


def _router_products(config: ExperimentConfig, t: int) -> float:
    """FLOPs of one layer's router for t tokens; what it does once a step is left out."""
    model, moe = config.model, config.model.moe
    D, E = model.width, moe.experts
    forward = _again(config, True)
    if moe.router not in BASIS_ROUTERS:
        return 2.0 * t * D * E * (2 + forward)
    R = moe.basis.rank_of(D)
    subspace = "learned" if moe.router == "eigen" else moe.routing.subspace or "tracked"
    # Gradients of scores and projection, a parameter's too; of another basis that of the tokens
    # alone, in the order that takes fewer products.
    if subspace != "learned" and merged_is_cheaper(D, R, E):
        backward = E * (D + R)
    else:
        backward = R * (D * (1 + (subspace == "learned")) + 2 * E)
    moves = subspace == "tracked" and R < D
    moments = 0 if moe.router == "eigen" else R * (R + D * moves)
    return 2.0 * t * (R * (D + E) * forward + backward + moments)


def _traffic(config: ExperimentConfig, sizes: Sizes, held: float, rounds: int) -> float:
    """Bytes between memory and cores: optimizer, weights, activations, scores."""
    model, t, D = config.model, sizes.tokens, sizes.width
    c, tp = jnp.dtype(model.dtype).itemsize, sizes.shards["tensor"]
    shards = sizes.shards["fsdp"]
    optimizer = 7 * held  # read parameter, gradient and two moments; write three of them
    weights = (
        held / 4 * c * shards * 4
    )  # gathered, in forward, recomputed and two backward products
    hidden = HIDDEN_PASSES * t * D * c * sizes.layers
    scores = 0.0
    if model.attention not in ("splash", "cudnn"):
        one = 4.0 * sizes.sequences * model.heads / tp * sizes.length**2
        scores = SCORE_PASSES * one * sizes.layers
    rows = ROW_PASSES * sizes.rows * sizes.chunks * rounds * D * c * sum(moe_layers(model))
    loss = _loss_traffic(model, sizes, c) if isinstance(model, LMConfig) else 0.0
    return optimizer + (weights + hidden + scores + rows + loss) * config.accumulate


def _loss_traffic(model: LMConfig, sizes: Sizes, c: int) -> float:
    """Logits, and for each chunk of them the head, read twice, and its gradient, there and back."""
    classes = model.vocab_size / sizes.shards["tensor"]
    chunks = math.ceil(sizes.length / loss_positions(model, sizes))
    head = chunks * classes * model.width * (2 * c + 8)
    return 4.0 * LOGIT_PASSES * sizes.tokens * classes + head


def _exchange(
    config: ExperimentConfig, sizes: Sizes, topology: Topology, rounds: int
) -> list[Flow]:
    """What expert parallelism moves: rows there and back, forward, backward, and again by remat."""
    X, moe = sizes.shards["expert"], config.model.moe
    layers = sum(moe_layers(config.model))
    if X == 1 or not layers:
        return []
    c = jnp.dtype(config.model.dtype).itemsize
    again = config.model.remat in ("full", "dots")
    # A further round moves rows forward, and forward and backward in the backward pass.
    turns = 2 * (2 + again) + 6 * (rounds - 1)
    passes = turns * layers * config.accumulate * sizes.chunks
    name = choose_exchange(moe)
    mine = config.mesh
    if name == "all_gather":
        size = sizes.rows / moe.top_k * sizes.width * (c + 4) / 2  # outputs return in float32
        rate = ring_rate(topology, mine, ("expert",))
        received = size * (X - 1) / X
        return [Flow("exchange", ("expert",), received * passes, received * passes / rate, passes)]
    rows = sizes.rows
    if name == "ragged_all_to_all":
        rows = min(rows, sizes.tokens * moe.top_k)  # no empty slots travel
    size = rows * sizes.width * c
    seconds = size / exchange_rate(topology, mine)
    received = size * (X - 1) / X
    return [Flow("exchange", ("expert",), received * passes, seconds * passes, passes)]


def _weights(
    config: ExperimentConfig, weights: Weights, sizes: Sizes, topology: Topology
) -> list[Flow]:
    """Gathers of parameters over fsdp, reductions of gradients, and sums over tensor."""
    model, mesh, mine = config.model, sizes.shards, config.mesh
    c = jnp.dtype(model.dtype).itemsize
    experts, dense, vocabulary = (
        weights.held(mesh, part) / 4 for part in ("experts", "blocks", "vocabulary")
    )
    micro, flows = config.accumulate, []
    remat = 2 if model.remat != "none" else 1

    def ring(purpose: str, axes: tuple[str, ...], size: float, count: float) -> None:
        """A gather or scatter of a result, or operand, of `size` bytes on a device."""
        n = math.prod(mesh[axis] for axis in axes)
        if n > 1 and size:
            received = size * (n - 1) / n
            flows.append(
                Flow(purpose, axes, received, received / ring_rate(topology, mine, axes), count)
            )

    L, f = sizes.layers, mesh["fsdp"]
    if f > 1:
        ring("fsdp gather", ("fsdp",), f * dense * c * remat * micro, 4 * L * remat * micro)
        ring("fsdp gather", ("fsdp",), f * experts * c * (remat + 1) * micro, 3 * L * 3 * micro)
        ring("gradients", ("fsdp",), f * experts * 4 * micro, 3 * L * micro)
        ring("gradients", ("fsdp",), f * dense * 4 * micro, 4 * L * micro)
    # An all-reduce is a scatter and a gather.
    others = tuple(axis for axis in ("data", "expert") if mesh[axis] > 1)
    ring("gradients", others, 2 * dense * 4 * micro, 4 * L * micro)
    ring("gradients", ("data",), 2 * experts * 4 * micro, 3 * L * micro)
    batch = tuple(axis for axis in ("data", "fsdp", "expert") if mesh[axis] > 1)
    # A table of the vocabulary is looked up, one makes logits; tied, one does both. Images have no
    # words, and their head is small and everywhere.
    table = vocabulary
    if isinstance(model, LMConfig):
        table = vocabulary if model.tie_head else vocabulary / 2
        ring("fsdp gather", ("fsdp",), f * table * 2 * c * micro, 2 * micro)
        ring("gradients", ("fsdp",), f * table * 4 * micro, micro)
        ring("gradients", others, 2 * table * 4 * micro, micro)
    ring("gradients", batch, 2 * f * table * 4 * micro, micro)
    if mesh["tensor"] > 1:
        size = sizes.tokens * sizes.width * c
        passes = 2 * L * (2 + (remat - 1)) * micro
        ring("tensor", ("tensor",), 2 * size * passes, passes)
        if isinstance(model, LMConfig):
            chunks = math.ceil(sizes.length / loss_positions(model, sizes))
            states = sizes.tokens * sizes.width * 4
            ring("tensor", ("tensor",), 2 * states * micro, 3 * chunks * micro)
    return flows
