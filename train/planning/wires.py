"""Which links the collectives of a mesh axis use, and how fast that makes them.

Every device of every group works at once, so links are shared by whatever goes over them. On a
torus the exchange is routed: between each pair one dimension after another, the shorter way round,
half each way where both are as long. Rings go over all dimensions of a group at once.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

from emoe_jax.sharding import AXES, MeshConfig
from train.planning.topology import Topology, places

Axes = tuple[str, ...]


@functools.lru_cache(maxsize=65536)
def ring_rate(topology: Topology, mesh: MeshConfig, axes: Axes) -> float:
    """Bytes/s that a device of a group can receive in a gather, a scatter or a reduction.

    A dimension over which a group spreads gives a device one link, or two where it closes to a
    ring; groups that interleave share them. GPUs: the switch's rate within a node, the adapters' of
    all members of a node together across nodes.
    """
    chip = topology.chip
    group = _groups(topology, mesh, axes)[0]
    if chip.dims == 0:
        nodes = len(set(group[:, 0].tolist()))
        if nodes == 1 or not chip.across:
            return chip.link
        # Of n-1 parts, those of other nodes come over the adapters of the node's members.
        return min(chip.link, chip.across * len(group) / nodes)
    total = 0.0
    for dim, size in enumerate(topology.shape):
        there = sorted(set(group[:, dim].tolist()))
        if len(there) == 1:
            continue
        stride = min(b - a for a, b in itertools.pairwise(there))
        closes = topology.wraps[dim] and len(there) * stride == size
        total += chip.link * (2 if closes else 1) / stride
    # Two devices on one chip share its links, and what they tell each other needs none.
    return total or chip.hbm / 2


@functools.lru_cache(maxsize=65536)
def exchange_rate(topology: Topology, mesh: MeshConfig, axis: str = "expert") -> float:
    """Bytes/s of a device's buffer in an all-to-all over an axis, its own part counted in.

    The buffer of V bytes has V/X for each of X peers; the fullest link carries `load` such parts,
    so the exchange takes load · V / X / link.
    """
    chip = topology.chip
    groups = _groups(topology, mesh, (axis,))
    X = groups.shape[1]
    if chip.dims == 0:
        group = groups[0]
        nodes = len(set(group[:, 0].tolist()))
        if nodes == 1 or not chip.across:
            return chip.link * X / (X - 1)
        return chip.across * X / (X - X // nodes)
    return chip.link * X / link_load(topology, mesh, axis) if X > 1 else chip.hbm


@functools.lru_cache(maxsize=65536)
def link_load(topology: Topology, mesh: MeshConfig, axis: str = "expert") -> float:
    """Parts that cross the fullest link when each device sends one part to each of its group."""
    groups = _groups(topology, mesh, (axis,))
    if groups.shape[0] > 64:  # translations of one another in all but a few meshes
        groups = groups[:: groups.shape[0] // 64]
        return max(_load(topology, group[None]) for group in groups) * _sharing(topology, groups[0])
    return _load(topology, groups)


def _sharing(topology: Topology, group: np.ndarray) -> float:
    """How many groups use each link where a group takes every n-th chip of a dimension."""
    worst = 1
    for dim in range(len(topology.shape)):
        there = sorted(set(group[:, dim].tolist()))
        if len(there) > 1:
            worst = max(worst, min(b - a for a, b in itertools.pairwise(there)))
    return float(worst)


def _load(topology: Topology, groups: np.ndarray) -> float:
    """The fullest directed link when each group of [G,X,3] exchanges one part a pair."""
    shape = (*topology.shape, 1, 1)[:3]
    wraps = (*topology.wraps, False, False)[:3]
    X = groups.shape[1]
    first, second = np.nonzero(~np.eye(X, dtype=bool))
    here = groups[:, first].reshape(-1, 3).copy()
    there = groups[:, second].reshape(-1, 3)
    worst = 0.0
    for dim, size in enumerate(shape):
        ahead = (there[:, dim] - here[:, dim]) % size
        if not wraps[dim]:
            hops = {1: np.maximum(there[:, dim] - here[:, dim], 0)}
            hops[-1] = np.maximum(here[:, dim] - there[:, dim], 0)
            weights = {1: np.ones(len(here)), -1: np.ones(len(here))}
        else:
            behind = (size - ahead) % size
            even = ahead == behind
            hops = {
                1: np.where(ahead <= behind, ahead, 0),
                -1: np.where(behind <= ahead, behind, 0),
            }
            weights = dict.fromkeys((1, -1), np.where(even, 0.5, 1.0))
        for way in (1, -1):
            links = np.zeros(shape)
            at = here.copy()
            for hop in range(int(hops[way].max(initial=0))):
                goes = hops[way] > hop
                np.add.at(links, tuple(at[goes].T), weights[way][goes])
                at[goes, dim] = (at[goes, dim] + way) % size
            worst = max(worst, float(links.max(initial=0.0)))
        here[:, dim] = there[:, dim]
    return worst


@functools.lru_cache(maxsize=65536)
def _groups(topology: Topology, mesh: MeshConfig, axes: Axes) -> np.ndarray:
    """Where the members of each group stand: [groups, members, 3]."""
    grid = places(topology, mesh)
    inside = [AXES.index(axis) for axis in axes]
    outside = [n for n in range(len(AXES)) if n not in inside]
    members = int(np.prod([grid.shape[n] for n in inside]))
    return grid.transpose(*outside, *inside, len(AXES)).reshape(-1, members, 3)
