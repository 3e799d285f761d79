"""Lives of a run: real processes of `python -m train`, forked from one that has imported it all.

What a start costs beyond training is mostly imports and compiling: see `forked`, and the
executables lie in a cache beside the run's folder.
"""

import errno
import functools
import os
import pathlib
import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from typing import Any

import jax

from tests.train import forked
from train.run import Run


def begin(workdir: pathlib.Path, *flags: str, fail_at: int = 0) -> ForkServerProcess:
    """Starts a process that trains in a folder, or goes on there.

    Args:
        workdir: the run's folder; beside it lies experiment.py.
        *flags: of `python -m train`.
        fail_at: the batch of this life whose placement on the devices fails; 0 is none.
    """
    log, prepare = _log(workdir), functools.partial(_prepare, workdir, fail_at)
    return forked.begin([*_arguments(workdir), *flags], log, log, prepare)


def begin_apart(workdir: pathlib.Path) -> subprocess.Popen[str]:
    """As `begin`, but from nothing, and what it says comes through a pipe."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", *_arguments(workdir)],
        cwd=forked.ROOT,
        env=os.environ | cache | {"XLA_FLAGS": forked.ONE_DEVICE},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def told(workdir: pathlib.Path) -> str:
    """What the lives of a run have said."""
    return _log(workdir).read_text(errors="replace")


def _log(workdir: pathlib.Path) -> pathlib.Path:
    return workdir.with_suffix(".log")


def _arguments(workdir: pathlib.Path) -> list[str]:
    return ["train", f"--config={workdir.parent / 'experiment.py'}", f"--workdir={workdir}"]


def _prepare(workdir: pathlib.Path, fail_at: int) -> None:
    jax.config.update("jax_compilation_cache_dir", str(workdir.parent / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if fail_at:
        _fail(fail_at)


def _fail(at: int) -> None:
    """Lets the network file system of a data set go away."""
    place, calls = Run.to_devices, []

    def failing(self: Run, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == at:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return place(self, *given)

    Run.to_devices = failing  # type: ignore[method-assign]
