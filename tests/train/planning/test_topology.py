"""Names of topologies, and where devices stand."""

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from emoe_jax.sharding import MeshConfig
from train.flops import peak_flops
from train.planning import topology
from train.planning.chips import CHIPS
from train.planning.topology import EXAMPLES, abstract_shape, compile_devices, parse, places


@pytest.mark.parametrize("name", EXAMPLES.values())
def test_every_example_is_a_topology_of_its_name(name):
    assert parse(name).name == name
    assert parse(name).chip is CHIPS[name.partition(":")[0]]


def test_devices_are_chips_but_for_those_with_two():
    assert parse("v5p:8x8x8").devices == 512
    assert parse("7x:4x4x4").devices == 2 * 64
    assert parse("h100:8x4").devices == 32


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),  # not a cube of four
        ("v6e:16x16", (True, True)),
        ("v6e:8x16", (False, True)),  # a whole pod's side alone
        ("h100:8x4", ()),
    ],
)
def test_which_dimensions_close(name, wraps):
    assert parse(name).wraps == wraps


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9:2x2", "v5p:8x8x8, v6e:16x16"),
        ("v5p:8x8", r"needs 3 number\(s\).*v5p:8x8x8"),
        ("v5p:axbxc", "needs 3 number"),
        ("v5p:3x3x3", "must be even"),
        ("h100:16x4", "at most 8 GPUs"),
        ("v5p:8x8x", "needs 3 number"),
    ],
)
def test_a_name_that_does_not_exist_lists_those_that_do(name, words):
    with pytest.raises(ValueError, match=words):
        parse(name)


def test_the_innermost_axis_is_a_physical_ring():
    stands = places(parse("v5p:8x8x8"), MeshConfig(fsdp=8, expert=8))
    assert stands.shape == (8, 8, 8, 1, 3)
    ring = stands[0, 0, :, 0]
    # One coordinate counts from 0 to 7, the others stay.
    assert sorted(len(set(column)) for column in ring.T.tolist()) == [1, 1, 8]


def test_gpus_of_a_node_are_neighbours():
    nodes = places(parse("h100:8x4"), MeshConfig(fsdp=4, expert=8))[..., 0]
    np.testing.assert_array_equal(nodes[0, :, :, 0], np.repeat(np.arange(4), 8).reshape(4, 8))


def test_a_mesh_that_does_not_multiply_is_refused():
    with pytest.raises(ValueError, match="does not multiply to the 8 devices"):
        abstract_shape(parse("cpu:8"), MeshConfig(fsdp=3))


def test_what_libtpu_refuses_is_told(monkeypatch):
    def refuse(**_):
        raise jax.errors.JaxRuntimeError("no such slice")

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match="v5p:2x6x1: libtpu refuses it: no such slice"):
        compile_devices(parse("v5p:2x6x1"))


def test_missing_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[plan\]'.*--model_only"):
        compile_devices(parse("v5p:2x2x1"))


def test_gpus_have_no_compiler_here():
    with pytest.raises(ValueError, match="--model_only"):
        compile_devices(parse("h100:8x4"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v4", "TPU v4"),
        ("v5e", "TPU v5 lite"),
        ("v5p", "TPU v5"),
        ("v6e", "TPU v6 lite"),
        ("7x", "TPU7x"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("h200", "NVIDIA H200"),
        ("b200", "NVIDIA B200"),
    ],
)
def test_peaks_are_those_of_the_training_log(name, kind):
    assert CHIPS[name].flops == peak_flops(kind)
