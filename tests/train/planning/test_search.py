"""Which ways are legal, and which of them are chosen."""

import dataclasses
import math

import pytest

from emoe_jax.sharding import MeshConfig
from tests.train.planning.shapes import small
from train.planning import search as searching
from train.planning.chips import CHIPS
from train.planning.memory import weigh
from train.planning.search import legal, meshes, search, smallest_change
from train.planning.topology import Topology, parse

CPU = parse("cpu:4")


def shrunk(memory):
    """Four devices with so many bytes."""
    return Topology(dataclasses.replace(CHIPS["cpu"], memory=memory), (4,))


def test_meshes_of_four_devices():
    # 4 = 2·2 over four axes: 4 ways to put 4 on one axis, 6 to put 2 on two; but the 258 words of
    # the vocabulary are not 4 parts for `tensor`.
    found = meshes(weigh(small()), 4)
    assert len(found) == len(set(found)) == 9
    assert all(math.prod(dataclasses.astuple(mesh)) == 4 for mesh in found)


def test_an_axis_divides_every_dimension_that_it_splits():
    # 8 experts: 16 devices on the axis have none to hold.
    assert all(mesh.expert <= 8 for mesh in meshes(weigh(small()), 16))


def test_every_legal_way_divides_the_batch():
    ways = list(legal(small(), weigh(small()), CPU))
    assert len(ways) == len({str(searching.settings(way)) for way in ways})
    for way in ways:
        parts = way.mesh.data * way.mesh.fsdp * way.mesh.expert
        assert way.batch % (parts * way.accumulate) == 0
    spread = [way for way in ways if way.mesh.expert == 4 and way.accumulate == 1]
    # Four policies of remat; two exchanges with four sizes of buffers, and one that needs none.
    assert len(spread) == 4 * (2 * 4 + 1)


def test_a_search_ranks_what_fits():
    found = search(small(), CPU)
    assert [way.seconds for way in found] == sorted(way.seconds for way in found)
    middle = sorted(way.memory.total for way in found)[len(found) // 2]
    fewer = search(small(), shrunk(middle))
    assert 0 < len(fewer) < len(found)
    assert all(way.memory.total <= middle for way in fewer)


def test_the_smallest_change_that_fits():
    config = small({"data": 4}, model={"remat": "none"})
    found = search(config, CPU)
    mine = next(
        way for way in found if searching.settings(way.config) == searching.settings(config)
    )
    place = shrunk(mine.memory.total - 1)
    keys, way = smallest_change(config, place, search(config, place))
    assert way.memory.total < mine.memory.total
    assert len({key.partition(".")[0] for key in keys}) == 1


def test_nothing_may_fit():
    assert search(small(), shrunk(1000.0)) == []
    assert smallest_change(small({"data": 4}), shrunk(1000.0), []) is None


def test_a_batch_that_divides_on_no_mesh_is_refused():
    odd = dataclasses.replace(small(model={"heads": 1, "kv_heads": 1}), batch=1)
    with pytest.raises(ValueError, match="no mesh of 7 devices"):
        search(odd, parse("cpu:7"))


def test_meshes_are_resolved():
    assert MeshConfig(data=-1) not in meshes(weigh(small()), 4)
