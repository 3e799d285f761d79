"""Looks at checkpoints: python -m train.checkpoints COMMAND DIR ... [--json=FILE].

    list DIR             what is there: step, time, size, metrics, whole or damaged, the best
    verify DIR           reads every array of every step (--step: of one) and compares it with the
                         digest that was taken when it was saved; ends with code 1 if one is damaged
    diff DIR STEP STEP   how two steps of a run differ
    diff DIR DIR         how two runs differ, at --step of each
    export DIR           writes the parameters of --step to --to=FILE.safetensors, and config.json,
                         what model they are of, beside it

DIR is the folder of a run, also while it is being written, or its folder of checkpoints; STEP a
number, newest or best. Arrays are read one by one onto one device, whatever mesh saved them, and no
data are read.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from emoe_jax import stored
from emoe_jax.checkpoint import ASIDE, CheckpointError, Checkpoints
from emoe_jax.config import require
from train import checkpoint_diff, cli, tables, weights
from train.config import FROM_DATA, changed_keys, filled, freeze
from train.guards import META
from train.provenance import MADE
from train.run import CHECKPOINTS, CONFIG_FILE, MODEL_FILE, choose_step, read_json

Rows = list[dict[str, Any]]

USAGE = "list DIR, verify DIR, diff DIR STEP STEP, diff DIR DIR, or export DIR --to=FILE"


def folder_of(directory: str) -> pathlib.Path:
    """The folder of checkpoints of a run, or the one that is named itself.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = pathlib.Path(directory).expanduser()
    for there in (folder / CHECKPOINTS, folder):
        if there.is_dir() and any(path.name.split(".")[0].isdigit() for path in there.iterdir()):
            return there
    raise FileNotFoundError(f"{directory} holds no checkpoints; name the folder of a run")


def step_folder(directory: str, which: str) -> epath.Path:
    """The folder of a step.

    Args:
        directory: see `folder_of`.
        which: "newest", "best" or a number.

    Raises:
        FileNotFoundError: there is no such step.
    """
    with Checkpoints(folder_of(directory), every=1, read_only=True) as checkpoints:
        step, steps = choose_step(checkpoints, which), checkpoints.all_steps()
        if step not in steps:
            raise FileNotFoundError(
                f"{checkpoints.directory} holds no step {step}; there are {steps or 'none'}"
            )
        return epath.Path(checkpoints.directory) / str(step)


def listed(directory: str, *, read: bool = True) -> Rows:
    """One row a checkpoint, ascending; then those that were set aside.

    Args:
        directory: see `folder_of`.
        read: whether all arrays are read to tell which are whole.
    """
    rows, folder = [], folder_of(directory)
    with Checkpoints(folder, every=1, read_only=True) as checkpoints:
        best = checkpoints.best_step()
        for step in checkpoints.all_steps():
            row = _row(folder / str(step), read)
            if row:
                rows.append({"step": step, "best": "best" if step == best else ""} | row)
    for path in sorted(folder.glob(f"*{ASIDE}*")):
        step = int(path.name.split(".")[0])
        rows.append({"step": step, "best": ""} | _facts(path) | {"state": "set aside"})
    return rows


def _row(folder: pathlib.Path, read: bool) -> dict[str, Any]:
    """What is to be said of a step; nothing if the run has removed it meanwhile."""
    there = epath.Path(folder)
    damage = stored.examine(there) if read else []
    metrics = stored.read_metrics(there).items()
    try:
        facts = _facts(folder)
    except FileNotFoundError:
        return {}
    state = "damaged" if damage else "whole" if read else "not read"
    return facts | {"state": state} | {name: v for name, v in metrics if name.count("/") == 1}


