"""The weights that a Vision Transformer starts from: those of another run, or of PyTorch.

`init_from` names the folder of a run or of `python -m train.convert`, what `python -m
train.checkpoints export` wrote, or what `emoe_jax.interop.initial_params` reads: a file, a folder
or a Hub name in PyTorch format. Only the
parameters are taken, and only those that fit; the rest starts anew.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from emoe_jax import interop, pure
from emoe_jax.basis import map_bases, orthonormalize
from emoe_jax.config import ViTConfig, require
from emoe_jax.interop.vit import fit_positions
from emoe_jax.optim import partition
from emoe_jax.routers import router_class
from train import weights
from train.run import Run, is_saved_model, load_model

Tree = Any
Path = tuple[str, ...]


def initial_params(run: Run) -> tuple[Tree, list[str]]:
    """The parameters that can be taken from `init_from`, and what to know about the others.

    Args:
        run: the run that starts; its configuration names the source.

    Returns:
        A nested dict of arrays with some of the run's parameters, at their own paths, bases
        orthonormal; and notes, each a line for the user.

    Raises:
        FileNotFoundError: there is no such source, or it holds no checkpoint yet.
        ValueError: it holds no Vision Transformer, or nothing in it fits.
    """
    source, model = run.config.init_from, run.config.model
    assert isinstance(model, ViTConfig)
    folder = pathlib.Path(source).expanduser()
    if is_saved_model(folder):
        taken, notes = _fitting(run, *_newest(folder))
        notes = [f"the newest checkpoint in {folder}", *notes]
    elif weights.is_ours(folder):
        taken, notes = _fitting(run, *weights.read_weights(folder))
    else:
        _check_folder(folder)
        taken, notes = interop.initial_params(str(folder), model, run.abstract["params"])
    # Routers take their bases for orthonormal, and PyTorch's are off by their last step.
    return map_bases(lambda weight: orthonormalize(jnp.asarray(weight)), taken), notes


def place_params(params: Tree, taken: Tree) -> Tree:
    """Puts what was taken in the place of drawn parameters, dtypes and shardings kept.

    A drawn array is deleted before the one that replaces it is placed: a model whose parameters
    fill a device is never there twice.

    Args:
        params: drawn parameters; those that are replaced cannot be used any more.
        taken: arrays on the host for some of them.

    Returns:
        The parameters.
    """
    leaves = traverse_util.flatten_dict(params)
    for path, leaf in traverse_util.flatten_dict(taken).items():
        drawn = leaves[path]
        value, where = np.asarray(leaf, drawn.dtype), drawn.sharding
        drawn.delete()
        leaves[path] = jax.device_put(value, where)
    return traverse_util.unflatten_dict(leaves)


def check_frozen(run: Run, taken: Tree) -> None:
    """Raises `ValueError` if a parameter that is not trained would keep what was drawn for it."""
    _, frozen = partition(run.abstract["params"], run.config.optim.trainable)
    missing = traverse_util.flatten_dict(frozen).keys() - traverse_util.flatten_dict(taken).keys()
    require(
        not missing,
        f"init_from={run.config.init_from} gives nothing, or other shapes, for parameters that"
        f" optim.trainable leaves out: {', '.join(sorted(map(_name, missing)))}; train them too, or"
        " start from weights of this size",
    )


def _check_folder(folder: pathlib.Path) -> None:
    """Refuses a missing entry of a folder that exists, which is no Hub name."""
    beside = folder.parent
    if folder.exists() or not beside.is_dir() or beside == pathlib.Path():
        return
    there = ", ".join(sorted(path.name for path in beside.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"init_from={folder} does not exist; {beside} holds {there}; name a file of weights, or the"
        " folder of a run that has been trained"
    )


def _newest(folder: pathlib.Path) -> tuple[ViTConfig, Tree]:
    """Configuration and parameters of the newest checkpoint in a folder of ours."""
    model = load_model(folder)
    _, params, _ = pure.split(model)
    return model.config, jax.device_get(params)


def _fitting(run: Run, there: Any, params: Tree) -> tuple[Tree, list[str]]:
    """Takes what fits of the parameters of a model of ours."""
    here, origin = run.config.model, run.config.init_from
    require(
        isinstance(there, ViTConfig), f"init_from={origin} is a language model; name one of images"
    )
    assert isinstance(here, ViTConfig)
    source, resized = with_positions(params, there, here)
    target = run.abstract["params"]
    if router_class(here.moe.router).CALIBRATES:
        # Their weights mean something in the coordinates of running statistics, drawn anew here.
        source, target = without_routers(source), without_routers(target)
        resized = [*resized, "routers start anew: their running statistics are those of a run"]
    taken, notes = matching(source, target)
    notes = resized + notes
    require(bool(taken), f"init_from={origin} holds no parameter that fits: {'; '.join(notes)}")
    return taken, notes


def with_positions(source: Tree, there: ViTConfig, here: ViTConfig) -> tuple[Tree, list[str]]:
    """The parameters with position embeddings for a model, as `interop.initial_params` has them.

    Args:
        source: nested dict of numpy arrays.
        there: the configuration that they belong to.
        here: that of the model which starts from them.

    Returns:
        The parameters, positions resized where the images differ, and left out where they belong to
        other tokens; and a note if something was done.
    """
    tokens = [config.prefix * config.embed_prefix for config in (there, here)]
    if tokens[0] != tokens[1]:
        rest = {name: leaf for name, leaf in source.items() if name != "position"}
        return rest, [
            f"positions start anew: {tokens[1]} of them belong to no patch here, {tokens[0]} there"
        ]
    position, notes = fit_positions(source["position"], here)
    return {**source, "position": position}, notes


def without_routers(params: Tree) -> Tree:
    """A tree without the parameters of routers."""
    leaves = traverse_util.flatten_dict(params).items()
    return traverse_util.unflatten_dict({p: leaf for p, leaf in leaves if "router" not in p})


def matching(source: Tree, target: Tree) -> tuple[Tree, list[str]]:
    """The leaves of a target that a source has in the same shape, block by block.

    Blocks are compared by their number in the model, since `Stack` keeps the blocks of a scan as
    one array and listed ones apart.

    Args:
        source: nested dict of a model's numpy arrays.
        target: nested dict of another model's arrays, abstract or not.

    Returns:
        A part of the target with the source's values, and notes on what was not taken.
    """
    there, here = by_block(source), jax.eval_shape(by_block, target)
    other = {path for path in here.keys() & there if here[path].shape != there[path].shape}
    taken: dict[Path, np.ndarray] = {}
    used: set[Path] = set(other)
    for path, leaf in traverse_util.flatten_dict(target).items():
        parts = block_paths(path, leaf, target)
        if not all(part in there and part not in other for part in parts):
            continue
        rows = [there[part] for part in parts]
        taken[path] = rows[0] if parts == [path] else np.stack(rows)
        used |= set(parts)
    notes = [
        f"{_name(path)}: {here[path].shape} here, {there[path].shape} there: starts anew"
        for path in sorted(other)
    ]
    notes += _note("not in the source, start anew", here.keys() - used)
    notes += _note("in the source alone, not used", there.keys() - used)
    return traverse_util.unflatten_dict(taken), notes


def by_block(params: Tree) -> dict[Path, Any]:
    """Arrays by path, those of the blocks one by one: ("blocks", number, ...)."""
    return {
        part: leaf if part == path else leaf[row]
        for path, leaf in traverse_util.flatten_dict(params).items()
        for row, part in enumerate(block_paths(path, leaf, params))
    }


def block_paths(path: Path, leaf: Any, params: Tree) -> list[Path]:
    """Paths by the block's number of each row of a leaf of the blocks; its own path of another's.

    Row `repeat` of place `place` is block `repeat · period + place`, see `models.stack`.
    """
    if path[:2] != ("blocks", "groups"):
        return [path]
    period, place, rest = len(params["blocks"]["groups"]), int(path[2]), path[3:]
    return [("blocks", str(row * period + place), *rest) for row in range(leaf.shape[0])]


def _note(what: str, paths: Collection[Path]) -> list[str]:
    """One line for all paths, none where there are none; blocks that have the same are listed."""
    names = {_name(path) for path in paths if path[0] != "blocks"}
    inside = [(int(path[1]), path[2:]) for path in paths if path[0] == "blocks"]
    for rest in {rest for _, rest in inside}:
        numbers = sorted(number for number, other in inside if other == rest)
        names.add(f"blocks/{','.join(map(str, numbers))}/{_name(rest)}")
    return [f"{what}: {', '.join(sorted(names))}"] if names else []


def _name(path: Path) -> str:
    return "/".join(path)
