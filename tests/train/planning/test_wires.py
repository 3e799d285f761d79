"""Loads of links, counted by hand."""

import pytest

from emoe_jax.sharding import MeshConfig
from train.planning.topology import parse
from train.planning.wires import exchange_rate, link_load, ring_rate

LINK = 100e9  # of v5p and v6e


def test_an_exchange_on_a_ring_of_eight():
    # To the right go 1+2+3 hops to three peers and half of those 4 hops away: 8 link-parts from
    # each of 8 devices, over 8 links to the right.
    mesh, slice_ = MeshConfig(fsdp=8, expert=8), parse("v5p:8x8x8")
    assert link_load(slice_, mesh) == 8
    assert exchange_rate(slice_, mesh) == LINK * 8 / 8


def test_an_exchange_on_a_line_of_four():
    # No ring: over the middle link to the right go the parts of 2 devices to 2.
    slice_, mesh = parse("v6e:4x4"), MeshConfig(fsdp=4, expert=4)
    assert link_load(slice_, mesh) == 4
    assert exchange_rate(slice_, mesh) == LINK * 4 / 4


def test_a_cube_of_two_carries_more_than_a_ring():
    # Dimension by dimension: 4 peers lie across each dimension of two.
    assert link_load(parse("v5p:2x2x2"), MeshConfig(expert=8)) == 4


@pytest.mark.parametrize(
    ("name", "mesh", "axis", "rate"),
    [
        ("v5p:8x8x8", MeshConfig(fsdp=8, expert=8), "expert", 2 * LINK),  # a ring: both ways
        ("v6e:4x4", MeshConfig(fsdp=4, expert=4), "expert", LINK),  # a line: its ends have one link
        ("v6e:16x16", MeshConfig(fsdp=256), "fsdp", 4 * LINK),  # two rings
        ("h100:8x4", MeshConfig(fsdp=4, expert=8), "expert", 450e9),  # within a node
        ("h100:8x4", MeshConfig(fsdp=4, expert=8), "fsdp", 50e9),  # one of each node
        ("h100:8x4", MeshConfig(fsdp=32), "fsdp", 400e9),  # eight adapters a node
    ],
)
def test_rings(name, mesh, axis, rate):
    assert ring_rate(parse(name), mesh, (axis,)) == rate


def test_an_exchange_across_nodes_takes_the_adapters():
    # Of 32 parts 24 go to other nodes.
    assert exchange_rate(parse("h100:8x4"), MeshConfig(expert=32)) == pytest.approx(50e9 * 32 / 24)
