"""Checkpoints of a training run: asynchronous, sharded, checked when they are read.

A checkpoint is one step of one run. Orbax's `CheckpointManager` writes it in the background, each
process its own shards, into a temporary folder which is renamed when everything is on the disk
(on Google Cloud Storage: marked with a commit file), so a partial one is never listed. Two items
are stored: `state`, the arrays, and `run`, one JSON object with the data position, the caller's
`meta` and a digest of every array. Orbax keeps no checksum of array data; the digests make a
damaged disk an error and not a silently different model.

Nothing in a checkpoint depends on the number of processes: digests are of whole arrays (each
process adds up the elements that it holds, see `manifest.digest`), and the data position is that of
the run. Each process checks what it has read, and damage that one of them finds is an error on all.

A train state is a plain nested dict of `jax.Array`. Tuples, lists, None and objects such as optax
states are refused: the caller turns them into dicts, so that no library's classes are needed to
read a checkpoint. Keys are non-empty strings without "." or "/", which join names on the disk and
in messages. Empty dicts are allowed and not compared.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from emoe_jax.manifest import check_array, check_spec, describe, digests, flatten, nest
from emoe_jax.multihost import gather_texts

Tree = dict[str, Any]

_STATE = "state"
_RUN = "run"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what was read is not what was written."""


class CheckpointMismatch(ValueError):  # noqa: N818  (the public name says what is wrong)
    """A checkpoint holds arrays of other names, shapes or dtypes than the model that asks."""


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


class Checkpoints:
    """The checkpoints of one run, in one directory; a context manager.

    Every process of a run makes one and calls the same methods in the same order. Only one run may
    write to a directory at a time; programs that look on while it trains open it `read_only`.

    Args:
        directory: where the steps lie; made if absent. A local path or a `gs://` address.
        every: `save` writes at multiples of this many steps (and when the machine announces its
            preemption, and when forced).
        keep_last: how many of the newest steps are kept.
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
        keep_best: bool | int = 1,
        best_metric: str = "eval/loss",
        read_only: bool = False,
    ) -> None:
        counts = {"every": (every, 1), "keep_last": (keep_last, 1), "keep_best": (keep_best, 0)}
        for name, (value, least) in counts.items():
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        path = os.fspath(directory)
        self._every = every
        self._read_only = read_only
        self._best_metric = best_metric
        self._pending: int | None = None
        try:
            self._manager = ocp.CheckpointManager(
                path if "://" in path else os.path.abspath(os.path.expanduser(path)),
                options=_options(every, keep_last, int(keep_best), self._badness, read_only),
                handler_registry=_registry(),
            )
        except OSError:
            raise
        # Orbax reads the metrics of all steps, and of damaged ones raises what their parser does.
        except Exception as error:
            raise CheckpointError(
                f"The checkpoints in {path} could not be opened: {_first_line(error)}. If files "
                "are damaged, move the folder of their step away."
            ) from error
        self.directory = self._manager.directory
        if not self.directory.exists():
            raise FileNotFoundError(
                f"There are no checkpoints at {self.directory}: the folder does not exist. "
                "Give the --workdir of a run that has saved."
            )

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
        _json("meta", meta)
        run = {"meta": meta, "data_state": _whole(data_state), "digests": digests(arrays)}
        finite = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        items = {_STATE: ocp.args.PyTreeSave(nest(arrays)), _RUN: ocp.args.JsonSave(run)}
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
        """The step of lowest `best_metric` (the later of equals); None if no step has it.

        Raises:
            CheckpointError: the metrics of a step cannot be read.
        """
        scores = {}
        for step in self.all_steps():
            with self._reading(step):
                scores[step] = self._badness(self._manager.metrics(step))
        finite = {step: score for step, score in scores.items() if math.isfinite(score)}
        return min(finite, key=lambda step: (finite[step], -step), default=None)

    def restore_meta(self, step: int) -> Tree:
        """The `meta` of a step, without its arrays.

        Raises:
            FileNotFoundError: no such step.
            CheckpointError: the file cannot be read.
        """
        return self._read_run(step)["meta"]

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
            CheckpointError: the data cannot be read, or is not what was saved.
        """
        wanted = flatten(abstract, check_spec)
        if not wanted:
            raise ValueError("The abstract tree names no array; give the tree of the train state.")
        run = self._read_run(step)
        self._compare(step, wanted, partial)
        item = nest(wanted)
        args = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=partial,
        )
        with self._reading(step):
            tree = self._manager.restore(step, args=ocp.args.Composite(state=args))[_STATE]
        arrays = flatten(tree, check_array)
        here = [k for k, v in digests(arrays).items() if v != run["digests"].get(k)]
        # Copies that several processes hold are read by each: all must know of one that is bad.
        changed = sorted({k for names in gather_texts(json.dumps(here)) for k in json.loads(names)})
        if changed:
            raise self._read_failure(step, f"{', '.join(changed)} hold other bits than were saved")
        filled = jax.tree.map_with_path(
            lambda path, _: arrays["/".join(part.key for part in path)], abstract
        )
        return Restored(filled, None if partial else run["data_state"], run["meta"])

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

    def close(self) -> None:
        """Waits, and frees the threads; the object cannot be used afterwards.

        Raises:
            CheckpointError: the save in progress failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def _badness(self, metrics: Mapping[str, float] | None) -> float:
        """The number that `best_metric` ranks by; infinity where it was not measured."""
        return float((metrics or {}).get(self._best_metric, math.inf))

    def _read_run(self, step: int) -> Tree:
        """The JSON object of a step: `digests`, `data_state` and `meta`."""
        steps = self.all_steps()
        if step not in steps:
            raise FileNotFoundError(
                f"There is no checkpoint of step {step} in {self.directory}; "
                f"there are {steps or 'none'}. Choose one of them, or another --workdir."
            )
        with self._reading(step):
            args = ocp.args.Composite(run=ocp.args.JsonRestore())
            run = self._manager.restore(step, args=args)[_RUN]
            return {
                "digests": dict(run["digests"]),
                "data_state": _positions(run["data_state"]),
                "meta": dict(run["meta"]),
            }

    def _compare(self, step: int, wanted: Mapping[str, Any], partial: bool) -> None:
        """Raises CheckpointMismatch unless the stored names, shapes and dtypes are as wanted."""
        with self._reading(step):
            tree = self._manager.item_metadata(step)[_STATE].tree
        stored = flatten(tree, lambda name, leaf: None)
        tops = {name.partition("/")[0] for name in wanted}
        lines = []
        for name in sorted(wanted.keys() | stored.keys()):
            there, here = describe(stored.get(name)), describe(wanted.get(name))
            if there != here and not (partial and name.partition("/")[0] not in tops):
                lines.append(f"  {name}: {there} in the checkpoint, {here} in this model\n")
        if lines:
            raise CheckpointMismatch(
                f"Step {step} in {self.directory} holds another model than this configuration "
                f"describes ({len(lines)} differences):\n{''.join(lines)}"
                "Use another --workdir, or the configuration that this one was made with."
            )

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Says which step could not be read, and what else there is, whatever orbax raises."""
        try:
            yield
        except Exception as error:
            raise self._read_failure(step, _first_line(error)) from error

    def _write_failure(self, step: int, error: Exception) -> CheckpointError:
        """The error of a failed save; forgets the step, which orbax had listed already."""
        with suppress(OSError):  # the directory itself may be gone
            self._manager.reload()
        kept = sorted(self._manager.all_steps())
        try:
            free = f"{shutil.disk_usage(os.fspath(self.directory)).free:,} bytes free"
        except OSError:  # remote storage
            free = "free bytes unknown"
        return CheckpointError(
            f"The checkpoint of step {step} could not be written to {self.directory} ({free}): "
            f"{_first_line(error)}. "
            f"The checkpoints of earlier steps {kept} are intact. Free space there, keep fewer "
            "checkpoints, or use a --workdir on a larger disk, and start again to resume."
        )

    def _read_failure(self, step: int, reason: str) -> CheckpointError:
        """The error of a step that is listed but cannot be used."""
        others = [s for s in self.all_steps() if s != step]
        return CheckpointError(
            f"The checkpoint of step {step} could not be read: {reason}. If its files are damaged, "
            f"move the folder {self.directory / str(step)} away and resume from another step "
            f"({others or 'there is none'})."
        )


