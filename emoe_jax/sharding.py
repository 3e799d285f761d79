"""Every mesh axis and every rule from logical to mesh axes: the one table of where arrays live."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from emoe_jax.config import require

Tree = Any

AXES = ("data", "fsdp", "expert", "tensor")
"""Mesh axes, always all present, of size 1 where unused."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which sequences and images are split."""

RULES: dict[str, str] = {
    "embed": "fsdp",
    "expert": "expert",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Logical axis to mesh axis."""

LOGICAL: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embedding",): ("vocab", "embed"),
    ("head",): ("vocab", "embed"),
    ("query", "kernel"): ("embed", "heads"),
    ("key", "kernel"): ("embed", "heads"),
    ("value", "kernel"): ("embed", "heads"),
    ("out", "kernel"): ("heads", "embed"),
    ("gate", "kernel"): ("embed", "mlp"),
    ("up", "kernel"): ("embed", "mlp"),
    ("down", "kernel"): ("mlp", "embed"),
    ("w_gate",): ("expert", "embed", "mlp"),
    ("w_up",): ("expert", "embed", "mlp"),
    ("w_down",): ("expert", "mlp", "embed"),
    ("b_gate",): ("expert", "mlp"),
    ("b_up",): ("expert", "mlp"),
    ("b_down",): ("expert", None),
}
"""Last names on a leaf's path to the logical axes of its last dimensions. Leading dimensions
(stacked layers) and leaves that are not named (norms, routers, bases, patches) are replicated.
Moments of the optimizer end in the same names, so the same rules hold for them."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product must be the number of devices.

    Attributes:
        data: replicas; -1 takes the devices that the other axes leave.
        fsdp: shards of parameters and optimizer state, gathered for use.
        expert: shards of the experts.
        tensor: shards of heads, hidden widths and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in AXES:
            size = getattr(self, name)
            fill = name == "data" and size == -1
            require(fill or size >= 1, f"mesh.{name}={size} must be at least 1")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all axes, of type Auto.

    Args:
        config: sizes.
        devices: all devices of the run where omitted.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.fsdp * config.expert * config.tensor
    data = len(devices) // fixed if config.data == -1 else config.data
    require(
        data * fixed == len(devices),
        f"mesh data={config.data} fsdp={config.fsdp} expert={config.expert}"
        f" tensor={config.tensor} does not multiply to the {len(devices)} devices at hand; set"
        f" mesh.data to -1 and choose fsdp, expert and tensor so that their product, {fixed} now,"
        f" divides {len(devices)}",
    )
    shape = (data, config.fsdp, config.expert, config.tensor)
    # Any shape that multiplies to the devices will do: a TPU's physical axis may hold several.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def ambient_mesh() -> AbstractMesh | None:
    """The mesh in whose context this is traced, if it has all `AXES` and more than one device.

    `jax.set_mesh(mesh)` sets it, as does the training program. Inside somebody's `shard_map` there
    is none: what runs there is one device's part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = set(AXES) <= set(mesh.axis_names) and mesh.size > 1
    if not ours or mesh.manual_axes:
        return None
    require(
        set(mesh.axis_types) == {AxisType.Auto},
        f"the mesh in context has axes of the types {mesh.axis_types}, and Auto axes are needed;"
        " make it with emoe_jax.sharding.make_mesh",
    )
    return mesh


def split_batch(x: jax.Array) -> jax.Array:
    """Keeps the first dimension [B,...] over all batch axes of the ambient mesh.

    Left alone, the partitioner may spread activations as the weights lie, and move them whole.
    Where B does not divide, or without a mesh, nothing is asked for.
    """
    mesh = ambient_mesh()
    if mesh is None or x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def on_rows(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """A function of independent rows [B,...], applied where the rows lie.

    For what the partitioner would gather first, such as `lax.top_k`.
    """
    mesh = ambient_mesh()
    if mesh is None or x.shape[0] % batch_shards(mesh):
        return function(x)
    rows = PartitionSpec(splitting(mesh, BATCH_AXES))
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows)(x)


def gathered(leaf: jax.Array, *names: str) -> jax.Array:
    """A parameter gathered over `fsdp` for its use, by the last names on its path.

    Left alone, the partitioner may cut the other operand along the same dimension instead, and sum
    products as large as the batch.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return leaf
    where = spec(tuple(jax.tree_util.DictKey(name) for name in names), leaf.ndim)
    kept = PartitionSpec(*(None if axis == RULES["embed"] else axis for axis in where))
    return jax.lax.with_sharding_constraint(leaf, kept)


def varying(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes of the `shard_map` around over which any of the arrays varies; none outside."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, each varying over every mesh axis over which one of them varies.

    Inside shard_map operands may vary over different axes (sharded rows, replicated weights). The
    cast makes the types equal, as a function with a derivative of its own needs it, where JAX
    transposes it into the right sum over devices. What needs no cast stays the same array: it is
    the backward pass that keeps it, and a copy of the weights would be kept beside the weights.
    """
    everywhere = varying(*arrays)
    return [
        jax.lax.pcast(array, tuple(sorted(everywhere - own)), to="varying")
        if (own := varying(array)) < everywhere
        else array
        for array in arrays
    ]


def splitting(mesh: Mesh | AbstractMesh, axes: Iterable[str | None]) -> tuple[str, ...]:
    """The mesh axes of those named that have more than one device.

    Inside shard_map no others are named: XLA on CPU carries out what one device would do with
    itself, and copies gradients for a sum over one (docs/performance.md).
    """
    return tuple(axis for axis in axes if axis and mesh.shape[axis] > 1)


def reduce_over(
    reduce: Callable[[jax.Array, tuple[str, ...]], jax.Array],
    x: jax.Array,
    axes: Iterable[str],
) -> jax.Array:
    """A reduction over those mesh axes that have more than one device, inside shard_map."""
    several = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    return reduce(x, several) if several else x


def in_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced in the context of a mesh; see `ambient_mesh`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return run


def spec(path: tuple[Any, ...], ndim: int) -> PartitionSpec:
    """Where a leaf of parameters, optimizer or router state lives, by its path and rank."""
    names = tuple(str(getattr(part, "key", part)) for part in path)
    for suffix, logical in LOGICAL.items():
        if names[-len(suffix) :] == suffix and ndim >= len(logical):
            lead = (None,) * (ndim - len(logical))
            return PartitionSpec(*lead, *(RULES[axis] if axis else None for axis in logical))
    return PartitionSpec()


def shardings(mesh: Mesh, abstract: Tree) -> Tree:
    """Shardings of a tree of abstract arrays.

    Raises:
        ValueError: a dimension that the mesh does not divide; all of them are listed.
    """
    problems: list[str] = []

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        where = spec(path, len(leaf.shape))
        for size, axis in zip(leaf.shape, where, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                problems.append(f"{name} {leaf.shape}: mesh.{axis}={mesh.shape[axis]} vs {size}")
        return NamedSharding(mesh, where)

    tree = jax.tree_util.tree_map_with_path(place, abstract)
    require(
        not problems,
        "the mesh does not divide these dimensions; change the mesh axis or the model's size:\n  "
        + "\n  ".join(problems),
    )
    return tree


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts into which the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batches: the first dimension over all batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_here(mesh: Mesh, batch: int) -> np.ndarray:
    """Rows of a global batch that the devices of this process hold, ascending.

    Every row is held by one process, or by several where `tensor` spans them.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[index] for index in places.values()]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh | AbstractMesh, batch: int, accumulate: int) -> None:
    """Raises `ValueError` unless shards and microbatches divide the global batch."""
    shards = batch_shards(mesh)
    parts = shards * accumulate
    processes = jax.process_count()
    over = f" over {processes} processes" if processes > 1 else ""
    require(
        batch % parts == 0,
        f"batch={batch} is not a multiple of {parts} ({shards} shards of the mesh{over} times"
        f" accumulate={accumulate}); set batch to {max(1, round(batch / parts)) * parts}",
    )
