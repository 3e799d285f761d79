"""What XLA says of a training step for devices that nobody holds.

Memory and schedule are settled once buffers are assigned, which takes a third of a compile for TPU;
what follows makes machine code that nobody will run. So the compile runs in a process of its own,
which is ended when the compiler has written its buffers and its schedule, unless all is wanted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from train.config import ExperimentConfig
from train.planning.memory import predict, weigh
from train.planning.program import step_on
from train.planning.topology import Topology, abstract_shape
from train.step import compiler_options

SCHEDULE = "*train_step*.after_optimizations_after_buffer_assignment.txt"
BUFFERS = "*train_step*.after_optimizations-buffer-assignment.txt"

POLL = 2.0
"""Seconds between looks at what the compiler writes: what did not grow between two is whole."""

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler tells of a training step.

    Attributes:
        arguments: bytes of state and batch on a device.
        temporary: bytes that the step needs besides at its peak.
        seconds: that the compile took.
        schedule: the scheduled program as text.
        flops: the compiler's own count on a device, loop bodies once; 0 where it was not asked.
        analysis: whether the bytes are `memory_analysis()` of a whole compile; otherwise they are
            the sizes in its buffer assignment, which are the same.
        limit: of a program that the compiler refuses as too large, the memory in bytes; else None.
    """

    arguments: float
    temporary: float
    seconds: float
    schedule: str
    flops: float = 0.0
    analysis: bool = False
    limit: float | None = None

    @property
    def total(self) -> float:
        """Bytes on a device at the peak."""
        return self.arguments + self.temporary


def compile_step(
    traced: Any,
    config: ExperimentConfig,
    topology: Topology,
    *,
    keep: pathlib.Path | None,
    whole: bool = False,
) -> Compiled:
    """Compiles the training step of a configuration.

    Args:
        traced: the step, from `program.step_on`.
        config: the experiment, from `program.planned`.
        topology: its devices.
        keep: folder in which what the compiler told is kept; a program that is there already is
            not compiled again. None keeps nothing.
        whole: whether machine code is made too, without which there is no `flops`.

    Raises:
        RuntimeError: the compiler failed.
    """
    lowered = traced.lower()
    what = topology.name, str(whole), str(_options(config, topology)), lowered.as_text()
    name = hashlib.sha256("".join(what).encode()).hexdigest()[:16]
    folder = None if keep is None else keep / name
    if folder is not None and (folder / "compiled.json").is_file():
        return _read(folder)
    held = predict(config, weigh(config), abstract_shape(topology, config.mesh)).arguments
    if topology.chip.platform == "cpu" or whole:
        with tempfile.TemporaryDirectory() as dump:
            options = _options(config, topology) | _dumping(dump)
            done = _compile(lowered, pathlib.Path(dump), held, options)
    else:
        done = _apart(config, topology, held)
    if folder is not None:
        _write(folder, done)
    return done


def _options(config: ExperimentConfig, topology: Topology) -> dict[str, str | bool]:
    """The compiler's in training."""
    X = abstract_shape(topology, config.mesh)["expert"]
    return compiler_options(config.model, topology.chip.platform, X)


def _dumping(folder: str) -> dict[str, str | bool]:
    """Options by which the compiler writes what it does into a folder.

    Programs with asynchronous collectives of libtpu cannot be printed by jaxlib.
    """
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def _compile(
    lowered: Any, dump: pathlib.Path, held: float, options: dict[str, str | bool]
) -> Compiled:
    """A whole compile in this process."""
    began = time.perf_counter()
    try:
        done = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return too_large(str(error), dump, time.perf_counter() - began, held)
    memory, cost = done.memory_analysis(), done.cost_analysis() or {}
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        arguments=float(memory.argument_size_in_bytes),
        temporary=float(memory.temp_size_in_bytes + outputs),
        seconds=time.perf_counter() - began,
        schedule=_text(dump, SCHEDULE) or done.as_text(),
        flops=float(cost.get("flops", 0.0)),
        analysis=True,
    )


