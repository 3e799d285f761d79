"""What a run does about numbers that are not finite: it skips, it goes back, it gives up.

A step whose loss, gradients, bases or routers' next state are not finite changes nothing but the
count of steps: `step.train_step` selects, inside the one compiled program. The host reads these
flags where it waits for the devices anyway, when a line is logged, at evaluations and before
checkpoints, and counts them.

`guard.skips` of them in a row mean that more is wrong than a batch: the run goes back to its last
checkpoint and passes over every batch from there to the last of the row, those before the row
included, which have led to it (as PaLM was trained, arXiv 2204.02311, section 5.1). Where the state
itself holds a number that is not finite (a router's covariance, say), no later step can be good and
no batch is to blame, as steps that are accepted leave finite states: the run then goes back at once
and passes over nothing.

All of it follows from the flags, which are the same on all processes, and not from when they were
read. What was passed over lies in the run's folder (`rollbacks.json`) and in every checkpoint, so a
run that is stopped and resumed is the one that would have been.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emoe_jax import json_file
from emoe_jax.config import require
from emoe_jax.manifest import flatten
from emoe_jax.multihost import gather_texts
from train import cluster
from train.config import ExperimentConfig
from train.data.shards import GlobalBatches
from train.data.tokenizer import write_atomically

Tree = Any

LOGGER = logging.getLogger(__name__)

RECORD = "rollbacks.json"
"""File in the run's folder with all `Rollback`s, written before the run goes on."""

META = "guard"
"""Key of a checkpoint's meta under which `Guard.meta` lies."""


class Diverged(ValueError):  # noqa: N818  (the public name says what has happened)
    """A run has gone back as often as it may, and would have to again: something must change."""


class Rollback(NamedTuple):
    """One return to a checkpoint.

    Attributes:
        step: the step after which it was found to be due.
        to: the step of the checkpoint; 0 for the start, where there was none.
        first: the first batch that is passed over, counted from the run's start.
        end: the first after it that is not; `first` where none is passed over.
        skipped: steps that the run had skipped by then, those that were undone included.
    """

    step: int
    to: int
    first: int
    end: int
    skipped: int


class Fault(NamedTuple):
    """Why a run must go back.

    Attributes:
        step: the last of the row of skipped steps, or the last step there was.
        lost: names of the arrays that hold numbers that are not finite; none where the state is
            good and the batches are not.
    """

    step: int
    lost: tuple[str, ...]


