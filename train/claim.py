"""One training at a time in a run's folder: two would write over each other's checkpoints."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Iterator

import filelock

from train import cluster

LOGGER = logging.getLogger(__name__)

LOCK = ".lock"
"""File in the run's folder, empty; the operating system drops the lock when its process ends."""

PATIENCE_S = 10.0
"""Seconds for a training that was just told to stop, as a scheduler that restarts it does."""


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Holds a run's folder, for all processes of this run; every one of them calls it.

    Where the file system knows no locks it says so and goes on.

    Args:
        workdir: an existing folder.

    Raises:
        ValueError: another training holds it; on all processes.
    """
    lock = filelock.FileLock(workdir / LOCK, timeout=PATIENCE_S)
    cluster.together(lambda: _take(lock, workdir) if cluster.is_first() else None)
    try:
        yield
    finally:
        lock.release()


def _take(lock: filelock.BaseFileLock, workdir: pathlib.Path) -> None:
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"--workdir={workdir} is in use: another training has held {workdir / LOCK} for"
            f" {PATIENCE_S:g} s; wait until it ends, stop it, or give another folder"
        ) from None
    except NotImplementedError as error:
        LOGGER.warning("%s: two trainings in one folder would not be noticed", error)
