"""Benchmark `start`: from the command line to the first training step, in processes of their own.

The first process finds JAX's compilation cache empty ("cold") and fills it, the others find what
they need there ("warm"), as a run does that is started again. What `python -m train` keeps beyond
runs besides, such as trained tokenizers and the ids of texts, is there in both, once it was made.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from train.timing import Row, milliseconds

FIRST = "step 1/"
"""Begins the line that tells of the first step."""

ROOT = pathlib.Path(__file__).resolve().parents[1]


def starts(config: str, overrides: Sequence[str], repeats: int) -> list[Row]:
    """Starts a new run again and again, and kills it after its first step.

    Args:
        config: file of the experiment.
        overrides: more words for the command line, such as "--config.steps=10".
        repeats: warm starts.

    Returns:
        A row for the cold start and one for the warm ones: milliseconds (median, least, most).

    Raises:
        ValueError: a run ended before its first step; with what it printed last.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        words = [f"--config={pathlib.Path(config).resolve()}", *overrides]
        times = [_seconds(words, home, f"run_{number}") for number in range(repeats + 1)]
    return [
        {"start": name, "config": config, "rounds": len(part)} | milliseconds("start", part)
        for name, part in (("cold", times[:1]), ("warm", times[1:]))
    ]


def _seconds(words: Sequence[str], home: pathlib.Path, name: str) -> float:
    """Seconds from the start of a process to its first step."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    command = [sys.executable, "-m", "train", f"--workdir={home / name}", *words]
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | cache | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            if line.startswith(FIRST):
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
            last = line.strip() or last
    raise ValueError(f"`{' '.join(command)}` ended before its first step: {last}")
