"""What a run leaves to read: two .jsonl logs, TensorBoard events, and a line or bar on the screen.

`metrics.jsonl` holds one JSON object a line, `{"step": 12, "train/loss": 3.25}`, steps ascending.
Numbers are written as Python's `repr` writes them, so they read back to the same bits. JSON has no
NaN and no infinities, and a loss must be able to show them: they are written as the strings
"NaN", "Infinity" and "-Infinity", which any strict parser reads and which `float` and JavaScript's
`Number` turn back into numbers. `read_metrics` does so.

`routing.jsonl` holds what has a value for each expert or direction of a layer, in the same way but
rounded: `{"step": 12, "layer_00": {"load": [0.25, 0.75]}}`. `read_routing` reads it.

A run that resumes from step s continues all logs as if the steps after s had never been taken:
their lines are moved to `metrics.discarded.jsonl` and `routing.discarded.jsonl`, and TensorBoard is
told to hide their events.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from train.screen import Screen

METRICS = "metrics.jsonl"
ROUTING = "routing.jsonl"

DIGITS = 6
"""Significant digits of the numbers in routing.jsonl: more than any figure shows."""


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a metrics file; the lines of one step become one dict.

    Args:
        path: the file, or the folder of the run.

    Returns:
        One dict a step, ascending: "step" as int, every other value as float. A torn last line
        (the run was killed, or is writing just now) is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is no JSON object with a step.
    """
    file = Path(path)
    file = file / METRICS if file.is_dir() else file
    if not file.exists():
        raise FileNotFoundError(f"There are no metrics at {file}; give the --workdir of a run.")
    steps: dict[int, dict[str, Any]] = {}
    for scalars in _parsed(file, float):
        steps.setdefault(scalars["step"], {"step": scalars["step"]}).update(scalars)
    return [steps[step] for step in sorted(steps)]


