"""Names of topologies, such as "v5p:8x8x8", and the mesh that training would lay over them.

Where devices stand decides which links a collective uses. `make_mesh` of the library places them,
here on stand-ins with the same coordinates, so that the cost model needs no compiler for TPUs.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from emoe_jax.config import require
from emoe_jax.sharding import AXES, MeshConfig, make_mesh
from train.planning.chips import CHIPS, Chip

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "7x": "TPU7x"}
"""What devices of each TPU call themselves: placing them depends on it."""

EXAMPLES = {
    "v4": "v4:4x4x4",
    "v5e": "v5e:16x16",
    "v5p": "v5p:8x8x8",
    "v6e": "v6e:16x16",
    "7x": "7x:4x4x4",
    "h100": "h100:8x4",
    "h200": "h200:8x4",
    "b200": "b200:8x4",
    "cpu": "cpu:8",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices and their wiring.

    Attributes:
        chip: of which all devices are.
        shape: chips along each physical dimension; GPUs: of a node, and nodes; "cpu": devices.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def cores(self) -> int:
        """Devices of one chip."""
        return 2 if self.chip.name == "7x" else 1

    @property
    def devices(self) -> int:
        """JAX devices."""
        return math.prod(self.shape) * self.cores

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each physical dimension closes to a ring.

        v4, v5p and 7x: where all dimensions are multiples of 4, which is what the optical switches
        join. v5e and v6e: a dimension of 16, a whole pod's.
        """
        at = self.chip.wraps_at
        if self.chip.dims == 3:
            return (all(size % at == 0 for size in self.shape),) * 3
        return tuple(size == at for size in self.shape) if self.chip.dims else ()


def parse(name: str) -> Topology:
    """The topology of a name.

    Raises:
        ValueError: there is no such chip, or its slices do not have this form; lists those that
            there are.
    """
    kind, _, sizes = name.partition(":")
    known = ", ".join(EXAMPLES.values())
    near = difflib.get_close_matches(name, EXAMPLES.values(), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    require(kind in CHIPS, f"--topology={name} is not known{hint}; there are, for example: {known}")
    chip = CHIPS[kind]
    dims = {"tpu": chip.dims, "gpu": 2, "cpu": 1}[chip.platform]
    require(
        re.fullmatch("x".join([r"[1-9]\d*"] * dims), sizes) is not None,
        f"--topology={name}: {kind} needs {dims} number(s) behind the colon, as in"
        f" {EXAMPLES[kind]}",
    )
    topology = Topology(chip, tuple(int(size) for size in sizes.split("x")))
    require(
        chip.platform != "gpu" or topology.shape[0] <= chip.node,
        f"--topology={name}: a node has at most {chip.node} GPUs, as in {EXAMPLES[kind]}",
    )
    require(
        chip.dims == 0
        or math.prod(topology.shape) == 1
        or (topology.shape[0] % 2 == 0 and topology.shape[1] % 2 == 0),
        f"--topology={name}: a host of {kind} has 2x2 chips, so the first two numbers must be even",
    )
    return topology


def compile_devices(topology: Topology) -> list[Any]:
    """Devices that the compiler takes: of TPUs nobody holds, or this machine's processor.

    Raises:
        ValueError: there is no compiler for them here, or libtpu refuses the shape.
    """
    chip = topology.chip
    require(
        chip.platform != "gpu",
        f"--topology={topology.name}: XLA compiles for GPUs only where one is; plans for them come"
        " from the cost model alone: add --model_only",
    )
    if chip.platform == "cpu":
        found = jax.devices("cpu")
        require(
            len(found) >= topology.devices,
            f"--topology={topology.name} needs {topology.devices} devices, and JAX has started with"
            f" {len(found)}; set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{topology.devices}",
        )
        return found[: topology.devices]
    require(
        importlib.util.find_spec("libtpu") is not None,
        "compiling for TPUs that nobody holds needs libtpu: pip install -e '.[plan]'; or add"
        " --model_only for the cost model alone",
    )
    # Otherwise libtpu asks the network which machine this is, and only one process may load it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    name = topology.name.replace("7x:", "tpu7x:") if chip.name == "7x" else topology.name
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **dict(chip.options)
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={topology.name}: libtpu refuses it: {error}") from error
    return list(described.devices)


@dataclasses.dataclass(frozen=True)
class _StandIn:
    """What placing a mesh reads of a device."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int
    device_kind: str
    platform: str
    process_index: int = 0


@functools.cache
def _stand_ins(topology: Topology) -> tuple[_StandIn, ...]:
    x, y, z = (*topology.shape, 1, 1)[:3]
    kind = KINDS.get(topology.chip.name, "cpu")
    coords = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    return tuple(
        _StandIn(n * topology.cores + core, where, core, kind, topology.chip.platform)
        for n, where in enumerate(coords)
        for core in range(topology.cores)
    )


@functools.lru_cache(maxsize=4096)
def places(topology: Topology, config: MeshConfig) -> np.ndarray:
    """Where the devices of a mesh stand: [data,fsdp,expert,tensor,3] int, or the node of a GPU.

    Raises:
        ValueError: the mesh does not fit the number of devices.
    """
    if topology.chip.platform == "tpu":
        devices: Any = _stand_ins(topology)
        mesh = make_mesh(config, devices)
        return np.array([d.coords for d in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
    fixed = config.fsdp * config.expert * config.tensor
    data = topology.devices // fixed if config.data == -1 else config.data
    shape = (data, config.fsdp, config.expert, config.tensor)
    require(
        math.prod(shape) == topology.devices,
        f"mesh {shape} does not multiply to the {topology.devices} devices of {topology.name}",
    )
    node = topology.chip.node or topology.devices
    numbers = np.arange(topology.devices).reshape(shape) // node
    return np.stack([numbers, np.zeros_like(numbers), np.zeros_like(numbers)], axis=-1)


def abstract_shape(topology: Topology, config: MeshConfig) -> dict[str, int]:
    """Sizes of the mesh axes on the topology."""
    return dict(zip(AXES, places(topology, config).shape, strict=False))


def mesh_on(topology: Topology, config: MeshConfig) -> Mesh:
    """The mesh for a compile, of `compile_devices`."""
    mesh = make_mesh(config, compile_devices(topology))
    assert set(mesh.axis_types) == {AxisType.Auto}
    return mesh
