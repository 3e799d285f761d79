"""Expert parallelism: tokens go to the devices that hold their experts, and come back.

One fully manual `shard_map` over the mesh, whose body dispatches, exchanges, runs the experts that
are here, exchanges back and combines. With one device on the axis `expert` nothing is exchanged,
and the body is the dropless dispatch of each device's own tokens.

- "all_to_all": P = buffer_factor · A/X slots for each pair of devices. What finds no slot waits for
  another round of the same exchange; the number of rounds is agreed by the group, is one but for
  an overflow, and every further round saves nothing for the backward pass: it is run again there.
  So a result is exact whatever the load, and an overflow costs time, not memory: what one further
  round needs there, and its gradients, is set aside once, whatever the depth and the load.
- "ragged_all_to_all": the same with exact sizes, and room for buffer_factor · A rows on a device.
- "all_gather": every device sees all tokens of its group, computes what its experts give them, and
  the sum is scattered. Never overflows.

Letters as in `transport`. The gates stay at home: rows travel without them, and outputs are
weighed where they come back.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, PartitionSpec

from emoe_jax.config import MoEConfig, require
from emoe_jax.dispatch import transport
from emoe_jax.dispatch.capacity import keep_within, slots
from emoe_jax.dispatch.dense import dense_weights
from emoe_jax.dispatch.dropless import NO_CHOICES, group_by_expert
from emoe_jax.dispatch.rounds import Experts, Method, Weights, all_rounds, one_round
from emoe_jax.dispatch.rows import combine_rows, spread_rows
from emoe_jax.remat import decided, exchanged
from emoe_jax.routers.base import ExpertChoice, Routing
from emoe_jax.sharding import AXES, BATCH_AXES, RULES, batch_shards, reduce_over, spec, splitting

Array = jax.Array

GATHERED = "gathered_experts"
"""Checkpoint name of experts' weights gathered over `fsdp`: gathered again, never kept."""


class Choices(NamedTuple):
    """What every router's decision comes to, over all devices.

    Attributes:
        experts: [T,K] int32, E for an assignment that goes nowhere.
        gates: [T,K] float32.
        dropped: [] float32, assignments of real tokens beyond the capacity.
    """

    experts: Array
    gates: Array
    dropped: Array


def choose(routing: Routing | ExpertChoice, real: Array, config: MoEConfig) -> Choices:
    """The assignments of a routing, after padding and, with dispatch "capacity", the capacity.

    The capacity counts over all devices, so it drops the same assignments on every mesh. Expert
    choice has K = E assignments for each token, most of which go nowhere.

    Args:
        routing: either form.
        real: [T] bool, False for padding.
        config: of the layer.

    Raises:
        ValueError: expert choice with dispatch "dropless".
    """
    T, E = routing.probs.shape
    none = jnp.zeros((), jnp.float32)
    if isinstance(routing, ExpertChoice):
        require(config.dispatch != "dropless", NO_CHOICES)
        numbers = jnp.arange(E, dtype=jnp.int32)
        taken = jnp.zeros((T, E), bool).at[routing.tokens, numbers[:, None]].set(True)
        taken = taken & real[:, None]
        return Choices(jnp.where(taken, numbers, E), dense_weights(routing).T, none)
    experts = jnp.where(real[:, None], routing.indices, E)
    if config.dispatch != "capacity":
        return Choices(experts, routing.weights, none)
    C = slots(T, config.top_k, E, config.capacity_factor)
    kept = keep_within(experts, E, C)
    dropped = jnp.sum((kept == E) & (experts < E), dtype=jnp.float32)
    return Choices(kept, routing.weights, dropped)


class Exchanged(NamedTuple):
    """What came back.

    Attributes:
        out: [T,D] in the dtype of the tokens.
        dropped: [] float32, assignments that found no slot; zero unless `on_overflow` is "drop".
        overflows: [] float32, exchanges in which one round was not enough.
        exchanges: [] float32, exchanges in all: one for each group and chunk.
    """

    out: Array
    dropped: Array
    overflows: Array
    exchanges: Array


def choose_exchange(config: MoEConfig) -> str:
    """The exchange that "auto" means: all_to_all, on every platform.

    ragged_all_to_all moves a fifth less, but is reported to crash and to corrupt on GPU
    (openxla/xla issue 47283), and nobody has measured it here. all_gather moves less where K is
    large and X small, but its experts' rows are X·K for each token, most of them empty.
    """
    return "all_to_all" if config.exchange == "auto" else config.exchange


