"""Rates and sizes of the chips that runs can be planned for: one table, each row with its source.

All figures are the makers' peaks. What a program reaches of them is not in the table; see
`train.planning.cost.Rates`.
"""

from __future__ import annotations

import dataclasses

from train.flops import PEAK_FLOPS

GB = 1e9
GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
        name: as in a topology's name.
        flops: dense bfloat16 peak, FLOP/s.
        memory: bytes of HBM, or of main memory for "cpu".
        hbm: bytes/s between memory and cores.
        link: bytes/s that one link carries in one direction.
        dims: physical dimensions of the torus or mesh; 0 for GPUs and "cpu", which are switched.
        wraps_at: a torus dimension closes to a ring where it is a multiple of this ("v5e", "v6e":
            where it is exactly this), 0 for never.
        node: devices behind one switch, 0 for none.
        across: bytes/s of one device in one direction to other nodes.
        platform: "tpu", "gpu" or "cpu".
        options: what `get_topology_desc` needs so that a chip is one device.
        source: where the figures stand.
    """

    name: str
    flops: float
    memory: float
    hbm: float
    link: float
    dims: int = 0
    wraps_at: int = 0
    node: int = 0
    across: float = 0.0
    platform: str = "tpu"
    options: tuple[tuple[str, str], ...] = ()
    source: str = ""


_TPU = "docs.cloud.google.com/tpu/docs/"
_GPU = "NVIDIA data sheets: dense BF16 (half of the figure with sparsity), NVLink half of the total"


def _gpu(name: str, kind: str, memory: float, hbm: float, link: float, machine: str) -> Chip:
    """A GPU of which eight share a switch, each with an adapter of 400 Gb/s to other nodes."""
    source = f"{_GPU}; one 400 Gb/s adapter a GPU ({machine})"
    return Chip(
        name,
        PEAK_FLOPS[kind],
        memory,
        hbm,
        link,
        node=8,
        across=50 * GB,
        platform="gpu",
        source=source,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        # Links: the bidirectional bandwidth of a chip over its ports (6 of a 3D torus, 4 of a 2D
        # one), halved for one direction. v4: 50 GB/s a link (arXiv 2304.01433, table 4).
        Chip(
            "v4",
            PEAK_FLOPS["TPU v4"],
            32 * GIB,
            1200 * GB,
            50 * GB,
            3,
            4,
            options=(("chip_config_name", "megacore"),),
            source=_TPU + "v4; link: arXiv 2304.01433, table 4",
        ),
        Chip(
            "v5e",
            PEAK_FLOPS["TPU v5e"],
            16 * GIB,
            819 * GB,
            50 * GB,
            2,
            16,
            source=_TPU + "v5e: 400 GB/s, 4 ports",
        ),
        Chip(
            "v5p",
            PEAK_FLOPS["TPU v5p"],
            95 * GIB,
            2765 * GB,
            100 * GB,
            3,
            4,
            source=_TPU + "v5p-training: 1200 GB/s, 6 ports",
        ),
        Chip(
            "v6e",
            PEAK_FLOPS["TPU v6e"],
            32 * GIB,
            1638 * GB,
            100 * GB,
            2,
            16,
            source=_TPU + "v6e: 800 GB/s, 4 ports",
        ),
        # A chip is two devices: halves of its rates; its links are shared by both.
        Chip(
            "7x",
            PEAK_FLOPS["TPU7x"],
            96 * GIB,
            7380 * GB / 2,
            100 * GB / 2,
            3,
            4,
            source=_TPU
            + "tpu7x: 2307 TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s a chip of two devices",
        ),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 80 * GB, 3350 * GB, 450 * GB, "DGX H100"),
        _gpu("h200", "NVIDIA H200", 141 * GB, 4800 * GB, 450 * GB, "DGX H200"),
        _gpu("b200", "NVIDIA B200", 180 * GB, 8000 * GB, 900 * GB, "DGX B200"),
        # One of eight virtual devices of a small machine: orders of magnitude, to be calibrated.
        Chip("cpu", 2e10, 4 * GIB, 5 * GB, 2 * GB, platform="cpu", source="a guess; --calibrate"),
    )
}
"""Chips by the name that topologies begin with.

A v4 or v5p chip is one device (two cores as one), v5e and v6e chips have one core.
"""