def read_routing(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a routing file; the lines of one step become one dict.

    Args:
        path: the file, or the folder of the run.

    Returns:
        One dict a step, ascending: "step" as int, and for each layer a dict of float64 arrays [n]
        by name. A torn last line is left out.

    Raises:
        FileNotFoundError: there is no such file; runs before it existed have none.
        ValueError: a line before the last is no JSON object with a step.
    """
    file = Path(path)
    file = file / ROUTING if file.is_dir() else file
    if not file.exists():
        raise FileNotFoundError(f"There is no routing over time at {file}; train the run anew.")
    steps: dict[int, dict[str, Any]] = {}
    for layers in _parsed(file, _arrays):
        row = steps.setdefault(layers["step"], {"step": layers["step"]})
        for layer, arrays in layers.items():
            if layer != "step":
                row[layer] = row.get(layer, {}) | arrays
    return [steps[step] for step in sorted(steps)]


class RunLog:
    """The logs of one run; a context manager.

    Args:
        workdir: the run's folder, local; made if absent.
        total_steps: optimizer steps of the whole run.
        unit: what the rate counts, "tokens" or "images".
        resume_step: the step of the checkpoint that the run continues from; None for a new run,
            whose folder is then read as if it had no logs.
        enabled: whether this process writes: `jax.process_index() == 0`. Otherwise every method
            does nothing.
        every_s: seconds between plain progress lines where the output is no terminal.
        console: where progress goes; standard error by default.
        clock: seconds, for the time left.

    Raises:
        ValueError: `total_steps` is not positive, `unit` is another word, `resume_step` is
            negative, or the existing metrics file is no such file.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        unit: str,
        resume_step: int | None = None,
        enabled: bool = True,
        every_s: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1.")
        if unit not in ("tokens", "images"):
            raise ValueError(f"unit={unit!r} must be 'tokens' or 'images'.")
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step={resume_step} must be at least 0, or None.")
        self._enabled = enabled
        if not enabled:
            return
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        discard_after(folder, -1 if resume_step is None else resume_step)
        self._step = -1 if resume_step is None else resume_step
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._routing = (folder / ROUTING).open("a", encoding="utf-8")
        self._events = _open_events(folder, purge_step=self._step + 1)
        self._screen = Screen(
            console or Console(stderr=True), total_steps, unit, max(self._step, 0), every_s, clock
        )

    def __enter__(self) -> RunLog:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes."""
        self.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line of scalars and their TensorBoard events; both are flushed.

        Args:
            step: optimizer step, not before one that was written already.
            scalars: slash names such as "train/loss" to numbers or arrays without axes.

        Raises:
            ValueError: `step` runs backwards, or a scalar is called "step".
            OSError: the disk refuses.
        """
        if not self._enabled:
            return
        self._check_step(step)
        if "step" in scalars:
            raise ValueError("A scalar cannot be called 'step'; it is the line's own key.")
        numbers = {name: float(value) for name, value in scalars.items()}
        line = {"step": int(step)} | {name: _strict(value) for name, value in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._event(step, summary.scalar(name, value))
        self._events.flush()
        self._step = step

    def arrays(self, step: int, arrays: Mapping[str, ArrayLike]) -> None:
        """Appends a line of arrays to routing.jsonl, rounded to `DIGITS`; it is flushed.

        Args:
            step: optimizer step, not before one that was written already.
            arrays: names "layer/name", such as "layer_03/load", to arrays [n]. Without any no line
                is written.

        Raises:
            ValueError: `step` runs backwards, a name is of another form, or an array is not [n].
            OSError: the disk refuses.
        """
        if not self._enabled or not arrays:
            return
        self._check_step(step)
        layers: dict[str, dict[str, list[float | str]]] = {}
        for name, array in arrays.items():
            layer, _, key = name.partition("/")
            values = np.asarray(array, np.float64)
            if layer in ("", "step") or not key:
                raise ValueError(f"{name!r} must be a layer's name, a slash, and a name.")
            if values.ndim != 1:
                raise ValueError(f"{name!r} has shape {values.shape}; it must have one axis.")
            layers.setdefault(layer, {})[key] = [_strict(_rounded(v)) for v in values.tolist()]
        self._routing.write(json.dumps({"step": int(step)} | layers, allow_nan=False) + "\n")
        self._routing.flush()
        self._step = step

    def histograms(self, step: int, arrays: Mapping[str, ArrayLike]) -> None:
        """Writes histograms of 30 bins to TensorBoard; values that are not finite are left out.

        Args:
            step: optimizer step.
            arrays: slash names such as "router/layer_03/load" to arrays of any shape.
        """
        if not self._enabled:
            return
        for name, array in arrays.items():
            values = np.asarray(array, np.float64).ravel()
            values = values[np.isfinite(values)]
            if values.size:
                self._event(step, summary.histogram(name, values, bins=30))
        self._events.flush()

    def progress(
        self,
        step: int,
        *,
        loss: float,
        rate: float,
        mfu: float | None = None,
        max_vio: float | None = None,
    ) -> None:
        """Moves the bar, or on other outputs than a terminal prints a line now and then.

        Args:
            step: optimizer steps done.
            loss: training loss.
            rate: tokens or images a second, of all devices together.
            mfu: model FLOP utilisation between 0 and 1, where the device's peak is known.
            max_vio: maximal violation of balance, max load / mean load - 1, of the worst layer.
        """
        if self._enabled:
            self._screen.show(step, float(loss), float(rate), mfu, max_vio)

    def close(self) -> None:
        """Takes the bar off the screen and closes the files."""
        if self._enabled:
            self._screen.close()
            self._events.close()
            self._file.close()
            self._routing.close()

    def _check_step(self, step: int) -> None:
        """Refuses steps that run backwards."""
        if step < self._step:
            raise ValueError(
                f"Step {step} comes after step {self._step} was logged; a run resumed from an "
                "earlier checkpoint gives that step as resume_step."
            )

    def _event(self, step: int, value: Any) -> None:
        """Queues one summary; written from this thread, so a full disk cannot block the run."""
        self._events.write_event(Event(wall_time=time.time(), step=int(step), summary=value))


def discard_after(workdir: Path, step: int) -> None:
    """Moves the lines of later steps out of both logs, and drops torn last lines.

    The lines are appended to `metrics.discarded.jsonl` and `routing.discarded.jsonl` first, and a
    shortened file then takes the place of the old one by a rename, so that no crash in between
    loses one.

    Args:
        workdir: the run's folder.
        step: the last step whose lines stay.

    Raises:
        ValueError: a line before the last is no JSON object with a step.
    """
    files = [workdir / name for name in (METRICS, ROUTING) if (workdir / name).exists()]
    # Both are checked before either is changed.
    for file, lines in [(file, _whole_lines(file)) for file in files]:
        _shorten(file, lines, step)


def _shorten(file: Path, lines: list[str], step: int) -> None:
    """Leaves the lines up to a step in a log, and appends the others to its discarded ones."""
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    dropped = [line for line in lines if json.loads(line)["step"] > step]
    if dropped:
        with file.with_suffix(".discarded.jsonl").open("a", encoding="utf-8") as discarded:
            discarded.write("".join(line + "\n" for line in dropped))
    shortened = file.with_name(file.name + ".tmp")
    with shortened.open("w", encoding="utf-8") as out:
        out.write("".join(line + "\n" for line in kept))
        out.flush()
        os.fsync(out.fileno())
    shortened.replace(file)


def _open_events(folder: Path, purge_step: int) -> EventsWriter:
    """Opens a new event file, and hides the events of earlier files from `purge_step` on."""
    # Nanoseconds: two runs that start in one second would overwrite each other's file.
    events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    start = SessionLog(status=SessionLog.START)
    events.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))
    events.flush()
    return events


def _rounded(value: float) -> float:
    """The number with `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def _strict(value: float) -> float | str:
    """A finite number itself, another one's name."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _arrays(layer: Any) -> dict[str, np.ndarray]:
    """The arrays of a layer in a routing line."""
    return {name: np.array([float(v) for v in values]) for name, values in layer.items()}


def _parsed(file: Path, read: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
    """The objects of a log's lines, each value but the step as `read` gives it."""
    for number, line in enumerate(_whole_lines(file), start=1):
        try:
            tree = {k: v if k == "step" else read(v) for k, v in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Line {number} of {file} holds something else than numbers ({error}). Remove that "
                "line, or move the file away, or use another --workdir."
            ) from error
        yield tree


def _whole_lines(file: Path) -> list[str]:
    """The lines of a log, checked, without a last one that the writer did not finish."""
    *lines, _torn = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            whole = isinstance(json.loads(line)["step"], int)
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(
                f"Line {number} of {file} is no metrics line: {line[:80]!r}. Remove that line, or "
                "move the file away, or use another --workdir."
            )
    return lines
