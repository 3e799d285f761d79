"""The benchmark of grouped products at tiny shapes: rows, keys, JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import bench, bench_grouped

TINY = ["--tokens=12", "--width=4", "--hidden=6", "--experts=3", "--repeats=2"]


def test_grouped_prints_and_writes_rows(tmp_path, capsys):
    path = tmp_path / "grouped.json"
    words = ["bench", "grouped", f"--json={path}", "--load=skewed", *TINY]
    assert bench.main(words) == 0
    written = json.loads(path.read_text())
    assert set(written) == {"rows", "run"}
    assert set(written["run"]) == {"command", "device", "versions", "commit"}
    assert written["run"]["versions"]["jax"] == jax.__version__

    rows = written["rows"]
    kernels = ["dense", "batched", "native", "loops", "ragged_dot"]
    assert [(row["E"], row["kernel"]) for row in rows] == [(3, k) for k in kernels]
    for row in rows:
        assert row["load"] == "skewed"
        assert row["rounds"] == (1 if row["kernel"] == "ragged_dot" else 2)
        for part in ("forward", "step"):
            assert 0 < row[f"{part}_ms_min"] <= row[f"{part}_ms"] <= row[f"{part}_ms_max"]
            assert row[f"{part}_ratio"] > 0
    assert rows[0]["step_ratio"] == rows[0]["forward_ratio_of_min"] == 1.0
    printed = capsys.readouterr().out
    assert "T=12 D=4 F=6 K=2" in printed
    assert "forward ratio" in printed


def test_bfloat16_without_ragged_dot(capsys):
    words = ["bench", "grouped", "--ragged_repeats=0", "--load=balanced", "--dtype=bfloat16"]
    assert bench.main([*words, *TINY]) == 0
    printed = capsys.readouterr().out
    assert "bfloat16" in printed
    assert "ragged_dot" not in printed


def test_kernels_compute_the_same_outputs_and_gradients():
    shape = bench_grouped.Shape(T=12, D=4, F=6, K=2, E=3, dtype="float32")
    arrays = bench_grouped.operands(shape, "skewed")["experts"]
    native, loops, compilers = (
        bench_grouped.programs(kernel)["step"](*arrays)
        for kernel in ("native", "loops", "ragged_dot")
    )
    for ours in (native, loops):
        for mine, other in zip(*map(jax.tree.leaves, (ours, compilers)), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["dense", "batched", "native"])
def test_rows_are_of_the_dtype_and_weights_float32_with_their_gradients(kernel):
    shape = bench_grouped.Shape(T=12, D=4, F=6, K=2, E=3, dtype="bfloat16")
    arrays = bench_grouped.operands(shape, "balanced")
    rows, *rest = arrays.get(kernel, arrays["experts"])
    assert rows.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in rest if leaf.dtype != jnp.int32)
    _, (d_rows, *d_rest) = bench_grouped.programs(kernel)["step"](rows, *rest)
    assert d_rows.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in d_rest)


def test_batched_is_a_dense_mlp_of_each_expert():
    shape = bench_grouped.Shape(T=12, D=4, F=6, K=2, E=3, dtype="float32")
    arrays = bench_grouped.operands(shape, "balanced")["batched"]
    loss, gradients = bench_grouped.programs("batched")["step"](*arrays)
    dense = bench_grouped.programs("dense")["step"]
    alone = [dense(*(leaf[expert] for leaf in arrays)) for expert in range(3)]
    np.testing.assert_allclose(loss, sum(one for one, _ in alone), rtol=1e-6)
    for number, gradient in enumerate(gradients):
        parts = jnp.stack([of_expert[number] for _, of_expert in alone])
        np.testing.assert_allclose(gradient, parts, rtol=1e-5, atol=1e-6)
