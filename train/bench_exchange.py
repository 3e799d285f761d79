"""Benchmark `exchange`: what the experts' exchange moves between devices, and what it costs.

Bytes are read from the traced program of the exchange on X devices (`train.collectives`; tracing
needs no device), forward, and forward with the gradients of tokens, gates and weights; the backward
pass is the difference. Beside them stands the balanced volume without deduplication: each of the
K assignments of each token there and back, 2·T·K·D·(X-1)/X elements a pass over all devices.
`moved` is what one device receives from others in the first round, counts of assignments included;
`further` what each further round would add, which a balanced load never runs.

What `ragged_all_to_all` moves is not in its program, whose buffers are only room for it: its rows
are those that its plan sends for the load given. On CPU it is emulated, with a row of its own.

Then the layer is timed on the most devices, and on one device that does all the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from emoe_jax.config import MoEConfig
from emoe_jax.dispatch import dropless, transport
from emoe_jax.dispatch.exchange import exchange
from emoe_jax.experts import apply_experts
from emoe_jax.routers import Routing
from emoe_jax.sharding import AXES, MeshConfig, batch_sharding, make_mesh, spec
from train.collectives import Collective, collectives, received
from train.timing import Row, Step, against, interleave

Array = jax.Array
Weights = dict[str, Array]

AXIS = transport.AXIS
RAGGED = "ragged_all_to_all"

WAYS = {
    "all_to_all": ("all_to_all", "cpu"),
    RAGGED: (RAGGED, "tpu"),
    f"{RAGGED}, emulated": (RAGGED, "cpu"),
    "all_gather": ("all_gather", "cpu"),
}
"""Name in the table to the exchange and the platform whose program is read.

The native `ragged_all_to_all` is the same on every platform but CPU.
"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer and its tokens.

    Attributes:
        T: tokens of all devices.
        D: width.
        F: hidden width of an expert.
        K: experts a token.
        E: experts.
        X: devices on the axis `expert`.
        dtype: of rows; weights are float32, as in training.
        buffer_factor: see `MoEConfig`.
    """

    T: int
    D: int
    F: int
    K: int
    E: int
    X: int
    dtype: str
    buffer_factor: float

    def layer(self, way: str) -> MoEConfig:
        """The configuration with an exchange."""
        return MoEConfig(
            experts=self.E,
            top_k=self.K,
            hidden=self.F,
            activation="gelu",
            exchange=way,
            buffer_factor=self.buffer_factor,
        )

    def balanced_bytes(self) -> float:
        """What one device receives in a pass without deduplication: 2·(T/X)·K·D·(X-1)/X."""
        rows = 2 * self.T / self.X * self.K * (self.X - 1) / self.X
        return rows * self.D * jnp.dtype(self.dtype).itemsize


def check_shape(shape: Shape) -> None:
    """Raises `ValueError` unless experts and tokens can be spread over the devices."""
    if shape.X < 2:
        raise ValueError(f"--devices={shape.X} exchange nothing; give 2 or more.")
    if shape.K > shape.E:
        raise ValueError(
            f"--chosen={shape.K} experts a token needs at least as many in --experts;"
            f" got {shape.E}."
        )
    for name, count in (("experts", shape.E), ("tokens", shape.T)):
        if count % shape.X:
            raise ValueError(f"--devices={shape.X} does not divide --{name}={count}.")


def take_devices(count: int) -> list[jax.Device]:
    """The first devices; on CPU as many virtual ones as are asked for.

    Raises:
        ValueError: there are fewer, and it is too late to make more.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Refused once JAX has started, which may have been with enough.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices()
    if len(found) < count:
        raise ValueError(
            f"--devices={count} needs {count} devices, here are {len(found)}"
            f" ({found[0].platform}). Virtual ones: JAX_PLATFORMS=cpu"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={count}, set before the start."
        )
    return found[:count]


# --- bytes ------------------------------------------------------------------------------------


