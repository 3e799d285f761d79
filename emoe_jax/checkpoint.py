"""Checkpoints of a training run: asynchronous, sharded, checked when they are read.

A checkpoint is one step of one run. Orbax's `CheckpointManager` writes it in the background, each
process its own shards, into a temporary folder which is renamed when everything is on the disk
(on Google Cloud Storage: marked with a commit file), so a partial one is never listed; and a step
that is no longer kept is renamed before it is deleted. Two items are stored: `state`, the arrays,
and `run`, the record: one JSON object with the data position, the caller's `meta` and every array's
global shape, dtype and digest, sealed by a hash (see `manifest`, also for why digests are of whole
arrays). Orbax keeps no checksum of array data; the record, which is there before the step is, makes
a damaged disk an error and not a silently different model.

Nothing in a checkpoint depends on the number of processes: digests are of whole arrays (each
process adds up the elements that it holds, see `manifest.digest`), and the data position is that of
the run. Each process checks what it has read, and damage that one of them finds is an error on all.
A damaged step is never deleted: `set_aside` renames it, so that it no longer counts as a step.

A train state is a plain nested dict of `jax.Array`. Tuples, lists, None and objects such as optax
states are refused: the caller turns them into dicts, so that no library's classes are needed to
read a checkpoint. Keys are non-empty strings without "." or "/", which join names on the disk and
in messages. Empty dicts are allowed and not compared.
"""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from emoe_jax import stored
from emoe_jax.failures import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    check_same,
    none_whole,
    not_read,
    not_written,
)
from emoe_jax.manifest import check_array, check_spec, entries, flatten, nest, seal
from emoe_jax.multihost import gather_texts
from emoe_jax.positions import as_json, read_position, whole_position
from emoe_jax.retention import Manager, Sweeper

__all__ = ["CheckpointDamaged", "CheckpointError", "CheckpointMismatch", "Checkpoints"]

T = TypeVar("T")
Tree = dict[str, Any]

ASIDE = ".damaged"
"""What follows the step in the name of a folder that was set aside."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        train_state: nested dict of arrays on the shardings that were asked for.
        data_state: the data position that was saved, of all shards; None after a partial restore.
        meta: the JSON object given to `Checkpoints.save`.
    """

    train_state: Tree
    data_state: dict[str, Any] | None
    meta: Tree


class Newest(NamedTuple):
    """The newest whole step.

    Attributes:
        step: its number.
        restored: what it held.
        damaged: steps after it, each with what is wrong with it.
    """

    step: int
    restored: Restored
    damaged: dict[int, str]


