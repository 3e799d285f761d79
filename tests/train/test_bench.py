"""The benchmark program at tiny shapes: rows, keys, JSON and errors. No time is asserted."""

import json
import sys

import pytest

from configs.vit_b16_emoe_adapter import get_config
from train import bench, bench_adapter, tables
from train.config import freeze, update

TINY = ["--tokens=12", "--width=4", "--hidden=6", "--experts=3", "--repeats=2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layers"], "unknown benchmark 'layers'; choose from grouped, router"),
        ([], "no benchmark named; choose from grouped, router"),
        (["grouped", "--experts=8,x"], "--experts=8,x must be positive integers"),
        (["grouped", "--experts=2", "--chosen=3"], "--chosen=3 experts a token needs at least"),
        (["grouped", "--repeats=0"], "flag --repeats=0: 0 is not a positive integer"),
        (["grouped", "--json=missing/folder/x.json"], "folder missing/folder does not exist"),
    ],
)
def test_bad_input_is_refused(capsys, words, message):
    assert bench.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_benchmarks(capsys):
    assert bench.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert (
        "Benchmarks: grouped, router, peers, adapter, exchange, checkpoints, step, start, all."
        in printed
    )
    assert "--tokens" in printed


def test_all_runs_each_with_the_same_flags_and_says_what_could_not_be_measured(
    tmp_path, monkeypatch, capsys
):
    # Stands in for Python: what is run, and the rows and errors of what is run, is all that counts.
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
if [ "$3" = exchange ]; then echo "train.bench: too few devices" >&2; exit 2; fi
for word in "$@"; do case $word in --json=*) file=${word#--json=} ;; esac; done
echo "{\\"rows\\": [{\\"words\\": \\"$1 $2 $3 $4 $5\\"}]}" > "$file"
"""
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    path = tmp_path / "all.json"
    words = ["--tokens=12", "--experts", "3,4", "--json", str(path)]
    assert bench.main(["bench", "all", *words]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["benchmark"] for row in rows] == list(bench.BENCHMARKS)
    for row in rows:
        if row["benchmark"] == "exchange":
            assert row["not_measured"] == "train.bench: too few devices"
        else:
            words = f"-m train.bench {row['benchmark']} --experts=3,4 --tokens=12"
            assert sorted(row["words"].split()) == sorted(words.split())
    assert "exchange: not measured: train.bench: too few devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cpuinfo", "facts"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 avx512f\n",
            ["AMD EPYC", "avx512f"],
        ),
        ("model name\t: Intel: old\nflags\t\t: fpu sse2 avx2\n", ["Intel: old", "avx2"]),
        ("processor\t: 0\nFeatures\t: fp asimd\n", ["asimd"]),  # ARM names no model
        ("model name\t: Pentium\nflags\t\t: fpu\n", ["Pentium"]),
        ("", []),
    ],
)
def test_processors_are_told_apart(cpuinfo, facts):
    assert tables._processor(cpuinfo) == facts


def test_table_leaves_missing_keys_blank(capsys):
    tables.print_table("numbers", [{"a": 1.23456, "b": "x"}, {"b": "y", "c": 7}])
    printed = capsys.readouterr().out
    assert "1.235" in printed
    assert "None" not in printed


def test_a_wide_table_is_whole_where_there_is_no_terminal(capsys):
    names = [f"a_long_name_of_a_column_{number}" for number in range(40)]
    tables.print_table("wide", [dict.fromkeys(names, 1)])
    assert set(names) <= set(capsys.readouterr().out.split())


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