def byte_rows(shape: Shape) -> list[Row]:
    """Two rows (forward, backward) for each of `WAYS`.

    Returns:
        Rows with `balanced_bytes`, `moved_bytes`, their `ratio`, and `further_bytes` (None where it
        depends on the load).
    """
    facts = {name: getattr(shape, name) for name in ("X", "E", "dtype", "buffer_factor")}
    balanced = shape.balanced_bytes()
    traced = {way: trace(shape, way) for way, _ in WAYS.values()}
    rows = []
    for name, (way, platform) in WAYS.items():
        for part, (moved, further) in _passes(traced[way], platform, shape).items():
            rows.append(
                {"exchange": name, **facts, "pass": part, "balanced_bytes": round(balanced)}
                | {"moved_bytes": round(moved), "ratio": moved / balanced}
                | {"further_bytes": None if name == RAGGED else round(further)}
            )
    return rows


def trace(shape: Shape, way: str) -> dict[str, ClosedJaxpr]:
    """The programs "forward" and "step" on X devices, which need not be there."""
    sizes = MeshConfig(data=1, expert=shape.X)
    mesh = AbstractMesh(
        tuple(getattr(sizes, axis) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )
    arrays = jax.eval_shape(operands(shape))
    made = programs(shape, way, mesh)
    return {part: jax.make_jaxpr(program)(*arrays) for part, program in made.items()}


def _passes(
    traced: dict[str, ClosedJaxpr], platform: str, shape: Shape
) -> dict[str, tuple[float, float]]:
    """Bytes that a device receives in the first round, and in each further one, by pass."""
    (ahead, ahead_further), (both, both_further) = (
        _bytes(collectives(traced[part], AXIS, platform), shape) for part in ("forward", "step")
    )
    return {
        "forward": (ahead, ahead_further),
        "backward": (both - ahead, both_further - ahead_further),
    }


def _bytes(found: Sequence[Collective], shape: Shape) -> tuple[float, float]:
    # What the native primitive moves is data; its room says nothing.
    native = [each for each in found if each.kind == RAGGED and not each.loops]
    others = [each for each in found if each.kind != RAGGED]
    rows = rows_sent(shape) if native else 0
    moved = sum(each.times * rows * each.given / each.shape[0] for each in native)
    return moved + received(others), received(others, loops=True)


def rows_sent(shape: Shape) -> int:
    """Rows that leave a device for another in the first round of `RAGGED`: the most of any."""
    assignments = shape.T // shape.X * shape.K
    room = transport.ragged_room(assignments, shape.X, shape.buffer_factor)

    def sent(experts: Array) -> Array:
        plan = transport.sort_assignments(experts, shape.E)
        window = transport.ragged_window(plan, room, 0)
        leaves = window.leaving.places < assignments
        return jnp.sum(leaves & (experts // plan.held != plan.me))

    experts = balanced_choices(shape).reshape(shape.X, -1, shape.K)
    return int(jnp.max(jax.vmap(sent, axis_name=AXIS)(experts)))


# --- the layer --------------------------------------------------------------------------------


def balanced_choices(shape: Shape) -> Array:
    """Experts [T,K] int32, dealt in turn within each device, whose tokens are then shuffled.

    Each device sends as much to each expert, to within one assignment.
    """
    random = np.random.default_rng(0)
    dealt = np.arange(shape.T // shape.X * shape.K).reshape(-1, shape.K) % shape.E
    parts = [random.permutation(dealt) for _ in range(shape.X)]
    return jnp.asarray(np.concatenate(parts), jnp.int32)


def operands(shape: Shape) -> Any:
    """A function that makes tokens [T,D], gates [T,K], the experts' weights and choices [T,K]."""
    T, D, F, K, E = shape.T, shape.D, shape.F, shape.K, shape.E

    def make() -> tuple[Array, Array, Weights, Array]:
        keys = jax.random.split(jax.random.key(0), 3)
        up = jax.random.normal(keys[1], (E, D, F)) / D**0.5
        down = jax.random.normal(keys[2], (E, F, D)) / F**0.5
        tokens = jax.random.normal(keys[0], (T, D), shape.dtype)
        gates = jnp.full((T, K), 1 / K, jnp.float32)
        return tokens, gates, {"w_up": up, "w_down": down}, balanced_choices(shape)

    return make


def programs(shape: Shape, way: str | None, mesh: AbstractMesh | None) -> dict[str, Step]:
    """The forward pass, and `step`: it with the gradients of tokens, gates and weights.

    Args:
        shape: of the layer.
        way: an exchange, or None for one device.
        mesh: for the exchange.
    """

    def forward(tokens: Array, gates: Array, weights: Weights, experts: Array) -> Array:
        if way is None or mesh is None:
            return _alone(shape, tokens, gates, weights, experts)
        config = shape.layer(way)
        return exchange(tokens, experts, gates, weights, apply_experts, config, mesh).out

    def loss(*arrays: Any) -> Array:
        return jnp.sum(jnp.square(forward(*arrays)), dtype=jnp.float32)

    return {"forward": forward, "step": jax.value_and_grad(loss, (0, 1, 2))}


def _alone(shape: Shape, tokens: Array, gates: Array, weights: Weights, experts: Array) -> Array:
    """The library's dropless path on one device, with the routing given."""
    probs, none = jnp.zeros((shape.T, shape.E), jnp.float32), jnp.zeros((), jnp.float32)
    routing = Routing(experts, gates, probs, none, {}, {})
    groups = dropless.dispatch(tokens, routing, jnp.ones((shape.T,), bool), 1.0)
    return dropless.combine(apply_experts(weights, groups.rows, groups.sizes), groups)


# --- time -------------------------------------------------------------------------------------


def time_rows(shape: Shape, repeats: int, devices: Sequence[jax.Device]) -> list[Row]:
    """Times the layer on one device, and with each exchange on X devices.

    Returns:
        Rows with milliseconds and ratios to the one device, as `train.bench.grouped` has them.
    """
    mesh = make_mesh(MeshConfig(data=1, expert=shape.X), devices)
    arrays = operands(shape)()
    parts, alone = spread(mesh, arrays), jax.device_put(arrays, devices[0])
    ways: dict[str, str | None] = {"one device": None}
    ways |= {name: way for name, (way, _) in WAYS.items() if _runs(name, devices[0])}
    calls: dict[tuple[str, str], Step] = {}
    for name, way in ways.items():
        given = parts if way else alone
        for part, program in programs(shape, way, mesh.abstract_mesh).items():
            calls[name, part] = partial(jax.jit(program).lower(*given).compile(), *given)
    times = interleave(calls, dict.fromkeys(calls, repeats))
    rows = []
    for name, way in ways.items():
        row: Row = {"exchange": name, "X": shape.X if way else 1, "E": shape.E}
        row |= {"dtype": shape.dtype, "rounds": repeats}
        for part in ("forward", "step"):
            row |= against(part, times[name, part], times["one device", part])
        rows.append(row)
    return rows


def _runs(name: str, device: jax.Device) -> bool:
    """Of the two ways to do `RAGGED`, the one that this device has."""
    left_out = RAGGED if device.platform == "cpu" else f"{RAGGED}, emulated"
    return name != left_out


def spread(mesh: Mesh, arrays: Any) -> Any:
    """The arrays of `operands` where a mesh has them: tokens over its devices, and experts."""
    rows = batch_sharding(mesh)

    def place(path: tuple[Any, ...], leaf: Array) -> NamedSharding:
        return NamedSharding(mesh, spec(path, leaf.ndim))

    weights = jax.tree_util.tree_map_with_path(place, arrays[2])
    return jax.device_put(arrays, (rows, rows, weights, rows))


def exchanges(shapes: Sequence[Shape], dtype: str, repeats: int) -> list[Row]:
    """The benchmark.

    Args:
        shapes: bytes are counted of those with the most experts, whose counts weigh most; those
            with the most devices and of the dtype are timed.
        dtype: "float32" or "bfloat16".
        repeats: timed rounds.

    Raises:
        ValueError: a shape cannot be spread, or there are too few devices.
    """
    for shape in shapes:
        check_shape(shape)
    X, E = (max(getattr(shape, letter) for shape in shapes) for letter in "XE")
    devices = take_devices(X)
    counted = [shape for shape in shapes if shape.E == E]
    timed = [shape for shape in shapes if shape.X == X and shape.dtype == dtype]
    rows = [row for shape in counted for row in byte_rows(shape)]
    return rows + [row for shape in timed for row in time_rows(shape, repeats, devices)]