def _facts(folder: pathlib.Path) -> dict[str, Any]:
    """When it was saved and how large it is."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))
    return {"saved": saved, "MB": size / 1e6}


def verified(directory: str, which: str = "") -> Rows:
    """One row a damaged array of the steps of a folder; none if all are whole.

    Args:
        directory: see `folder_of`.
        which: "newest", "best", a number, or empty for all steps.
    """
    if which:
        folders = [step_folder(directory, which)]
    else:
        there = folder_of(directory)
        with Checkpoints(there, every=1, read_only=True) as checkpoints:
            folders = [epath.Path(there) / str(step) for step in checkpoints.all_steps()]
    rows = []
    for folder in folders:
        for damage in stored.examine(folder):
            if folder.exists():  # a run that is training may have removed it meanwhile
                names = {"array": damage.array or "all", "file": ", ".join(damage.files)}
                rows.append({"step": int(folder.name)} | names | {"reason": damage.reason})
    return rows


def export(directory: str, which: str, target: pathlib.Path) -> Rows:
    """Writes the parameters of a step as `train.weights` does; returns one row an array.

    Raises:
        CheckpointError: an array is damaged; nothing is written then.
        ValueError: see `weights.write_weights`.
    """
    folder = step_folder(directory, which)
    try:
        record = stored.read_record(folder)
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {stored.reason(error)}") from error
    task, model = _model(folder, record["meta"])
    names = [name for name in record["arrays"] if name.startswith("params/")]
    params = {}
    for name, value in stored.each_array(folder, record, names):
        if isinstance(value, stored.Damage):
            raise CheckpointError(
                f"{name} of {folder} is damaged ({value.reason}); nothing was written: export"
                " another --step"
            )
        params[name.removeprefix("params/")] = np.asarray(value)
    weights.write_weights(target, task, model, params)
    return [{"tensor": name, "shape": str(list(leaf.shape))} for name, leaf in params.items()]


def _model(folder: epath.Path, meta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Task and configuration of a step's model: the checkpoint's own, or of `save_model`."""
    run = pathlib.Path(folder).parents[1]
    if "model" not in meta:
        return "vit", read_json(run / MODEL_FILE)
    # Checkpoints from before they held the configuration lie beside it.
    tree = meta[MADE]["config"] if MADE in meta else read_json(run / CONFIG_FILE)
    config = freeze(filled(tree))
    known = {name: meta["model"][name] for name in FROM_DATA[config.task]}
    return config.task, dataclasses.asdict(config.model) | known


def _diff(args: list[str], which: str) -> tuple[epath.Path, epath.Path]:
    """The two folders that the command line names."""
    require(len(args) in (2, 3), f"diff takes DIR STEP STEP, or DIR DIR; given: {' '.join(args)}")
    first, *others = args
    if len(others) == 2:
        require(which == "", "--step is for diff DIR DIR; here both steps are named")
        return step_folder(first, others[0]), step_folder(first, others[1])
    return step_folder(first, which or "newest"), step_folder(others[0], which or "newest")


def _print_diff(args: list[str], which: str) -> Rows:
    """Prints the tables of a comparison; returns all rows, each with its table's name."""
    a, b = _diff(args, which)
    sides = checkpoint_diff.Side(a), checkpoint_diff.Side(b)
    found = checkpoint_diff.compare(*sides)
    metas = [side.record["meta"] for side in sides]
    plain = [{name: v for name, v in meta.items() if name not in (MADE, META)} for meta in metas]
    print(f"A: {a}\nB: {b}")
    for line in changed_keys(*plain):
        print(f"configuration: {line}")
    titles = {
        "params": "Parameters, by the norm of the difference relative to A",
        "bases": "Bases, principal angles between A and B in degrees",
        "experts": "Experts, cosines of their weights",
        "router": "Running state of the routers",
        "others": "Optimizer",
    }
    top = flags.FLAGS.top
    for name, title in titles.items():
        rows = getattr(found, name)
        if rows:
            left = f" (the first {top} of {len(rows)}; --top for more)" if len(rows) > top else ""
            tables.print_table(title + left, rows[:top])
    return [{"table": name} | row for name in titles for row in getattr(found, name)]


def main(argv: list[str]) -> None:
    """Does what the first argument says."""
    options = flags.FLAGS
    command, *args = argv[1:] or [""]
    require(command in ("list", "verify", "diff", "export") and bool(args), f"give {USAGE}")
    require(command == "diff" or len(args) == 1, f"{command} takes one DIR; given: {args}")
    damaged = False
    if command == "list":
        rows = listed(args[0], read=not options.fast)
        tables.print_table(f"Checkpoints in {args[0]}", rows)
    elif command == "verify":
        rows = verified(args[0], options.step)
        damaged = bool(rows)
        if rows:
            tables.print_table(f"Damaged in {args[0]}", rows)
        else:
            print(f"{args[0]}: every array of {options.step or 'every'} step is what was saved")
        for path in sorted(folder_of(args[0]).glob(f"*{ASIDE}*")):
            print(f"{path} was set aside as damaged, and is no step")
    elif command == "export":
        require(bool(options.to), "export needs --to=FILE.safetensors")
        step = step_folder(args[0], options.step or "newest").name
        rows = export(args[0], step, pathlib.Path(options.to))
        print(f"{len(rows)} arrays of step {step} in {options.to}, and {CONFIG_FILE} beside it")
    else:
        rows = _print_diff(args, options.step)
    if options.json:
        tables.write_json(options.json, rows)
    if damaged:
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("step", "", "Step: newest, best or its number.")
    flags.DEFINE_string("to", "", "File that export writes, .safetensors.")
    flags.DEFINE_bool("fast", False, "List without reading arrays, so without judging them.")
    flags.DEFINE_integer("top", 30, "Rows of each table that diff prints.", lower_bound=1)
    flags.DEFINE_string("json", "", "File to write the table to.")
    cli.run(main)
