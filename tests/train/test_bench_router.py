"""The benchmark of routers: its rows, its table, what it refuses."""

import pytest

from train import bench
from train.bench_router import routers

SHAPE = {"T": 32, "D": 8, "F": 16, "K": 2, "R": 4}


def test_a_row_for_each_router_and_number_of_experts():
    rows = routers(["whitened", "loss_free"], [4], SHAPE, "float32", 3)
    names = [(row["router"], row["E"]) for row in rows]
    assert names == [("(dense)", 4), ("whitened", 4), ("loss_free", 4)]
    dense, *layers = rows
    assert dense["layer_ratio"] == 1.0
    for row in layers:
        least = row["layer_ms_min"] / dense["layer_ms_max"]
        assert least <= row["layer_ratio"] <= row["layer_ms_max"] / dense["layer_ms_min"]
        assert row["share_min"] <= row["share"] <= row["share_max"]
        assert row["router_ms_min"] <= row["router_ms"] <= row["router_ms_max"]
        # The middle of three ratios lies between the ratios of extreme times.
        least = row["router_ms_min"] / row["layer_ms_max"]
        assert least <= row["share"] <= row["router_ms_max"] / row["layer_ms_min"]


def test_it_prints_a_table(capsys):
    words = ["router", "--routers=eigen,softmax", "--experts=4", "--tokens=16", "--width=8"]
    assert bench.main(["bench", *words, "--hidden=8", "--rank=4", "--repeats=1"]) == 0
    printed = capsys.readouterr().out
    assert "router / layer" in printed
    assert "eigen" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--routers=eigne"], "router='eigne' is not known"),
        (["--rank=9", "--width=8"], "basis.rank=9 is more than width=8"),
        (["--experts=1", "--chosen=2"], "top_k=2 is more than experts=1"),
    ],
)
def test_bad_input_is_refused(capsys, words, message):
    assert bench.main(["bench", "router", "--tokens=8", *words]) == 2
    assert message in capsys.readouterr().err
