"""Programs by their command lines, in processes forked from one that has imported it all.

Most of a short program's time is imports. The server that forks has touched no device. Unlike a
process of its own, one of these ends without running what is registered for Python's exit.
"""

import multiprocessing
import os
import pathlib
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from typing import NamedTuple

import train.compare
import train.loop
import train.report
import train.sample

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])

ONE_DEVICE = re.sub("device_count=[0-9]+", "device_count=1", os.environ["XLA_FLAGS"])
"""XLA's flags in these processes: any batch fits one device."""

ROOT = pathlib.Path(__file__).parents[2]
WAIT_S = 300


class Ended(NamedTuple):
    """What a program has left: its code, and what it wrote."""

    code: int
    out: str
    err: str


def begin(
    words: Sequence[str],
    out: pathlib.Path,
    err: pathlib.Path,
    prepare: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Starts `python -m` with these words.

    Args:
        words: the module and its arguments.
        out: file to which standard output is appended.
        err: file to which standard error is appended; may be the same.
        prepare: called in the process before the module runs; a function of a module.
    """
    process = CONTEXT.Process(target=_run, args=(tuple(words), out, err, prepare))
    process.start()
    return process


def run(words: Sequence[str], prepare: Callable[[], None] | None = None) -> Ended:
    """Runs `python -m` with these words to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = pathlib.Path(folder) / "out", pathlib.Path(folder) / "err"
        process = begin(words, out, err, prepare)
        process.join(WAIT_S)
        code = process.exitcode
        assert code is not None, process.kill()
        return Ended(code, *(file.read_text(errors="replace") for file in (out, err)))


def _run(
    words: tuple[str, ...], out: pathlib.Path, err: pathlib.Path, prepare: Callable[[], None] | None
) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ["XLA_FLAGS"] = ONE_DEVICE
    os.chdir(ROOT)
    if prepare is not None:
        prepare()
    sys.argv = list(words)
    if "." in words[0]:
        # Imported above for what it imports; as the program it begins anew.
        sys.modules.pop(words[0], None)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


assert train.compare
assert train.loop
assert train.report
assert train.sample