class Guard:
    """Counts skipped steps of a run and decides when it goes back.

    Args:
        config: the experiment.
        workdir: the run's folder, which all processes see.
        run: digest of what gives a batch's number its meaning; a record of another run is left
            aside.
    """

    def __init__(self, config: ExperimentConfig, workdir: pathlib.Path, run: str) -> None:
        self.config = config
        self.skipped = self.row = 0
        self.owes = False
        self._file, self._run = workdir / RECORD, run
        self.rollbacks = self._read()
        self._unread: list[tuple[int, dict[str, Any]]] = []
        self._not_finite = NotFinite()

    def passed(self) -> list[tuple[int, int]]:
        """What is passed over: disjoint intervals [first, end) of batches, ascending."""
        return merged([(each.first, each.end) for each in self.rollbacks])

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps of this, a JSON object."""
        return {"skipped": self.skipped, "row": self.row, "rollbacks": list(self.rollbacks)}

    def restore(self, meta: Mapping[str, Any], step: int) -> None:
        """Goes on from a checkpoint.

        Args:
            meta: what `meta` gave; empty at a run's start and for checkpoints older than this.
            step: of the checkpoint; 0 for the start.
        """
        # The record in the folder may be the younger, after a rollback, or lack what it told once.
        # What a checkpoint had passed over is what it says: it may be newer than the step to which
        # a rollback went, where it could not be read then, and can be read now.
        told = [Rollback(*each) for each in meta.get("rollbacks", [])]
        there = position(step, merged([(each.first, each.end) for each in told]))
        self.rollbacks = told + [
            each._replace(first=max(each.first, there), end=max(each.end, there))
            for each in self.rollbacks[len(told) :]
        ]
        by_then = self.rollbacks[-1].skipped if self.rollbacks else 0
        self.skipped, self.row = max(meta.get("skipped", 0), by_then), meta.get("row", 0)
        self.owes = False
        self._unread.clear()

    def counts(self) -> dict[str, float]:
        """Steps skipped so far (undone ones included) and rollbacks, as scalars of the log."""
        return {"skipped": float(self.skipped), "rollbacks": float(len(self.rollbacks))}

    def see(self, step: int, metrics: Tree) -> None:
        """Takes the metrics of a step; does not wait for them."""
        self._unread.append((step, {k: metrics[k] for k in ("skipped", "loss", "grad_norm")}))

    def looks(self, step: int) -> bool:
        """Whether the flags are read after this step though no line is logged.

        Before evaluations and checkpoints, which wait for it anyway, and in a row of skipped steps.
        """
        every = self.config.eval_every, self.config.checkpoint.every
        return self.row > 0 or any(step % each == 0 for each in every)

    def look(self, step: int, state: Tree) -> Fault | None:
        """Reads the flags of the steps since the last look.

        Args:
            step: the last of them.
            state: the training state after it.

        Returns:
            Why the run must go back; None where it goes on.
        """
        limit = self.config.guard.skips
        unread, self._unread = jax.device_get(self._unread), []
        for number, metrics in unread:
            if not metrics["skipped"]:
                self.row = 0
                continue
            self.skipped, self.row = self.skipped + 1, self.row + 1
            LOGGER.warning(
                "step %d is skipped: its loss is %.4g and its gradient's norm %.4g; %d in a row,"
                " %d in all",
                *(number, metrics["loss"], metrics["grad_norm"], self.row, self.skipped),
            )
            if limit and self.row >= limit:
                return Fault(number, self._not_finite(state))
        lost = self._not_finite(state) if limit and self.row else ()
        return Fault(step, lost) if lost else None

    def may_save(self, step: int) -> bool:
        """Whether a checkpoint may be written, by `look` the step before.

        In a row of skipped steps none is, but for the run's last: it might hold what led to them.
        One that falls due there is owed, and written after the row.
        """
        if not self.row or step == self.config.steps:
            return True
        self.owes |= step % self.config.checkpoint.every == 0
        return False

    def go_back(self, fault: Fault, to: int | None) -> None:
        """Records that the run goes back, and says so.

        Args:
            fault: why.
            to: step of the last checkpoint; None where there is none yet.

        Raises:
            Diverged: it has gone back too often already.
        """
        where = "its start" if to is None else f"step {to}"
        why = (
            f"{', '.join(fault.lost[:3])} hold numbers that are not finite"
            if fault.lost
            else f"{self.row} steps in a row had a loss or gradients that are not finite"
        )
        most = self.config.guard.rollbacks
        if len(self.rollbacks) >= most:
            raise Diverged(
                f"after step {fault.step}: {why}, and the run has gone back {len(self.rollbacks)}"
                f" times already (guard.rollbacks={most}). It would go back to {where}. Raise"
                f" guard.rollbacks, and before that find the cause: look at the batches that"
                f" {self._file} names, lower optim.learning_rate, or move the newest checkpoints"
                " away to go further back"
            )
        passed = self.passed()
        first = position(to or 0, passed)
        end = first if fault.lost else position(fault.step, passed)
        entry = Rollback(fault.step, to or 0, first, end, self.skipped)
        self.rollbacks = [*self.rollbacks, entry]
        if cluster.is_first():
            record = {"run": self._run, "rollbacks": [each._asdict() for each in self.rollbacks]}
            write_atomically(self._file, json.dumps(record, indent=2) + "\n")
        LOGGER.warning(
            "after step %d: %s; the run goes back to %s and passes over %d batches from there;"
            " rollback %d of at most %d",
            *(fault.step, why, where, end - first, len(self.rollbacks), most),
        )

    def _read(self) -> list[Rollback]:
        """The rollbacks that the run's folder tells of, the same on all processes."""
        told: list[dict[str, int]] = []

        def read() -> None:
            if cluster.is_first() and self._file.is_file():
                told.extend(_read_record(self._file, self._run))

        cluster.together(read)
        return [Rollback(**each) for each in json.loads(gather_texts(json.dumps(told))[0])]


