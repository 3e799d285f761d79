"""How a run ends that is asked to: SIGTERM, SIGINT, a machine that is about to be preempted.

Kubernetes, SLURM and the clouds announce a preemption by SIGTERM; Ctrl-C is SIGINT. Either lets the
step in progress end, then the state is saved, and the program ends with `EXIT_CODE`; the same
command goes on from there. Of several processes any one may get the signal: JAX's preemption
service tells the others, and all save after the same step.

From the signal on the run has `checkpoint.grace_s` seconds. When they are over, or where there is
nothing to save yet, the process ends at once with the same code. That is safe, as SIGKILL is at any
moment: a checkpoint that is not complete is never listed, and is deleted by the next start.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from emoe_jax.multihost import gather_texts

LOGGER = logging.getLogger(__name__)

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: "temporary failure, the user is invited to retry". Neither success nor
an error (1, and 2 for bad input), nor any signal's number (128 + n)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818  (no error: what was asked for)
    """What a long computation that leaves the state as it is ends with, see `check`."""


class Notice:
    """The request to end, while `heeded` is open.

    Attributes:
        name: what asked for it; empty as long as nothing has.
        asked: whether the loop has come to look, that is whether a step is done.
        agreed: whether all of several processes know of it.
    """

    def __init__(self, grace_s: float) -> None:
        self.name = ""
        self.asked = self.agreed = False
        self._grace_s = grace_s
        self._began = 0.0
        self._tell_others = _handler_of_jax()

    def listen(self, pipe: int) -> None:
        """Takes the numbers of signals from a pipe until it is closed; runs in a thread.

        The main thread may be in XLA's compiler or in a collective that nobody else enters, where
        no Python handler of a signal would run.
        """
        while number := os.read(pipe, 1):
            # Further signals change nothing: schedulers and shells often send several.
            if number[0] in SIGNALS and not self.name:
                if self._tell_others is not None:
                    self._tell_others(signal.SIGTERM)
                name = signal.Signals(number[0]).name
                if not self.asked:
                    _leave(
                        f"{name} before the first step: nothing to save; the same command"
                        " begins again"
                    )
                self.begin(name)

    def begin(self, name: str) -> None:
        """Starts the time that is left."""
        if self.name:
            return
        self.name, self._began = name, time.monotonic()
        _say(f"{name}: saving after this step, within {self._grace_s:g} s")
        timer = threading.Timer(self._grace_s, self._too_late)
        timer.daemon = True
        timer.start()

    def passed_s(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self._began

    def _too_late(self) -> NoReturn:
        _leave(
            f"error: {self.name} came {self._grace_s:g} s ago, and the run has not saved and ended"
            " since. Nothing is damaged: the same command goes on from the last checkpoint that is"
            " complete. Raise checkpoint.grace_s if the machine waits longer, or lower"
            " checkpoint.every"
        )


_notice: Notice | None = None
"""One for the process, as signals are."""


@contextmanager
def heeded(grace_s: float) -> Iterator[None]:
    """Lets SIGTERM and SIGINT end a run in order while the context is open.

    To be opened by the main thread, after `cluster.join`.

    Args:
        grace_s: seconds from the signal to the end of the process at the latest.
    """
    global _notice
    ours = Notice(grace_s)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=ours.listen, args=(reading,), daemon=True)
    thread.start()
    # Python writes the number of each signal that has a Python handler into the pipe, at once.
    pipe = signal.set_wakeup_fd(writing)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    _notice = ours
    try:
        yield
    except Interrupted:
        _say(f"{ours.name}: ended in an evaluation, which the same command makes again")
        raise SystemExit(EXIT_CODE) from None
    finally:
        _notice = None
        for number, handler in before.items():
            # None was a handler in C, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(pipe)
        os.close(writing)
        thread.join()
        os.close(reading)


def reached(step: int) -> bool:
    """Whether to save after this step and end.

    All processes ask after every step, and all are told so after the same one.

    Args:
        step: optimizer steps done.
    """
    if _notice is None:
        return False
    _notice.asked = True
    if jax.process_count() == 1:
        return bool(_notice.name)
    # True after one step alone, from which a run may just then go back.
    if not _notice.agreed and multihost_utils.reached_preemption_sync_point(step):
        _notice.agreed = True
        _notice.begin("a signal to another process")
    return _notice.agreed


def consult() -> None:
    """Agrees whether any process has been asked to end; all call it.

    To be called where a run goes back: the step after which it was to end may be far then.
    """
    if _notice is not None and any(gather_texts(_notice.name)):
        _notice.agreed = True
        _notice.begin("a signal to another process")


def begin() -> None:
    """A run begins: until its first step is done there is nothing to save."""
    if _notice is not None:
        _notice.asked = False


def check() -> None:
    """Called in the middle of an evaluation, which may take longer than the time that is left.

    Raises:
        Interrupted: the run is to end, and is one process: several must stay together, and agree
            after steps alone.
    """
    if requested():
        raise Interrupted


def requested() -> bool:
    """Whether the run is one process and is to end; several agree after steps alone."""
    return _notice is not None and bool(_notice.name) and jax.process_count() == 1


def end(step: int, saved: int | None) -> NoReturn:
    """Ends the program after the save that `reached` has asked for.

    Args:
        step: optimizer steps done.
        saved: the newest step that is saved: not `step` in a row of skipped steps, which are not.

    Raises:
        SystemExit: with `EXIT_CODE`.
    """
    assert _notice is not None
    skipped = "" if saved == step else f" (step {step} is one of a row of skipped steps)"
    LOGGER.warning(
        "%s: %s is saved%s, %.1f s later; the same command goes on from there",
        *(_notice.name, "nothing" if saved is None else f"step {saved}", skipped),
        _notice.passed_s(),
    )
    raise SystemExit(EXIT_CODE)


def _handler_of_jax() -> Callable[[int], None] | None:
    """The C function by which JAX's preemption service hears SIGTERM, where there are processes.

    A handler of ours takes its place; Python can neither name nor call it otherwise.
    """
    if not jax.distributed.is_initialized():
        return None
    current = ctypes.pythonapi.PyOS_getsig
    current.argtypes, current.restype = [ctypes.c_int], ctypes.c_void_p
    address = current(signal.SIGTERM)
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address else None


def _leave(words: str) -> NoReturn:
    _say(words)
    os._exit(EXIT_CODE)


def _say(words: str) -> None:
    """Writes to standard error without a lock that the main thread may hold."""
    os.write(2, f"{words}\n".encode())
