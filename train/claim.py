"""One training at a time in a run's folder: two would write over each other's checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator

import filelock

from train import cluster

LOGGER = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""Seconds for a training that was told to stop, or whose other processes were lost: it may save for
`checkpoint.grace_s`, or not know for `--heartbeat_timeout`, and a scheduler starts the next one."""


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Holds a run's folder, for all processes of this run; every one of them calls it.

    Among trainings of one user whose process 0 is on one machine: the lock is on a file among the
    machine's temporary ones. One in the folder would be on a network's file system, which may keep
    the lock of a machine that is gone, and then nothing could go on from its checkpoints. Where no
    lock can be had it says so and goes on.

    Args:
        workdir: an existing folder.

    Raises:
        ValueError: another training holds it and does not end; on all processes.
    """
    with contextlib.ExitStack() as held:
        cluster.together(lambda: _take(held, workdir) if cluster.is_first() else None)
        yield


def lock_file(workdir: pathlib.Path) -> pathlib.Path:
    """The file of a run's folder, in this machine's folder of temporary files."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(workdir))).hexdigest()[:16]
    user = getattr(os, "getuid", int)()  # Windows has folders of its own for every user's
    return pathlib.Path(tempfile.gettempdir()) / f"emoe_jax-{user}-{name}.lock"


def _take(held: contextlib.ExitStack, workdir: pathlib.Path) -> None:
    file = lock_file(workdir)
    try:
        _wait(held, file, workdir)
    except filelock.Timeout:
        raise ValueError(
            f"--workdir={workdir} is in use by another training on this machine, which has not"
            f" ended within {PATIENCE_S:g} s; stop it, or give another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        LOGGER.warning("cannot lock %s: a second training would go unnoticed (%s)", file, error)


def _wait(held: contextlib.ExitStack, file: pathlib.Path, workdir: pathlib.Path) -> None:
    lock = filelock.FileLock(file)
    with contextlib.suppress(filelock.Timeout):
        held.enter_context(lock.acquire(timeout=0))
        return
    LOGGER.warning(
        "another training is at work in %s; waiting up to %g s for its end", workdir, PATIENCE_S
    )
    held.enter_context(lock.acquire(timeout=PATIENCE_S))