def _read_record(file: pathlib.Path, run: str) -> list[dict[str, int]]:
    """The rollbacks in a file as JSON objects; none of another run.

    Raises:
        ValueError: it is damaged.
    """
    record = json_file.read_object(file)
    if record.get("run") != run:
        return []
    rollbacks = record.get("rollbacks")
    fields = set(Rollback._fields)
    good = isinstance(rollbacks, list) and all(
        isinstance(each, dict)
        and each.keys() == fields
        and all(type(value) is int and value >= 0 for value in each.values())
        for each in rollbacks
    )
    require(
        good,
        f"{file} is damaged: rollbacks={rollbacks!r:.200} is no list of objects with the integers"
        f" {', '.join(Rollback._fields)}; delete the file, checkpoints tell the same",
    )
    assert isinstance(rollbacks, list)
    return rollbacks


class Record:
    """What a checkpoint holds beside the state and the data position.

    Args:
        guard: of the run.
        facts: what does not change while it trains, a JSON object.
    """

    def __init__(self, guard: Guard, facts: Mapping[str, Any]) -> None:
        self._guard, self._facts = guard, dict(facts)
        self._lost = NotFinite()

    def meta(self) -> dict[str, Any]:
        """As `Checkpoints.save` takes it."""
        return self._facts | {META: self._guard.meta()}

    def unsound(self, step: int, state: Tree) -> str:
        """Why the state after a step is none to go on from, all flags being read; "" if it is."""
        lost = self._lost(state)
        if lost:
            return f"{', '.join(lost[:3])} hold NaN or infinity"
        in_row = self._guard.look(step, state) is not None or self._guard.row > 0
        return "it is one of a row of skipped steps" if in_row else ""


class Passing:
    """The batches of training without those that are passed over; an iterator.

    Args:
        batches: all of them, before the first.
        guard: says what is passed over.
    """

    def __init__(self, batches: GlobalBatches, guard: Guard) -> None:
        self._batches, self._guard = batches, guard
        self._start, self._position = batches.get_state(), 0

    def __iter__(self) -> Passing:
        """Returns itself."""
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch that is not passed over."""
        for first, end in self._guard.passed():
            while first <= self._position < end:
                next(self._batches)
                self._position += 1
        self._position += 1
        return next(self._batches)

    def seek(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Goes on behind the batch of a step.

        Args:
            step: steps done.
            state: the position that was saved then; None for the start.
        """
        self._batches.set_state(self._start if state is None else dict(state))
        self._position = position(step, self._guard.passed())

    def get_state(self) -> dict[str, Any]:
        """The position in the data, see `GlobalBatches`."""
        return self._batches.get_state()

    def close(self) -> None:
        """Stops the threads."""
        self._batches.close()


def merged(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of intervals [first, end) as disjoint ones, ascending; empty ones are left out."""
    union: list[tuple[int, int]] = []
    for first, end in sorted(intervals):
        if union and first <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        elif first < end:
            union.append((first, end))
    return union


def position(step: int, passed: list[tuple[int, int]]) -> int:
    """How many batches are drawn when a step is done, those that were passed over included.

    Each step takes one. What follows the step's own batch is passed over only when the next is
    asked for.

    Args:
        step: steps done.
        passed: from `merged`.
    """
    for first, end in passed:
        step += end - first if first < step else 0
    return step


class NotFinite:
    """Names the arrays of a state that hold NaN or infinity; compiled at its first call alone."""

    def __init__(self) -> None:
        self._compiled: Any = None

    def __call__(self, state: Tree) -> tuple[str, ...]:
        """The names, dotted by "/". Waits for the state; every process calls it."""
        if self._compiled is None:
            self._compiled = cluster.compile_together(jax.jit(_finite).lower(state))
        finite = jax.device_get(self._compiled(state))
        return tuple(name for name, good in flatten(finite, lambda *_: None).items() if not good)


def _finite(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)