def _in_child(config: ExperimentConfig, topology: Topology, dump: str) -> None:
    """The child process: compiles, and writes what went wrong."""
    jax.config.update("jax_platforms", "cpu")
    options = _options(config, topology) | _dumping(dump)
    try:
        step_on(config, topology).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        (pathlib.Path(dump) / "error").write_text(str(error), encoding="utf-8")


def _apart(config: ExperimentConfig, topology: Topology, held: float) -> Compiled:
    """A compile that ends when buffers are assigned."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        dump = pathlib.Path(folder)
        process = multiprocessing.get_context("spawn").Process(
            target=_in_child, args=(config, topology, folder), daemon=True
        )
        process.start()
        try:
            before: list[int] = []
            while process.is_alive():
                process.join(POLL)
                written = _written(dump)
                if written == before and buffer_sizes(_text(dump, BUFFERS))[0] > 0.9 * held:
                    break
                before = written
        finally:
            process.kill()
            process.join()
        seconds = time.perf_counter() - began
        error = dump / "error"
        if error.is_file():
            return too_large(error.read_text(encoding="utf-8"), dump, seconds, held)
        arguments, temporary = buffer_sizes(_text(dump, BUFFERS))
        if arguments < 0.9 * held:
            raise RuntimeError(
                f"the compiler ended with code {process.exitcode} before it had assigned buffers;"
                " what it said is above"
            )
        return Compiled(arguments, temporary, seconds, _text(dump, SCHEDULE))


def _written(dump: pathlib.Path) -> list[int]:
    """Sizes of the two files; what is not there yet never equals itself."""
    files = [next(dump.glob(pattern), None) for pattern in (SCHEDULE, BUFFERS)]
    return [file.stat().st_size if file else -time.monotonic_ns() for file in files]


def buffer_sizes(text: str) -> tuple[float, float]:
    """Bytes of arguments, and of temporaries and outputs, in a buffer assignment.

    Memory other than HBM has a color of its own and does not count; what belongs to one thread of
    a core is no HBM either.
    """
    arguments = temporary = 0.0
    for line in text.splitlines():
        found = re.match(r"allocation \d+: size (\d+), (.*):$", line)
        if found is None or "color" in found[2] or "thread-local" in found[2]:
            continue
        if "parameter" in found[2]:
            arguments += float(found[1])
        elif "temp" in found[2] or "live-out" in found[2]:
            temporary += float(found[1])
    return arguments, temporary


def too_large(message: str, dump: pathlib.Path, seconds: float, held: float) -> Compiled:
    """What an "out of memory" of the compiler says.

    Args:
        message: of the error.
        dump: what was written before it.
        seconds: that it took.
        held: bytes of state and batch on a device, which the message leaves out.

    Raises:
        RuntimeError: the compiler failed for another reason.
    """
    number = r"\(?([\d.]+)([KMGT]?)\)?"
    temporaries = re.search(rf"HLO temporaries {number} exceeds available HBM {number}", message)
    used = re.search(rf"Used {number} of {number} hbm", message)
    found = temporaries or used
    if found is None:
        raise RuntimeError(message)
    needed = float(found[1]) * _UNITS[found[2]]
    limit = float(found[3]) * _UNITS[found[4]]
    # The one message counts the state, the other does not.
    temporary = needed if temporaries else needed - held
    return Compiled(held, temporary, seconds, _text(dump, SCHEDULE), limit=limit)


def _text(dump: pathlib.Path, pattern: str) -> str:
    found = sorted(dump.glob(pattern))
    return found[-1].read_text(encoding="utf-8") if found else ""


def _write(folder: pathlib.Path, compiled: Compiled) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tree = dataclasses.asdict(compiled)
    (folder / "schedule.txt").write_text(tree.pop("schedule"), encoding="utf-8")
    # Last: a compile that was stopped leaves no file of this name.
    (folder / "compiled.json").write_text(json.dumps(tree), encoding="utf-8")


def _read(folder: pathlib.Path) -> Compiled:
    tree = json.loads((folder / "compiled.json").read_text(encoding="utf-8"))
    schedule = (folder / "schedule.txt").read_text(encoding="utf-8")
    return Compiled(schedule=schedule, **tree)
