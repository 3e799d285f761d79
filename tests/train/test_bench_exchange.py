"""What exchanges move, read from their programs, against counts by hand; the benchmark's output."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from emoe_jax.sharding import AXES, MeshConfig, make_mesh
from train import bench, bench_exchange
from train.bench_exchange import (
    AXIS,
    RAGGED,
    WAYS,
    Shape,
    balanced_choices,
    byte_rows,
    check_shape,
    operands,
    programs,
    rows_sent,
    spread,
    take_devices,
)
from train.collectives import collectives

# 8 tokens on each of 4 devices, 16 assignments, 4 for each device; width 4.
SHAPE = Shape(T=32, D=4, F=6, K=2, E=8, X=4, dtype="float32", buffer_factor=1.25)
# Sums of 3 scalars over 4 devices, 6 bytes each: dropped, overflows, exchanges.
SUMS = 3 * 6
# Each device gathers 8 counts of 3 others, and the number of rounds is agreed.
COUNTS = 3 * 8 * 4 + 6 + SUMS


MESH = AbstractMesh((1, 1, 4, 1), AXES, axis_types=(AxisType.Auto,) * 4)


def only(monkeypatch, *names):
    """Leaves these ways alone in the benchmark: tracing all takes a while."""
    monkeypatch.setattr(bench_exchange, "WAYS", {name: WAYS[name] for name in names})


def table(shape):
    return {(row["exchange"], row["pass"]): row for row in byte_rows(shape)}


def test_bytes_by_hand():
    rows = table(SHAPE)
    assert {row["balanced_bytes"] for row in rows.values()} == {2 * 12 * 16}

    def moved(name):
        forward, backward = (rows[name, part] for part in ("forward", "backward"))
        assert forward["ratio"] == forward["moved_bytes"] / 384
        further = forward["further_bytes"], backward["further_bytes"]
        return (forward["moved_bytes"], backward["moved_bytes"], *further)

    # P = 5 slots for each of 3 peers, there and back; the backward pass of a further round runs
    # its forward pass again.
    once = 2 * 3 * 5 * 16
    assert moved("all_to_all") == (once + COUNTS, once, once, 2 * once)
    # 12 rows leave, there and back.
    assert moved(RAGGED) == (384 + COUNTS, 384, None, None)
    # All 16 rows of 3 others there, their room of 20 rows back; each with 3 numbers a pair.
    once = 3 * (16 + 20) * 16 + 2 * 3 * 3 * 4 * 4
    assert moved(f"{RAGGED}, emulated") == (once + COUNTS, once, once, 2 * once)
    # 8 tokens of 3 others, there and back; choices and gates, and the gates' gradients.
    once, choices = 2 * 3 * 8 * 16, 3 * 8 * 2 * 4
    assert moved("all_gather") == (once + 2 * choices + SUMS, once + choices, 0, 0)


def test_bfloat16_moves_half_but_for_sums(monkeypatch):
    only(monkeypatch, "all_gather")
    rows = table(dataclasses.replace(SHAPE, dtype="bfloat16"))
    # Outputs are summed in float32, and so are their cotangents gathered.
    assert rows["all_gather", "forward"]["balanced_bytes"] == 192
    assert rows["all_gather", "forward"]["moved_bytes"] == 3 * 8 * (8 + 16) + 384 + SUMS
    assert rows["all_gather", "backward"]["moved_bytes"] == 3 * 8 * (16 + 8) + 192


@pytest.mark.parametrize(("X", "dtype"), [(2, "float32"), (8, "bfloat16")])
def test_all_to_all_stays_near_the_balanced_volume(monkeypatch, X, dtype):
    only(monkeypatch, "all_to_all")
    shape = Shape(T=4096, D=512, F=16, K=2, E=64, X=X, dtype=dtype, buffer_factor=1.25)
    for row in byte_rows(shape):
        assert 1.25 <= row["ratio"] < 1.252


@pytest.mark.parametrize("way", ["all_to_all", RAGGED])
def test_lowered_programs_have_what_was_counted(way):
    """The same operations of the same sizes in the StableHLO text; `while` loops included."""
    pattern = {
        "all_to_all": r'"stablehlo\.all_to_all"\(.*-> tensor<(\d+)x(\d+)x(\d+)xf32>',
        RAGGED: r"@ragged_all_to_all\(.*-> tensor<(\d+)x(\d+)xf32>",
    }[way]
    for part, program in programs(SHAPE, way, MESH).items():
        traced = jax.jit(program).trace(*jax.eval_shape(operands(SHAPE)))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        sizes = [int(np.prod([*map(int, found)])) for found in re.findall(pattern, text)]
        found = [each for each in collectives(traced.jaxpr, AXIS, "tpu") if each.kind == way]
        assert len(found) == {"forward": 4, "step": 10}[part]
        parts = 3 / 4 if way == "all_to_all" else 1
        assert sorted(each.received for each in found) == sorted(4 * n * parts for n in sizes)
        assert all(each.times == 1 for each in found)


def test_choices_are_balanced_and_rows_counted():
    choices = np.asarray(balanced_choices(SHAPE)).reshape(4, -1)
    for mine in choices:
        assert np.bincount(mine, minlength=8).tolist() == [2] * 8
    assert rows_sent(SHAPE) == 12
    # 2 tokens a device choose experts 0 to 3, which are on devices 0 and 1: others send all 4.
    assert rows_sent(dataclasses.replace(SHAPE, T=8, buffer_factor=4.0)) == 4
    # With room for 5 rows, device 0 takes its own 2, then 2 of device 1 and 1 of device 2.
    assert rows_sent(dataclasses.replace(SHAPE, T=8)) == 2


def test_what_is_timed_computes_the_same():
    arrays = operands(SHAPE)()
    mesh = make_mesh(MeshConfig(expert=4), jax.devices()[:4])
    parts = spread(mesh, arrays)
    alone = jax.jit(programs(SHAPE, None, None)["forward"])(*arrays)
    for way in ("all_to_all", RAGGED, "all_gather"):
        found = jax.jit(programs(SHAPE, way, mesh.abstract_mesh)["forward"])(*parts)
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-5)


def test_it_prints_two_tables_and_writes_rows(monkeypatch, tmp_path, capsys):
    only(monkeypatch, RAGGED, "all_gather")
    path = tmp_path / "exchange.json"
    tiny = ["--tokens=16", "--width=4", "--hidden=6", "--experts=4", "--repeats=1"]
    assert bench.main(["bench", "exchange", "--devices=2", f"--json={path}", *tiny]) == 0
    rows = json.loads(path.read_text())["rows"]
    moved, times = ([row for row in rows if ("pass" in row) == kind] for kind in (True, False))
    kinds = [(row["exchange"], row["dtype"], row["pass"]) for row in moved]
    assert len(set(kinds)) == len(kinds) == 2 * 2 * 2
    # CPU has no native ragged_all_to_all, which is not timed there.
    assert [row["exchange"] for row in times] == ["one device", "all_gather"]
    assert [row["X"] for row in times] == [1, 2]
    assert times[0]["step_ratio"] == 1.0
    for row in times:
        for part in ("forward", "step"):
            assert 0 < row[f"{part}_ms_min"] <= row[f"{part}_ms"] <= row[f"{part}_ms_max"]
    printed = capsys.readouterr().out
    assert printed.count("exchange: T=16 D=4 F=6 K=2") == 2
    assert "further bytes" in printed
    assert "step ratio" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices=1"], "--devices=1 exchange nothing; give 2 or more"),
        (["--devices=3", "--experts=9"], "--devices=3 does not divide --tokens=4096"),
        (["--devices=8", "--experts=12"], "--devices=8 does not divide --experts=12"),
        (["--devices=16", "--experts=16"], "--devices=16 needs 16 devices, here are 8"),
        (["--devices=2,x"], "--devices=2,x must be positive integers, as in 2,4,8"),
        (["--devices=2", "--experts=2", "--chosen=3"], "--chosen=3 experts a token needs"),
        (["--buffer_factor=0"], "flag --buffer_factor=0: 0.0 is not number >= 0.01"),
    ],
)
def test_bad_input_is_refused(capsys, words, message):
    assert bench.main(["bench", "exchange", *words]) == 2
    assert message in capsys.readouterr().err


def test_devices_are_taken_in_order():
    check_shape(SHAPE)
    assert take_devices(4) == jax.devices()[:4]
