"""Benchmark `all`: every other one in turn, each in a process of its own.

What one needs of its process (virtual devices, memory that the allocator keeps, threads) is then no
other's concern.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from train.timing import Row

ROOT = pathlib.Path(__file__).resolve().parents[1]


def measure_all(names: Sequence[str], words: Sequence[str]) -> list[Row]:
    """Runs benchmarks, which print their own tables.

    Args:
        names: of the benchmarks.
        words: flags for each of them.

    Returns:
        Their rows, with the benchmark's name under `benchmark`. One that cannot run here has one
        row, which says why under `not_measured`.
    """
    rows: list[Row] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows += _measure(name, words, pathlib.Path(folder) / "rows.json")
    return rows


def _measure(name: str, words: Sequence[str], file: pathlib.Path) -> list[Row]:
    command = [sys.executable, "-m", "train.bench", name, *words, f"--json={file}"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        print(f"{name}: not measured: {lines[-1]}")
        return [{"benchmark": name, "not_measured": lines[-1]}]
    sys.stderr.write(done.stderr)
    made = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [{"benchmark": name} | row for row in made]
