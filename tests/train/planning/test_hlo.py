"""The reader of schedules, on a program of a few lines: 4 devices, data 2 by expert 2."""

import pytest

from train.planning.hlo import Collective, array_bytes, collectives

MESH = {"data": 2, "fsdp": 1, "expert": 2, "tensor": 1}

PROGRAM = """HloModule jit_train_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scatter (p: f32[64,1024]) -> f32[32,1024] {
  %p = f32[64,1024]{1,0} parameter(0)
  %all-reduce.9 = f32[64,1024]{1,0} all-reduce(%p), replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %slice = f32[32,1024]{1,0} slice(%all-reduce.9), slice={[0:32], [0:1024]}
}

%condition (c: (s32[], bf16[2,64,1024])) -> pred[] {
  %c = (s32[], bf16[2,64,1024]{2,1,0}) parameter(0)
  %n = s32[] constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], bf16[2,64,1024])) -> (s32[], bf16[2,64,1024]) {
  %t = (s32[], bf16[2,64,1024]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[2,64,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %there = bf16[2,64,1024]{2,1,0} all-to-all(%x), replica_groups={{0,1},{2,3}}, @EXCHANGE@
  ROOT %pair = (s32[], bf16[2,64,1024]{2,1,0}) tuple(%x, %there)
}

%as_data (c: (s32[], s32[])) -> pred[] {
  %c = (s32[], s32[]) parameter(0)
  ROOT %more = pred[] custom-call(%c)
}

ENTRY %main (p0: f32[64,1024]) -> f32[32,1024] {
  %p0 = f32[64,1024]{1,0} parameter(0)
  %loop = (s32[], bf16[2,64,1024]{2,1,0}) while(%start), condition=%condition, body=%body
  %maybe = (s32[], bf16[2,64,1024]{2,1,0}) while(%start), condition=%as_data, body=%body
  %gather-start = (f32[64,512]{1,0}, f32[64,1024]{1,0}) all-gather-start(%p1), @DATA@
  %work = f32[64,64]{1,0} fusion(%p0), kind=kLoop, calls=%nothing
  %gather-done = f32[64,1024]{1,0} all-gather-done(%gather-start)
  %late-start = (f32[64,512]{1,0}, f32[64,1024]{1,0}) all-gather-start(%p1), @EXPERT@
  %late-done = f32[64,1024]{1,0} all-gather-done(%late-start)
  %tiny = s32[8]{0} all-reduce(%p2), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %kept = f32[32,1024]{1,0} fusion(%p0), kind=kCustom, calls=%scatter
}
"""
for name, text in {
    "@EXCHANGE@": 'metadata={op_name="jit(train_step)/exchange/all_to_all"}',
    "@DATA@": "replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}",
    "@EXPERT@": "replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={1}",
}.items():
    PROGRAM = PROGRAM.replace(name, text)

ROWS = 2 * 64 * 1024 * 2  # bytes of what is exchanged
WIDE = 64 * 1024 * 4


def by_name():
    found = collectives(PROGRAM, MESH)
    return {(each.kind, each.axes, each.times): each for each in found}


def test_a_loop_multiplies_and_one_of_unknown_trips_does_not_count():
    exchanges = [each for each in collectives(PROGRAM, MESH) if each.kind == "all-to-all"]
    assert [each.times for each in exchanges] == [5, 0]
    assert exchanges[0] == Collective(
        "all-to-all", ("expert",), "exchange", ROWS, ROWS / 2, 5, False
    )


def test_a_pair_hides_only_what_has_work_between():
    ahead = by_name()["all-gather", ("data",), 1]
    late = by_name()["all-gather", ("expert",), 1]
    assert (ahead.hidden, late.hidden) == (True, False)
    assert ahead.size == late.size == WIDE
    assert ahead.received == WIDE / 2


def test_a_fused_all_reduce_of_which_a_slice_stays_is_a_scatter():
    scatter = by_name()["reduce-scatter", ("data",), 1]
    assert scatter.purpose == "gradients"
    # Half of the sum stays; the other device's half comes from it.
    assert scatter.received == WIDE / 2


def test_small_ones_carry_statistics():
    assert by_name()["all-reduce", ("data", "expert"), 1].purpose == "statistics"


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0:T(8,128)}", 24),
        ("(bf16[4], s32[])", 12),
        ("pred[8]", 8),
        ("f8e4m3fn[8]", 0),  # not an array that training moves
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert array_bytes(shape) == size


def test_trips_that_the_compiler_knows():
    known = PROGRAM.replace(
        "condition=%as_data, body=%body",
        'condition=%as_data, body=%body, backend_config={"known_trip_count":{"n":"7"}}',
    )
    assert sorted(each.times for each in collectives(known, MESH)) == [1, 1, 1, 1, 5, 7]
