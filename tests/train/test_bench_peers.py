"""The benchmark against others' layers: the same weights give the same results, and refusals."""

import numpy as np
import pytest

from train import bench, bench_peers
from train.bench_grouped import Rounds, Shape

SHAPE = Shape(T=12, D=4, F=6, K=2, E=3, dtype="float32")


def test_a_plain_layer_has_our_outputs_and_gradients():
    ours, plain = bench_peers.peers([SHAPE], ["ragged_dot"], Rounds(2, 1))
    assert (ours["layer"], plain["layer"]) == ("emoe_jax", "ragged_dot")
    assert (ours["rounds"], plain["rounds"]) == (2, 1)
    assert ours["apart"] == 0.0
    assert ours["step_ratio"] == 1.0
    assert plain["apart"] < 1e-5


def test_other_weights_are_far_apart(monkeypatch):
    def build(shape, weights, tokens):
        doubled = weights | {"w_down": 2 * weights["w_down"]}
        return bench_peers.PEERS["ragged_dot"].build(shape, doubled, tokens)

    monkeypatch.setitem(bench_peers.PEERS, "other", bench_peers.Peer(build, ("numpy",)))
    ours, other = bench_peers.peers([SHAPE], ["other"], Rounds(1, 1))
    # Outputs are doubled; the gradient of a sum of squares is that of four times the loss.
    assert other["apart"] == pytest.approx(3.0, rel=1e-4)
    assert ours["of"] == ""
    assert other["of"] == f"numpy {np.__version__}"


def test_what_is_dense_on_cpu_can_be_left_out():
    rows = bench_peers.peers([SHAPE], ["ragged_dot"], Rounds(1, 0))
    assert [row["layer"] for row in rows] == ["emoe_jax"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peers=megablocks"], "--peers=megablocks is not known; choose from ragged_dot"),
        (["--peers=absent"], "--peers=absent needs the package no_such_package; pip install"),
        (["--peers=ragged_dot", "--experts=1"], "top_k=2 is more than experts=1"),
    ],
)
def test_bad_input_is_refused(capsys, monkeypatch, words, message):
    absent = bench_peers.Peer(bench_peers.PEERS["ragged_dot"].build, ("no_such_package",))
    monkeypatch.setitem(bench_peers.PEERS, "absent", absent)
    assert bench.main(["bench", "peers", "--tokens=4", "--width=4", *words]) == 2
    assert message in capsys.readouterr().err
