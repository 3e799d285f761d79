"""What the compiler says, where it is this machine's; and the reading of its texts."""

import pathlib

import pytest

from tests.train.planning.shapes import small
from train.planning import hlo
from train.planning.compiler import buffer_sizes, compile_step, too_large
from train.planning.memory import predict, weigh
from train.planning.program import planned, step_on
from train.planning.topology import abstract_shape, parse

CPU = parse("cpu:8")

BUFFERS = """BufferAssignment:
allocation 0: size 4, color 8, page 0, thread-local:
 value: <1 a @0> (size=4,offset=0): u32[]
allocation 1: size 1000, page 0, parameter 3, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
 value: <2 b @0> (size=1000,offset=0): f32[250]
allocation 2: size 70, page 0, preallocated-temp:
allocation 3: size 5, page 0, maybe-live-out:
allocation 4: size 900, color 1, page 0, preallocated-temp:
"""

OUT = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory"
    " required for HLO temporaries (67.5G) exceeds available HBM (31.25G). HLO module: jit_x"
)


def test_sizes_in_a_buffer_assignment_are_those_of_hbm():
    assert buffer_sizes(BUFFERS) == (1000, 75)


@pytest.mark.parametrize(
    ("message", "temporary", "limit"),
    [
        (OUT, 67.5 * 2**30, 31.25 * 2**30),
        ("Ran out of memory. Used 4.0G of 2.0G hbm. Exceeded by 2.0G", 3 * 2.0**30, 2.0**31),
    ],
)
def test_a_program_that_is_too_large_says_by_how_much(message, temporary, limit):
    found = too_large(message, pathlib.Path("nowhere"), 1.0, held=2.0**30)
    assert (found.arguments, found.temporary, found.limit) == (2.0**30, temporary, limit)


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="INTERNAL"):
        too_large("INTERNAL: a bug", pathlib.Path("nowhere"), 1.0, held=0.0)


def test_a_step_compiles_for_this_machine_and_is_kept(kept):
    config = planned(small({"data": 2, "expert": 4}), "cpu", 8)
    traced = step_on(config, CPU)
    compiled = compile_step(traced, config, CPU, keep=kept)
    mesh = abstract_shape(CPU, config.mesh)
    memory = predict(config, weigh(config), mesh)
    # What lives through the step is exact, but for counters, rows and router state.
    assert compiled.arguments == pytest.approx(memory.arguments, rel=0.01)
    assert compiled.analysis
    assert compiled.flops > 0
    exchanges = [
        each
        for each in hlo.collectives(compiled.schedule, mesh)
        if each.purpose == "exchange" and each.times
    ]
    assert {each.axes for each in exchanges} == {("expert",)}
    (file,) = kept.glob("*/compiled.json")
    written = file.stat().st_mtime_ns
    assert compile_step(traced, config, CPU, keep=kept) == compiled
    assert file.stat().st_mtime_ns == written


def test_a_mesh_that_divides_nothing_is_refused_before_any_compile():
    with pytest.raises(ValueError, match="multiple of 32"):
        step_on(planned(small({"data": 8}, accumulate=4), "cpu", 8), CPU)
