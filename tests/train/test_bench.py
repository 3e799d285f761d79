"""The benchmark program at tiny shapes: rows, keys, JSON and errors. No time is asserted."""

import json

import jax
import numpy as np
import pytest

from configs.vit_b16_emoe_adapter import get_config
from train import bench, bench_adapter, tables
from train.config import freeze, update

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
    bench.FLAGS(["bench"])
    operands = bench._operands(T=12, D=4, F=6, K=2, E=3, load="skewed")["experts"]
    native, loops, compilers = (
        bench._programs(kernel)["step"](*operands) for kernel in ("native", "loops", "ragged_dot")
    )
    for ours in (native, loops):
        for mine, other in zip(*map(jax.tree.leaves, (ours, compilers)), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layers"], "unknown benchmark 'layers'; choose from grouped, adapter"),
        ([], "no benchmark named; choose from grouped, adapter"),
        (["grouped", "--experts=8,x"], "--experts=8,x must be positive integers"),
        (["grouped", "--experts=2", "--chosen=3"], "--chosen=3 experts a token needs at least"),
        (["grouped", "--repeats=0"], "repeats"),
        (["grouped", "--json=missing/folder/x.json"], "folder missing/folder does not exist"),
    ],
)
def test_bad_input_is_refused(capsys, words, message):
    assert bench.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_benchmarks(capsys):
    assert bench.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "Benchmarks: grouped, adapter, exchange, router, checkpoints." in printed
    assert "--tokens" in printed


def test_table_leaves_missing_keys_blank(capsys):
    tables.print_table("numbers", [{"a": 1.23456, "b": "x"}, {"b": "y", "c": 7}])
    printed = capsys.readouterr().out
    assert "1.235" in printed
    assert "None" not in printed


def test_json_path_is_checked(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        tables.write_json(str(tmp_path), [])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        tables.write_json(str(tmp_path / "none" / "x.json"), [])


def tiny_recipe():
    """The recipe of the benchmark `adapter` on images of four patches."""
    config = get_config()
    small = {
        "data.image_size": 8,
        "data.classes": 3,
        "model.patch": 4,
        "model.width": 8,
        "model.depth": 2,
        "model.heads": 2,
        "model.mlp_hidden": 8,
        "model.moe_blocks": (0,),
        "moe.experts": 2,
        "moe.hidden": 4,
        "moe.basis.rank": 4,
        "model.dtype": "float32",
    }
    update(config, small)
    return freeze(config)


def test_adapter_times_the_branch_and_the_recipe(monkeypatch, capsys):
    monkeypatch.setattr(bench_adapter, "recipe", tiny_recipe)
    assert bench.main(["bench", "adapter", "--images=2", "--repeats=2"]) == 0
    printed = capsys.readouterr().out
    assert "branch" in printed
    assert "vit" in printed
    (row,) = bench_adapter.adapter(2, 3, ["branch"], "float32")
    assert row["step_images_per_s"] == pytest.approx(2e3 / row["step_ms"])
    assert row["rounds"] == 3
