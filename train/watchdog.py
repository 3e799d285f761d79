"""Says where a run hangs: each process writes its threads' stacks when a step takes too long.

A thread of its own looks at the steps that were given to the devices: it asks whether they are
done, which waits for nothing. When none has ended for `guard.stall_s` seconds it writes the stacks
to standard error and to `stalls/process_I.txt` in the run's folder. What is no training step (the
first one, which compiles, evaluations, checkpoints) has a limit of its own, `guard.pause_s`. It
never ends a run: what to do about one that hangs is for who reads it.

That thread needs Python's lock, which a call into C may hold while it hangs. For that there is a
second one in C, faulthandler's, which is put off again and again while the first one runs. It
writes to the file alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, TextIO

import jax

from train.config import GuardConfig

STALLS = "stalls"
"""Folder in the run's folder; a process that never hung leaves no file there."""

POLL_S = 1.0
"""Seconds between looks, or less where a limit is short."""

STDERR = 2
"""File descriptor of standard error, which nothing in Python has replaced."""

FIRST = "the first step"


class Watchdog:
    """Watches the steps of this process; a context manager.

    Args:
        config: its limits; none is watched where `stall_s` is 0.
        workdir: the run's folder.
    """

    def __init__(self, config: GuardConfig, workdir: pathlib.Path) -> None:
        self._limits = config
        self._path = workdir / STALLS / f"process_{jax.process_index()}.txt"
        self._who = f"process {jax.process_index()} of {jax.process_count()}"
        self._phase, self._since = FIRST, time.monotonic()
        self._flying: deque[tuple[int, Any]] = deque()
        self._done: int | None = None
        self._told = False
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: TextIO | None = None

    def __enter__(self) -> Watchdog:
        """Begins to watch."""
        if self._limits.stall_s:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            self._since = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends; takes an empty file away."""
        if self._file is None:
            return
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        # Another process may have a file there; another run in this folder may have taken ours.
        with contextlib.suppress(OSError):
            if not self._path.stat().st_size:
                self._path.unlink()
                self._path.parent.rmdir()

    def see(self, step: int, result: Any) -> None:
        """A step was given to the devices; it has ended when its result is there."""
        if self._file is None:
            return
        with self._lock:
            if not self._flying:
                self._since = time.monotonic()
            self._flying.append((step, result))

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """What happens inside is no training step."""
        before = self._enter(what)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, phase: str) -> str:
        with self._lock:
            before, self._phase = self._phase, phase
            self._since = time.monotonic()
        return before

    def _watch(self) -> None:
        """Looks until the end."""
        limits = [each for each in (self._limits.stall_s, self._limits.pause_s) if each]
        poll = min(POLL_S, min(limits) / 4)
        while not self._end.wait(poll):
            with self._lock:
                self._look(time.monotonic())

    def _look(self, now: float) -> None:
        """Sees what has ended, and reports where nothing has for too long."""
        assert self._file is not None
        while self._flying and self._flying[0][1].is_ready():
            self._done, _ = self._flying.popleft()
            self._since = now
            self._phase = "" if self._phase == FIRST else self._phase
        limit = self._limits.pause_s if self._phase else self._limits.stall_s
        late = bool(limit) and now - self._since > limit
        if late and not self._told:
            self._report(now - self._since, limit)
        elif self._told and not late:
            self._write(f"{self._who}: it goes on; the last step that has ended is {self._done}\n")
        self._told = late
        if limit:
            faulthandler.dump_traceback_later(limit, file=self._file)

    def _report(self, seconds: float, limit: float) -> None:
        """Writes what is awaited, and where every thread is."""
        assert self._file is not None
        key = "guard.pause_s" if self._phase else "guard.stall_s"
        last = "no step has ended yet" if self._done is None else f"step {self._done} was the last"
        flying = f"; step {self._flying[0][0]} is on the devices" if self._flying else ""
        what = f"{self._phase} takes" if self._phase else "no training step has ended for"
        self._write(
            f"{self._who}: {what} {seconds:.1f} s by now, more than {key}={limit:g};"
            f" {last}{flying}. It is left alone; its threads:\n"
        )
        for file in (STDERR, self._file):
            faulthandler.dump_traceback(file)

    def _write(self, text: str) -> None:
        assert self._file is not None
        os.write(STDERR, text.encode())
        self._file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text)
        self._file.flush()
