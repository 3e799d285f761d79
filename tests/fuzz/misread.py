"""Readers that do what no reader may, to see that the harness tells."""

import os
import pathlib
import pickle
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fuzz.reader import Reader

FILE = "input.bin"


def _after_the_first(act: Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path], Any]:
    """Reads what is undamaged, and else acts."""

    def read(folder: pathlib.Path) -> None:
        if (folder / FILE).read_bytes() != b"whole":
            act(folder)

    return read


def _raise(error: BaseException) -> None:
    raise error


def _spin(folder: pathlib.Path) -> None:
    end = time.process_time() + 60
    while time.process_time() < end:
        pass


ACTS: dict[str, Callable[[pathlib.Path], Any]] = {
    "refuses": lambda folder: _raise(ValueError(f"{FILE} is damaged")),
    "foreign": lambda folder: _raise(KeyError("a")),
    "panics": lambda folder: _raise(GeneratorExit("a")),
    "wordless": lambda folder: _raise(ValueError()),
    "nameless": lambda folder: _raise(ValueError("unexpected end of data")),
    "endless": lambda folder: _raise(ValueError(FILE + "a" * 100_000)),
    "allocates": lambda folder: np.ones(2**27, np.uint8),
    "overallocates": lambda folder: np.empty(2**36, np.uint8),
    "writes": lambda folder: (folder.parent / "outside" / "x").write_text("x"),
    "climbs": lambda folder: (folder / ".." / "y").mkdir(exist_ok=True),
    "runs": lambda folder: subprocess.run(["true"], check=True),
    "shells": lambda folder: os.system("true"),
    "calls": lambda folder: socket.create_connection(("127.0.0.1", 9)),
    "unpickles": lambda folder: pickle.loads(b"cos\ngetcwd\n."),
    "evaluates": lambda folder: exec(compile("1", "a", "exec")),
    "crashes": lambda folder: os.abort(),
    "leaves": lambda folder: os._exit(3),
    "spins": _spin,
    "sleeps": lambda folder: time.sleep(60),
}

READERS = {
    name: Reader(
        1,
        lambda: [{FILE: b"whole"}],
        {"": lambda draw, data, others: b"damaged"},
        _after_the_first(act),
        peak=64 * 2**20,
        seconds=2.0,
    )
    for name, act in ACTS.items()
}
