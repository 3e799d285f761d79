"""Orbax's manager of a folder of checkpoints: when a step is due, and which steps stay."""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from emoe_jax.stored import RUN, STATE, read_metrics

DELETED = ".deleted"
"""Folder of steps that are being deleted: a process killed meanwhile leaves them there, where no
reader looks, and the next one deletes the rest."""


CLOSING_S = 1.0
"""Seconds for which a run that ends waits for a sweep: a few files are gone by then, and a slow
disk must not take the time of grace that the last save has; the next run deletes the rest."""


class Manager(ocp.CheckpointManager):
    """Orbax's, which opens a folder whose metrics are damaged, and takes them from the record.

    Args:
        directory: where the steps lie.
        every: saves are due at multiples of this many steps.
        keep_last: how many of the newest steps stay.
        keep_every: multiples of this many steps stay for ever; 0 for none.
        keep_best: how many of the best stay.
        best_metric: decides which those are; lower is better.
        read_only: nothing is written.
    """

    def __init__(
        self,
        directory: str,
        *,
        every: int,
        keep_last: int,
        keep_every: int,
        keep_best: int,
        best_metric: str,
        read_only: bool,
    ) -> None:
        self._best_metric = best_metric
        options = _READ_ONLY
        if not read_only:
            kept = [policies.LatestN(keep_last)]
            kept.append(policies.BestN(get_metric_fn=self.badness, reverse=True, n=keep_best))
            if keep_every:
                kept.append(policies.EveryNSteps(keep_every))
            options = self._writing(every, kept)
        super().__init__(directory, options=options, handler_registry=_registry())

    def metrics(self, step: int) -> dict[str, Any]:
        """The metrics of a step."""
        return read_metrics(epath.Path(self.directory) / str(step))

    def forget(self, steps: Collection[int]) -> None:
        """Lists these steps no longer; reads no disk, which may lag behind."""
        self._checkpoints.delete_if(lambda info: info.step in steps)

    def badness(self, metrics: Mapping[str, float] | None) -> float:
        """The number that `best_metric` ranks by; infinity where it was not measured."""
        return (metrics or {}).get(self._best_metric, math.inf)

    def _writing(self, every: int, kept: list[Any]) -> ocp.CheckpointManagerOptions:
        due = [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
        return ocp.CheckpointManagerOptions(
            best_fn=self.badness,  # orbax keeps metrics only where there is one
            cleanup_tmp_directories=True,
            # A folder that cannot be made is then an error at once; in the background, the writers
            # would wait for it until orbax's timeout of many minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            todelete_subdir=DELETED,  # renames; `Sweeper` deletes
            save_decision_policy=policies.AnySavePolicy(due),
            preservation_policy=policies.AnyPreservationPolicy(kept),
        )


# Given as orbax would set them: it logs a warning for each that it has to change.
_READ_ONLY = ocp.CheckpointManagerOptions(save_interval_steps=0, create=False, read_only=True)


def _registry() -> ocp.handlers.CheckpointHandlerRegistry:
    """Names the two items, so that a new process can read what an earlier one wrote."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    # All three would take processor time from the steps: zstd, by which weights hardly shrink, and
    # files of shardings and, as a handler without a store for them writes none, of chunk shapes.
    # Nothing here reads these: who restores gives the shardings (orbax's own `PyTreeCheckpointer`
    # needs them then too), and the record has shapes.
    arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=types)
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add(STATE, args, handler)
    for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add(RUN, args)
    return registry


class Sweeper:
    """Deletes, in the background, what `Manager` has moved to `DELETED`.

    Args:
        directory: where the steps lie.
        idle: whether it is to do nothing. Of several processes only the first deletes.
    """

    def __init__(self, directory: epath.Path, *, idle: bool) -> None:
        self._folder = directory / DELETED
        self._idle = idle or jax.process_index() > 0
        self._thread: threading.Thread | None = None

    def sweep(self) -> None:
        """Begins to delete what is there; while a sweep is at work, that is left to a later one."""
        if self._idle or self._at_work() or not self._folder.exists():
            return
        # Not the folder itself: orbax may be moving the next step into it.
        steps = list(self._folder.iterdir())
        # A daemon: the end of the process does not wait for it.
        self._thread = threading.Thread(target=_delete, args=(steps,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Takes what was left by a sweep at work, waits shortly, and removes the empty folder."""
        self._wait()
        self.sweep()
        self._wait()
        if not self._idle and not self._at_work():
            with suppress(OSError):  # what could not be deleted is left to the next run
                os.rmdir(self._folder)

    def _at_work(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join(CLOSING_S)


def _delete(folders: list[Any]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