def exchange(
    tokens: Array,
    experts: Array,
    gates: Array,
    weights: Weights,
    apply: Experts,
    config: MoEConfig,
    mesh: AbstractMesh,
) -> Exchanged:
    """Sends tokens through their experts on a mesh.

    Args:
        tokens: [T,D], T over all devices, sharded or not.
        experts: [T,K] int32, E for an assignment that goes nowhere. K may exceed `config.top_k`
            where few of the assignments go anywhere (expert choice); buffers are of that size.
        gates: [T,K] float32.
        weights: the experts' arrays by name, see `experts.Experts`. Their gradients are summed over
            devices in their own dtype. On `fsdp`, where they travel in the dtype of the tokens, a
            device's own part of the sum is rounded to that first, for each chunk and round.
        apply: the experts: weights, in their own dtype or the tokens', rows [M,D] sorted by expert
            and sizes [E/X] to rows [M,D]. It must not hold traced arrays.
        config: of the layer.
        mesh: with all of `sharding.AXES`.

    Raises:
        ValueError: the axis `expert` does not divide E, or weights have an unknown name.
    """
    X = mesh.shape["expert"]
    require(
        config.experts % X == 0,
        f"mesh.expert={X} does not divide experts={config.experts}; choose a divisor",
    )
    T = tokens.shape[0]
    parts = batch_shards(mesh) * _chunks(config, X)
    missing = -T % parts
    if missing:
        tokens = jnp.pad(tokens, ((0, missing), (0, 0)))
        experts = jnp.pad(experts, ((0, missing), (0, 0)), constant_values=config.experts)
        gates = jnp.pad(gates, ((0, missing), (0, 0)))
    places = {name: _place(name, leaf, mesh) for name, leaf in weights.items()}
    rows = PartitionSpec(splitting(mesh, BATCH_AXES))
    body = jax.shard_map(
        partial(_body, apply=apply, config=config, places=places),
        mesh=mesh,
        in_specs=(rows, rows, rows, places),
        out_specs=(rows, PartitionSpec(), PartitionSpec(), PartitionSpec()),
    )
    done = Exchanged(*body(tokens, experts, gates, weights))
    return done._replace(out=done.out[:T]) if missing else done


def _place(name: str, leaf: Array, mesh: AbstractMesh) -> PartitionSpec:
    """The axes of more than one device that cut an array of the experts."""
    place = spec((jax.tree_util.DictKey(name),), leaf.ndim)
    require(
        len(place) > 0 and place[0] == RULES["expert"],
        f"weights hold {name!r} {leaf.shape}, which sharding.LOGICAL does not spread over experts",
    )
    several = splitting(mesh, place)
    return PartitionSpec(*(axis if axis in several else None for axis in place))


# --- the body: one device ---------------------------------------------------------------------


def _body(
    tokens: Array,
    experts: Array,
    gates: Array,
    weights: Weights,
    *,
    apply: Experts,
    config: MoEConfig,
    places: dict[str, PartitionSpec],
) -> tuple[Array, Array, Array, Array]:
    """All chunks of this device's tokens; each chunk's exchange is independent of the others'."""
    X = lax.axis_size("expert")

    def run(tokens: Array, experts: Array, gates: Array, weights: Weights) -> Any:
        with jax.named_scope("gather_experts"):
            whole = {
                name: _gather(leaf, places[name], tokens.dtype) for name, leaf in weights.items()
            }
        inputs = [transport.vary(part, BATCH_AXES) for part in (tokens, experts, gates)]
        chunks = [jnp.split(part, _chunks(config, X)) for part in inputs]
        done = [
            _chunk(*chunk, weights=whole, apply=apply, config=config)
            for chunk in zip(*chunks, strict=True)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)

    # Gathered weights, kept for the backward pass, would be the whole model, and weights that are
    # but marked would be a copy beside the parameters.
    run = jax.checkpoint(run, policy=_kept)
    out, dropped, overflows = run(tokens, experts, gates, weights)
    out = reduce_over(lax.psum, out.reshape(tokens.shape), (RULES["mlp"],)).astype(tokens.dtype)
    # The devices of a group do the same exchange: each counts its share of it.
    exchanges = transport.vary(jnp.float32(config.exchange_chunks / X if X > 1 else 0))
    return out, _total(dropped), _total(overflows / X), _total(exchanges)


def _chunks(config: MoEConfig, devices: int) -> int:
    """Parts of a device's tokens; one where there is no exchange to hide."""
    return config.exchange_chunks if devices > 1 else 1


def _total(count: Array) -> Array:
    """Sum over all devices; those along `tensor` hold the same tokens, which count once."""
    return reduce_over(lax.psum, jnp.sum(count), AXES) / lax.axis_size(RULES["mlp"])