class Checkpoints:
    """The checkpoints of one run, in one directory; a context manager.

    Every process of a run makes one and calls the same methods in the same order. Only one run may
    write to a directory at a time; programs that look on while it trains open it `read_only`.

    Args:
        directory: where the steps lie; made if absent. A local path or a `gs://` address.
        every: `save` writes at multiples of this many steps (and when the machine announces its
            preemption, and when forced).
        keep_last: how many of the newest steps are kept.
        keep_every: multiples of this many steps are kept for ever besides; 0 for none.
        keep_best: how many of the best steps are kept besides; True is 1, False or 0 is none.
        best_metric: the name among `save`'s metrics that decides; lower is better.
        read_only: write and delete nothing, not even the rests of interrupted saves.

    Raises:
        ValueError: a count is out of range.
        FileNotFoundError: `read_only`, and there is no such directory.
        CheckpointError: the checkpoints that are there cannot be opened.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int,
        keep_last: int = 3,
        keep_every: int = 0,
        keep_best: bool | int = 1,
        best_metric: str = "eval/loss",
        read_only: bool = False,
    ) -> None:
        counts = {"every": (every, 1), "keep_last": (keep_last, 1), "keep_best": (keep_best, 0)}
        for name, (value, least) in (counts | {"keep_every": (keep_every, 0)}).items():
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        path = os.fspath(directory)
        self._every = every
        self._read_only = read_only
        self._pending: int | None = None
        self._bytes = 0  # of the arrays of the last save
        self._manager = _open(
            path if "://" in path else os.path.abspath(os.path.expanduser(path)),
            every=every,
            keep_last=keep_last,
            keep_every=keep_every,
            keep_best=int(keep_best),
            best_metric=best_metric,
            read_only=read_only,
        )
        self.directory = self._manager.directory
        if not self.directory.exists():
            raise FileNotFoundError(
                f"There are no checkpoints at {self.directory}: the folder does not exist. "
                "Give the --workdir of a run that has saved."
            )
        self._sweeper = Sweeper(self.directory, idle=read_only)
        self._sweeper.sweep()

    def __enter__(self) -> Checkpoints:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes; a failed save is raised unless another error is already on its way."""
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise

    def save(
        self,
        step: int,
        train_state: Tree,
        *,
        data_state: Mapping[str, Any],
        meta: Tree,
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> bool:
        """Starts to write a checkpoint if one is due; the arrays may be donated afterwards.

        Call it after every step: a call that is not due costs nothing, and reports the failure of
        an earlier save as soon as that has ended. After a failure later steps may be saved; the
        failed step itself only by a new run, as orbax's writers may still be at work in its folder.

        Args:
            step: optimizer steps done so far.
            train_state: nested dict of `jax.Array`; see the module's docstring.
            data_state: the data position, a JSON value for each shard of the data by its name. A
                process gives the shards that it reads; all gets back who restores. Processes that
                read the same shard are at the same position in it.
            meta: any JSON object (NaN and infinity are refused; tuples come back as lists).
            metrics: scalars that belong to the step. Non-finite ones are left out, so a run that
                diverged is never the best.
            force: write although `step` is no multiple of `every`.

        Returns:
            Whether a save was started. False when none is due or `step` is the latest already.

        Raises:
            ValueError: the tree, `data_state` or `meta` cannot be stored, `step` lies before the
                latest, or processes are at different positions in a shard.
            CheckpointError: this save, or an earlier one in the background, failed.
        """
        if self._read_only:
            raise ValueError(f"{self.directory} was opened read_only; nothing can be saved there.")
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()
        latest = self._manager.latest_step()
        if latest is not None and step < latest and (force or step % self._every == 0):
            raise ValueError(
                f"Step {step} cannot be saved in {self.directory}, which holds step {latest} "
                f"already. Resume from step {latest}, or use another --workdir."
            )
        if step == latest or not (force or self._manager.should_save(step)):
            return False
        arrays = flatten(train_state, check_array)
        # What the processes tell each other below must not run beside the step that makes these:
        # on CPU, two programs of several processes may wait for each other forever.
        jax.block_until_ready(arrays)
        self._bytes = sum(array.nbytes for array in arrays.values())
        as_json("meta", meta)
        finite = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        content = {"meta": meta, "data_state": whole_position(data_state), "metrics": finite}
        record = seal(content | {"arrays": entries(arrays)})
        self.wait()  # so that a save before this one fails under its own name
        items = {
            stored.STATE: ocp.args.PyTreeSave(nest(arrays)),
            stored.RUN: ocp.args.JsonSave(record),
        }
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=finite, force=True)
        except Exception as error:
            raise self._write_failure(step, error) from error
        self._pending = step
        return True

    def all_steps(self) -> list[int]:
        """Steps that are completely on the disk, ascending. Waits for a save in progress."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The last complete step, or None. Waits for a save in progress."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step of lowest `best_metric` (the later of equals); None if no step has it."""
        manager = self._manager
        scores = {step: manager.badness(manager.metrics(step)) for step in self.all_steps()}
        finite = {step: score for step, score in scores.items() if math.isfinite(score)}
        return min(finite, key=lambda step: (finite[step], -step), default=None)

    def restore_meta(self, step: int) -> Tree:
        """The `meta` of a step, without its arrays.

        Raises:
            FileNotFoundError: no such step.
            CheckpointDamaged: it cannot be read.
        """
        meta: Tree = self._read_record(step)["meta"]
        return meta

    def restore(self, step: int, abstract: Tree, *, partial: bool = False) -> Restored:
        """Reads a step onto the given shardings, whatever mesh wrote it.

        Args:
            step: one of `all_steps()`.
            abstract: nested dict of `jax.ShapeDtypeStruct`, each with its sharding.
            partial: read only the top-level entries (such as `params` and `router`) that are in
                `abstract`; those must still agree entirely. `data_state` is then None.

        Returns:
            The arrays in the structure of `abstract`, the data position, and `meta`.

        Raises:
            FileNotFoundError: no such step.
            ValueError: `abstract` is no such tree.
            CheckpointMismatch: names, shapes or dtypes differ; all of them are listed. Nothing
                has been read then.
            CheckpointDamaged: the data cannot be read, or is not what was saved.
        """
        wanted = flatten(abstract, check_spec)
        if not wanted:
            raise ValueError("The abstract tree names no array; give the tree of the train state.")
        record = self._read_record(step)
        folder = self.directory / str(step)
        specs = self._agreed(step, lambda: stored.read_specs(folder, record))
        check_same(self.directory, step, specs, wanted, partial)
        arrays = self._agreed(step, lambda: stored.read_arrays(folder, wanted))
        here = stored.changed_arrays(record, arrays)
        # Copies that several processes hold are read by each: all must know of one that is bad.
        changed = sorted({k for names in gather_texts(json.dumps(here)) for k in json.loads(names)})
        if changed:
            raise self._read_failure(
                step, f"other bits than were saved are in {', '.join(changed)}"
            )
        filled = jax.tree.map_with_path(
            lambda path, _: arrays["/".join(part.key for part in path)], abstract
        )
        position = None if partial else read_position(record["data_state"])
        return Restored(filled, position, record["meta"])

    def restore_newest(
        self, abstract: Tree, check: Callable[[int, Tree], None] = lambda *_: None
    ) -> Newest | None:
        """Reads the newest step that is whole, as `restore` does; nothing is renamed yet.

        Args:
            abstract: see `restore`.
            check: is given a step and its meta before its arrays are read, and raises what it
                likes, the same in every process.

        Returns:
            None where there is no step.

        Raises:
            CheckpointMismatch: see `restore`; older steps are not tried then.
            CheckpointError: no step is whole; says what is wrong with each.
        """
        # A process may see a folder's new content late: all take what the first one sees.
        steps = json.loads(gather_texts(json.dumps(self.all_steps()))[0])
        if not steps:
            return None
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                check(step, self._record_of(step)["meta"])
                return Newest(step, self.restore(step, abstract), damaged)
            except CheckpointDamaged as error:
                damaged[step] = error.reason
        raise none_whole(self.directory, damaged)

    def set_aside(self, steps: Collection[int]) -> list[str]:
        """Renames damaged steps, which then count as no steps; nothing is deleted.

        Every process calls it; the first renames.

        Returns:
            The folders' new names, of each the step and `ASIDE`.

        Raises:
            CheckpointError: a folder cannot be renamed.
        """
        names, error = [], ""
        if jax.process_index() == 0:
            try:
                names = [self._rename(step) for step in steps]
            except OSError as caught:
                error = stored.reason(caught)
        names, error = json.loads(gather_texts(json.dumps([names, error]))[0])
        if error:
            raise CheckpointError(
                f"Damaged checkpoints in {self.directory} could not be renamed ({error}). Move "
                f"{', '.join(map(str, steps))} away from there and start again."
            )
        self._manager.forget(steps)
        return list(names)

    def _rename(self, step: int) -> str:
        """Gives a step's folder a name that is free."""
        name, number = f"{step}{ASIDE}", 1
        while (self.directory / name).exists():
            number += 1
            name = f"{step}{ASIDE}-{number}"
        (self.directory / str(step)).rename(self.directory / name)
        return name

    def wait(self) -> None:
        """Waits until the save in progress is complete.

        Raises:
            CheckpointError: it failed.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._write_failure(step, error) from error
        self._sweeper.sweep()

    def close(self) -> None:
        """Waits, and frees the threads; the object cannot be used afterwards.

        Raises:
            CheckpointError: the save in progress failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()
            self._sweeper.close()

    def _read_record(self, step: int) -> Tree:
        """The record of a step that is listed here."""
        steps = self.all_steps()
        if step not in steps:
            raise FileNotFoundError(
                f"There is no checkpoint of step {step} in {self.directory}; "
                f"there are {steps or 'none'}. Choose one of them, or another --workdir."
            )
        return self._record_of(step)

    def _record_of(self, step: int) -> Tree:
        return self._agreed(step, lambda: stored.read_record(self.directory / str(step)))

    def _agreed(self, step: int, read: Callable[[], T]) -> T:
        """What `read` returns here; what fails in one process is an error in all of them.

        It must not wait for other processes: one that failed would leave them waiting.
        """
        found: list[T] = []
        reason = ""
        try:
            found.append(read())
        # Its text alone is kept: what has been read by then would live as long as its traceback.
        except Exception as error:
            reason = stored.reason(error)
            traceback.clear_frames(error.__traceback__)
        told = {text for text in gather_texts(reason) if text}
        if told:
            raise self._read_failure(step, "; ".join(sorted(told)))
        return found[0]

    def _write_failure(self, step: int, error: Exception) -> CheckpointError:
        """The error of a failed save; forgets the step, which orbax had listed already."""
        with suppress(OSError):  # the directory itself may be gone
            self._manager.reload()
        kept = sorted(self._manager.all_steps())
        return not_written(self.directory, step, kept, self._bytes, error)

    def _read_failure(self, step: int, reason: str) -> CheckpointDamaged:
        """The error of a step that is listed but cannot be used."""
        others = [s for s in self.all_steps() if s != step]
        return not_read(self.directory, step, others, reason)


def _open(path: str, **options: Any) -> Manager:
    try:
        return Manager(path, **options)
    except OSError:
        raise
    # Orbax reads a file of every step, and of a damaged one raises what its parser does.
    except Exception as error:
        raise CheckpointError(
            f"The checkpoints in {path} could not be opened: {stored.reason(error)}. Move the"
            " folder of the step whose files are damaged away."
        ) from error
