"""How far a run is, on the screen."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Screen:
    """The bar on a terminal, plain lines elsewhere.

    Args:
        console: where they go.
        total: optimizer steps of the whole run.
        unit: what the rate counts.
        first: steps that were done before; the pace is of those after it.
        every_s: seconds between plain lines.
        clock: seconds, for the time left.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        unit: str,
        first: int,
        every_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._console, self._total, self._unit, self._clock = console, total, unit, clock
        self._first, self._start = first, clock()
        self._every_s, self._next = every_s, -math.inf
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[words]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=console,
                expand=True,
            )
            self._task: TaskID = self._bar.add_task("", total=total, completed=first, words="")
            self._bar.start()

    def show(
        self, step: int, loss: float, rate: float, mfu: float | None, max_vio: float | None
    ) -> None:
        """Shows one state of the run."""
        words = [f"loss {loss:.4f}", f"{rate:,.0f} {self._unit}/s"]
        words += [] if mfu is None else [f"MFU {100 * float(mfu):.1f}%"]
        words += [] if max_vio is None else [f"MaxVio {float(max_vio):.3f}"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, words="  ".join(words))
            return
        now = self._clock()
        if now < self._next and step < self._total:
            return
        self._next = now + self._every_s
        left = self._left(step, now)
        words = [f"step {step}/{self._total}", *words, *([] if left is None else [f"left {left}"])]
        self._console.print("  ".join(words), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stops the bar's thread and leaves its last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int, now: float) -> str | None:
        """Time to the last step at the mean pace so far, as h:mm:ss; None before a step is done."""
        if step <= self._first:
            return None
        seconds = round((now - self._start) / (step - self._first) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
