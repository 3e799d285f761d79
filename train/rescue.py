"""Saves the last complete state of a run that an error stops."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

import jax

from emoe_jax.checkpoint import CheckpointError, Checkpoints
from train import cluster
from train.guards import Record

Tree = Any

LOGGER = logging.getLogger(__name__)


class Rescue:
    """Saves what it holds when an error leaves the context; the error goes on.

    It says what it has done, and why where it saves nothing: before the first step there is nothing
    new; a step that fails has taken its arguments' memory (they are donated); arrays with NaN or
    infinity are no state to go on from, nor is one in a row of skipped steps; and where only some
    of several processes have failed, the others would not take part in a save. A failed save is not
    tried again.

    Args:
        checkpoints: of the run.
        record: what is saved beside the state.
    """

    def __init__(self, checkpoints: Checkpoints, record: Record) -> None:
        self._checkpoints, self._record = checkpoints, record
        self._step: int | None = None
        self._state: Tree = None
        self._position: Tree = None

    def hold(self, step: int, state: Tree, position: Tree) -> None:
        """Takes the state after a step, in place of the one before.

        Args:
            step: optimizer steps done.
            state: the training state after them; may be donated later.
            position: of the data, as `Checkpoints.save` takes it.
        """
        self._step, self._state, self._position = step, state, position

    def drop(self) -> None:
        """Forgets the state: it is none to go on from, or its memory is needed."""
        self._step = self._state = self._position = None

    def __enter__(self) -> Rescue:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Saves if an error has come; an ordinary exit of the program is none."""
        stopped = isinstance(error, Exception | KeyboardInterrupt)
        if not stopped or isinstance(error, CheckpointError) or self._step is None:
            return
        name = type(error).__name__
        try:
            outcome = self._save()
        except Exception as second:  # whatever it is, the first error is the one to show
            outcome = f"step {self._step} could not be saved: {second}"
        LOGGER.error("training stops with %s; %s", name, outcome)

    def _save(self) -> str:
        """Saves; what came of it."""
        step, state = self._step, self._state
        assert step is not None
        gone = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        if not cluster.stopped_alike(f"{step} {gone}"):
            return (
                "nothing is saved, as other processes have not stopped at the same point and"
                " would not take part"
            )
        if gone:
            return f"step {step} is not saved: step {step + 1} had taken its memory"
        why = self._record.unsound(step, state)
        if why:
            return f"step {step} is not saved: {why}"
        given = {"data_state": self._position, "meta": self._record.meta(), "force": True}
        new = self._checkpoints.save(step, state, **given)
        self._checkpoints.wait()
        return f"step {step} {'is saved' if new else 'was saved already'}"
