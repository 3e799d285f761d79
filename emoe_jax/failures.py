"""What goes wrong with checkpoints, in words that tell what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from emoe_jax.manifest import describe
from emoe_jax.stored import reason


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what was read is not what was written."""


class CheckpointDamaged(CheckpointError):  # noqa: N818  (the public name says what is wrong)
    """What was read is not what was saved, or it could not be read.

    Attributes:
        reason: what is wrong, without advice.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class CheckpointMismatch(ValueError):  # noqa: N818
    """A checkpoint holds arrays of other names, shapes or dtypes than the model that asks."""


def not_written(
    directory: epath.Path, step: int, kept: Sequence[int], size: int, error: Exception
) -> CheckpointError:
    """The error of a failed save of `size` bytes, where the steps `kept` are intact."""
    try:
        free = f"{shutil.disk_usage(os.fspath(directory)).free:,} bytes free"
    except OSError:  # remote storage
        free = "free bytes unknown"
    return CheckpointError(
        f"The checkpoint of step {step} could not be written to {directory} ({free}, at most "
        f"{size:,} and a little more needed): "
        f"{reason(error)}. "
        f"The checkpoints of earlier steps {kept} are intact. Free space there, keep fewer "
        "checkpoints, or use a --workdir on a larger disk, and start again to resume."
    )


def not_read(
    directory: epath.Path, step: int, others: Sequence[int], why: str
) -> CheckpointDamaged:
    """The error of a step that is listed but cannot be used."""
    return CheckpointDamaged(
        f"The checkpoint of step {step} could not be read: {why}. Training goes on from the newest "
        f"one in {directory} that is whole; for another program name one with --step "
        f"({', '.join(map(str, others)) or 'there is no other'}).",
        why,
    )


def none_whole(directory: epath.Path, damaged: Mapping[int, str]) -> CheckpointError:
    """The error of a folder in which no step can be used."""
    lines = "".join(f"  step {step}: {text}\n" for step, text in damaged.items())
    return CheckpointError(
        f"No checkpoint in {directory} is whole:\n{lines}Nothing was moved or deleted. Put a copy "
        "of one of these folders in its place, or, to begin anew, use another --workdir."
    )


def check_same(
    directory: epath.Path,
    step: int,
    there: Mapping[str, Any],
    wanted: Mapping[str, Any],
    partial: bool,
) -> None:
    """Compares the stored names, shapes and dtypes with those that are wanted.

    Args:
        directory: where the step lies.
        step: the step.
        there: specs by name.
        wanted: likewise.
        partial: whether top-level entries of which none is wanted may be there.

    Raises:
        CheckpointMismatch: they differ; all differences are listed.
    """
    tops = {name.partition("/")[0] for name in wanted}
    lines = []
    for name in sorted(wanted.keys() | there.keys()):
        saved, asked = describe(there.get(name)), describe(wanted.get(name))
        if saved != asked and not (partial and name.partition("/")[0] not in tops):
            lines.append(f"  {name}: {saved} in the checkpoint, {asked} in this model\n")
    if lines:
        raise CheckpointMismatch(
            f"Step {step} in {directory} holds another model than this configuration "
            f"describes ({len(lines)} differences):\n{''.join(lines)}"
            "Use another --workdir, or the configuration that this one was made with."
        )