def _kept(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether the backward pass keeps a result: all but weights, marked or gathered over `fsdp`.

    Naming them is not enough: what is named would be made again from what was gathered, kept.
    """
    if primitive.name == "name":
        return bool(params["name"] != GATHERED)
    return primitive.name != "pvary" and not _gathers(primitive, params)


def _gathers(primitive: Any, params: dict[str, Any]) -> bool:
    """Whether it gathers over `fsdp`, itself or by what it calls."""
    if primitive.name == "all_gather":
        return RULES["embed"] in params["axis_name"]
    inner = (eqn for program in jaxprs_in_params(params) for eqn in program.eqns)
    return any(_gathers(eqn.primitive, eqn.params) for eqn in inner)


def _gather(leaf: Array, place: PartitionSpec, dtype: jnp.dtype) -> Array:
    """Whole over `fsdp`, in `dtype` where it had to travel.

    A bias that the shards of `tensor` would each add is kept by the first.
    """
    # Marked before it is gathered: so gradients are summed over other axes when they are scattered.
    leaf = transport.vary(leaf, [name for name in place if name])
    for axis, name in enumerate(place):
        if name == RULES["embed"] and lax.axis_size(name) > 1:
            leaf = _travel(leaf, axis, dtype, leaf.dtype)
    if RULES["mlp"] not in place and lax.axis_size(RULES["mlp"]) > 1:
        leaf = jnp.where(lax.axis_index(RULES["mlp"]) == 0, leaf, jnp.zeros_like(leaf))
    return checkpoint_name(leaf, GATHERED)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _travel(leaf: Array, axis: int, low: jnp.dtype, own: jnp.dtype) -> Array:
    """Gathered over `fsdp` in a lower dtype; the gradient is summed in the leaf's own.

    The transpose of a gather would sum as many numbers as there are devices in the lower one.
    """
    return lax.all_gather(leaf.astype(low), RULES["embed"], axis=axis, tiled=True)


def _travel_forward(
    leaf: Array, axis: int, low: jnp.dtype, own: jnp.dtype
) -> tuple[Array, tuple[()]]:
    return _travel(leaf, axis, low, own), ()


def _travel_backward(
    axis: int, low: jnp.dtype, own: jnp.dtype, _: tuple[()], cotangent: Array
) -> tuple[Array]:
    wide = cotangent.astype(own)
    return (lax.psum_scatter(wide, RULES["embed"], scatter_dimension=axis, tiled=True),)


_travel.defvjp(_travel_forward, _travel_backward)


def _chunk(
    tokens: Array,
    experts: Array,
    gates: Array,
    *,
    weights: Weights,
    apply: Experts,
    config: MoEConfig,
) -> tuple[Array, Array, Array]:
    """Outputs [T,D] float32, assignments dropped [], and whether one round was not enough []."""
    X = lax.axis_size("expert")
    zero = transport.vary(jnp.zeros((), jnp.float32))
    if X == 1:
        return _local(tokens, experts, gates, weights, apply, config.experts), zero, zero
    name = choose_exchange(config)
    if name == "all_gather":
        return _all_gather(tokens, experts, gates, weights, apply, config), zero, zero
    plan = transport.sort_assignments(experts, config.experts)
    way = transport.TRANSPORTS[name]
    method = Method(way, way.room(experts.shape[0] * config.top_k, X, config.buffer_factor), apply)
    own = way.rounds(plan, method.room)
    # Agreed by all groups: collectives in loops of different lengths are not safe everywhere.
    rounds = decided(reduce_over(lax.pmax, own, AXES))
    overflowed = (own > 1).astype(jnp.float32)
    inputs = (tokens, gates, weights)
    if config.on_overflow == "drop":
        dropped = way.overflow(plan, method.room).astype(jnp.float32)
        return one_round(method, plan, 0, *inputs), dropped, overflowed
    return all_rounds(method, plan, rounds, inputs), zero, overflowed


def _local(
    tokens: Array, experts: Array, gates: Array, weights: Weights, apply: Experts, count: int
) -> Array:
    """Tokens [T,D] through those of their K experts that are here, 0 to count-1: [T,D] float32."""
    layout, sizes = group_by_expert(experts, count)
    with jax.named_scope("dispatch"):
        rows = spread_rows(tokens, layout)
    with jax.named_scope("experts"):
        rows = apply(weights, rows, sizes)
    with jax.named_scope("combine"):
        return combine_rows(rows, gates, layout)


def _all_gather(
    tokens: Array,
    experts: Array,
    gates: Array,
    weights: Weights,
    apply: Experts,
    config: MoEConfig,
) -> Array:
    held = config.experts // lax.axis_size("expert")
    with jax.named_scope("exchange"):
        parts = tokens, experts, gates
        everyone = [exchanged(lax.all_gather(part, "expert", tiled=True)) for part in parts]
    first = lax.axis_index("expert").astype(jnp.int32) * held
    here = everyone[1] - first
    here = jnp.where((here >= 0) & (here < held), here, held)
    out = _local(everyone[0], here, everyone[2], weights, apply, held)
    with jax.named_scope("return"):
        return lax.psum_scatter(out, "expert", tiled=True)