def _options(
    every: int, keep_last: int, keep_best: int, badness: Callable[[Any], float], read_only: bool
) -> ocp.CheckpointManagerOptions:
    """Orbax's options; `badness` ranks metrics, the lowest being kept."""
    if read_only:
        # Given as orbax would set them: it logs a warning for each that it has to change.
        return ocp.CheckpointManagerOptions(save_interval_steps=0, create=False, read_only=True)
    due = [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
    best = policies.BestN(get_metric_fn=badness, reverse=True, n=keep_best)
    return ocp.CheckpointManagerOptions(
        best_fn=badness,  # orbax stores metrics only where there is one
        cleanup_tmp_directories=True,
        # A folder that cannot be made is then an error at once; in the background, the writers
        # would wait for it until orbax's timeout of many minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        save_decision_policy=policies.AnySavePolicy(due),
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best]),
    )


def _registry() -> ocp.handlers.CheckpointHandlerRegistry:
    """Names the two items, so that a new process can read what an earlier one wrote."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add(_STATE, args)
    for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add(_RUN, args)
    return registry


def _json(name: str, value: Any) -> str:
    """A value as JSON, or `ValueError` where it is none."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a JSON object: {error}.") from error


def _whole(data_state: Mapping[str, Any]) -> Tree:
    """The positions of all shards, from what each process knows of some."""
    whole: Tree = {}
    owner: dict[str, int] = {}
    for process, text in enumerate(gather_texts(_json("data_state", dict(data_state)))):
        for shard, position in json.loads(text).items():
            if whole.setdefault(shard, position) != position:
                raise ValueError(
                    f"Processes {owner[shard]} and {process} are at different positions in data "
                    f"shard {shard!r}: they have not read the same batches."
                )
            owner.setdefault(shard, process)
    return whole


def _positions(stored: Tree | list[str]) -> Tree:
    """Positions by shard, also of a checkpoint from before there were shards.

    Those hold one position for each process, JSON in base64; process i read what is shard i now.
    """
    if isinstance(stored, dict):
        return stored
    return {str(i): json.loads(base64.b64decode(text)) for i, text in enumerate(stored)}


def _first_line(error: Exception) -> str:
    """What failed, without tensorstore's dump of its configuration."""
    text = (str(error).splitlines() or [""])[0].partition(" [tensorstore_spec=")[0]
    return f"{type(error).__name__}: {text[:400]}"
