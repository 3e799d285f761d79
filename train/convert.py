"""Converts weights: python -m train.convert --from=SOURCE --to=TARGET [--set KEY=VALUE ...].

From PyTorch: SOURCE is a `.safetensors` or `.pth` file, a folder with model.safetensors, or a Hub
repository; TARGET a folder, which gets `model.json` and a checkpoint (`--config.init_from=TARGET`
trains from it). `--set` tells what the weights do not: num_heads, and the release's MoEConfig but
for what a config.json beside them tells, such as --set num_heads=12 --set router_mode=top1. What
`python -m train.checkpoints export` wrote of a Vision Transformer is a SOURCE as well.

To PyTorch: SOURCE is such a folder, or that of a run; TARGET a `.safetensors` file that the
release's (or, without experts, timm's) load_state_dict takes with strict=True. The config.json that
is written beside it tells the rest: the way back needs no `--set`.

Nothing is written unless every tensor has its place.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from emoe_jax import interop, json_file, pure
from emoe_jax.config import require
from emoe_jax.interop import files, mapping
from emoe_jax.manifest import flatten
from emoe_jax.models import EMoEViT
from train import cli, tables, weights
from train.config import to_json
from train.run import is_saved_model, load_model, read_model_config, save_model

Rows = list[dict[str, Any]]


def to_ours(source: str, target: pathlib.Path, told: dict[str, Any]) -> Rows:
    """Writes a folder of ours from weights in PyTorch's form; returns what was mapped.

    Raises:
        ValueError: the weights do not fit, or the folder holds something already.
        FileNotFoundError: no such weights.
    """
    require(
        not target.exists() or (target.is_dir() and not any(target.iterdir())),
        f"--to={target} exists and is not empty; nothing is overwritten: name another folder",
    )
    if weights.is_ours(pathlib.Path(source)):
        require(not told, f"{source} tells of its model itself: leave out --set")
        model = weights.read_model(pathlib.Path(source))
        save_model(target, model)
        return [
            {"tensor": name, "shape": str(leaf.shape), "array": name}
            for name, leaf in flatten(pure.split(model)[1], lambda *_: None).items()
        ]
    model = interop.load(source, told)
    save_model(target, model)
    return mapped(model)


def to_torch(source: pathlib.Path, target: pathlib.Path, which: str = "newest") -> Rows:
    """Writes a safetensors file, and a config.json beside it, from a folder of ours.

    Returns:
        What was mapped.

    Raises:
        ValueError: a model that PyTorch's side has no place for, another suffix, or a config.json
            of something else in the target's folder.
        FileNotFoundError: the folder holds no checkpoint, or the target's does not exist.
    """
    require(
        target.suffix == files.SAFETENSORS,
        f"--to={target} must end in {files.SAFETENSORS}, which is what is written",
    )
    described = interop.describe(read_model_config(source))
    beside = target.parent / files.CONFIG
    require(
        not beside.exists() or _content(beside) == described,
        f"{beside} exists and is about something else, but --to={target} needs its own there to be"
        " read again; nothing was written: name a file in another folder",
    )
    model = load_model(source, which)
    state = interop.export_emoe(model)
    if all(name.startswith("vit.") for name in state):
        state = interop.export_vit(model)
    files.write_safetensors(target, state, {"format": "pt"})
    if not beside.exists():
        beside.write_text(to_json(described), encoding="utf-8")
    return mapped(model)


def _content(file: pathlib.Path) -> Any:
    """The JSON of a file; None for anything else."""
    try:
        return json_file.read(file)
    except ValueError:
        return None


def mapped(model: EMoEViT) -> Rows:
    """One row a PyTorch tensor: its name and shape, and where it is here."""
    _, params, router = pure.split(model)
    rows = []
    for tree in (params, router):
        for entry in mapping.table(tree):
            here = [
                "/".join(piece.path) + "".join(f"[{i}]" for i in piece.at) for piece in entry.pieces
            ]
            shape = mapping.torch_shape(tree, entry)
            rows.append({"tensor": entry.name, "shape": str(shape), "array": ", ".join(here)})
    return sorted(rows, key=lambda row: row["tensor"])


def main(argv: list[str]) -> None:
    """Converts one way or the other."""
    args = flags.FLAGS
    # "from" and "set" cannot be read as attributes.
    source, told = str(args["from"].value), list(args["set"].value or ())
    target = pathlib.Path(args.to)
    if is_saved_model(pathlib.Path(source)):
        require(
            not told, f"--set={told[0] if told else ''} is for weights from PyTorch; leave it out"
        )
        rows = to_torch(pathlib.Path(source), target, args.step)
    else:
        rows = to_ours(source, target, cli.overrides(told, "set"))
    tables.print_table(f"{source} to {target}: {len(rows)} tensors", rows)
    if args.json:
        tables.write_json(args.json, rows)


if __name__ == "__main__":
    flags.DEFINE_string("from", None, "Weights, or a folder of ours.", required=True)
    flags.DEFINE_string("to", None, "Folder, or .safetensors file.", required=True)
    flags.DEFINE_multi_string("set", [], "KEY=VALUE that the weights do not tell; repeatable.")
    flags.DEFINE_string("step", "newest", "Checkpoint of a run: newest, best, or its step.")
    flags.DEFINE_string("json", "", "File to write the table to.")
    cli.run(main)
