"""What every program prints and writes: a table of rows, and the facts of the run that made it."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

_VECTORS = ("avx512f", "avx2", "sve", "asimd")
"""Vector extensions by Linux's names, the widest of a family first."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "llvmlite", "numpy")


def run_facts() -> dict[str, Any]:
    """Gathers what a reader needs to repeat a measurement.

    Returns:
        `command` as typed, `device` in words, `versions` of Python and the installed packages, and
        the checkout's `commit` ("+changes" if files differ from it; None outside a checkout).
    """
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "device": _device(),
        "versions": versions(),
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """Version of Python, and of each package that is installed of those a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_json_path(path: str) -> None:
    """Refuses a path that could not be written, before any time is spent.

    Raises:
        FileNotFoundError: its folder does not exist.
        ValueError: it is a folder.
    """
    if Path(path).is_dir():
        raise ValueError(f"--json={path} is a folder; name a file in it.")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"--json={path}: folder {Path(path).parent} does not exist.")


def write_json(path: str, rows: Sequence[Row]) -> None:
    """Writes `{"rows": [...], "run": {...}}`: the table's objects and `run_facts()`.

    Args:
        path: the file, replaced if it exists.
        rows: objects with plain keys and numbers.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the path is a folder.
    """
    check_json_path(path)
    text = json.dumps({"rows": [dict(row) for row in rows], "run": run_facts()}, indent=2)
    # Beside it first: what an earlier call has written stays where this one fails.
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def print_table(title: str, rows: Sequence[Row], console: Console | None = None) -> None:
    """Prints rows as a table: a column a key, in the order in which keys first appear.

    Args:
        title: the line above the table.
        rows: objects with plain keys and numbers; a key that a row lacks prints as a blank.
        console: where to print; None is standard output.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for column in columns:
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*[_cell(row.get(column)) for column in columns])
    # A pipe or a log file has no width: rich would cut the columns to 80 characters. The widest
    # table, routing by layer, has some 300.
    console = console or Console(width=None if sys.stdout.isatty() else 10_000)
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _device() -> str:
    devices = jax.devices()
    name = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform != "cpu":
        return name
    told = Path("/proc/cpuinfo")  # on Linux
    facts = _processor(told.read_text(encoding="utf-8")) if told.is_file() else []
    return f"{name} ({', '.join([*facts, platform.machine()])}, {os.cpu_count()} cores)"


def _processor(cpuinfo: str) -> list[str]:
    """A processor's name and the widest vectors that it computes with, as far as Linux tells."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    flags = facts.get("flags", facts.get("Features", "")).split()
    vectors = next((name for name in _VECTORS if name in flags), "")
    return [fact for fact in (facts.get("model name", ""), vectors) if fact]


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
