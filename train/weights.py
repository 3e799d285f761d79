"""The parameters of a model of ours as one safetensors file, and what the model is beside it.

Names are the paths in the parameters' tree, such as blocks/groups/0/moe/experts/w_up; config.json
beside the file holds the model's configuration, so that any model of ours has a place, language
models included. `--config.init_from` and `train.convert` read it back.
"""

from __future__ import annotations

import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax import interop, json_file, pure
from emoe_jax.config import LMConfig, ViTConfig, require
from emoe_jax.interop import files
from emoe_jax.manifest import flatten, nest
from emoe_jax.models import EMoEViT
from train.config import model_from_tree, to_json
from train.run import model_maker

Tree = Any

FORMAT = "emoe_jax"
"""Marks our files, in config.json under `format` and in the header of the weights."""


def write_weights(
    target: pathlib.Path, task: str, model: Mapping[str, Any], params: Mapping[str, np.ndarray]
) -> None:
    """Writes the weights and config.json beside them.

    Args:
        target: the file, its suffix .safetensors.
        task: "lm" or "vit".
        model: `dataclasses.asdict` of the model's configuration.
        params: arrays by path.

    Raises:
        ValueError: another suffix, or a config.json of something else is there; nothing is written.
        FileNotFoundError: the folder does not exist.
    """
    require(
        target.suffix == files.SAFETENSORS,
        f"--to={target} must end in {files.SAFETENSORS}, which is what is written",
    )
    beside = target.with_name(files.CONFIG)
    text = to_json({"format": FORMAT, "task": task, "model": dict(model)})
    require(
        not beside.exists() or beside.read_text(encoding="utf-8") == text,
        f"{beside} exists, and --to={target} needs another there, of the model alone, to be read"
        " again; nothing was written: name a file in another folder",
    )
    files.write_safetensors(target, params, {"format": FORMAT})
    beside.write_text(text, encoding="utf-8")


def is_ours(source: pathlib.Path) -> bool:
    """Whether a file, or the model.safetensors in a folder, was written by `write_weights`."""
    file = source / files.MODEL if source.is_dir() else source
    beside = file.with_name(files.CONFIG)
    if not (file.is_file() and beside.is_file()):
        return False
    try:
        tree = json_file.read(beside)
    except ValueError:
        return False
    return isinstance(tree, dict) and tree.get("format") == FORMAT


def read_weights(source: pathlib.Path) -> tuple[LMConfig | ViTConfig, Tree]:
    """The configuration and the parameters, a nested dict of numpy arrays.

    Args:
        source: see `is_ours`.

    Raises:
        ValueError: the file or config.json is damaged, or the file is not of the model that
            config.json describes.
    """
    file = source / files.MODEL if source.is_dir() else source
    config = _described(file.with_name(files.CONFIG))
    params = interop.read_state(file)
    _, expected, _ = pure.abstract_split(model_maker(config, 0))
    wanted = {name: leaf.shape for name, leaf in flatten(expected, lambda *_: None).items()}
    there = {name: array.shape for name, array in params.items()}
    wrong = sorted(
        name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)
    )
    require(
        not wrong,
        f"{file} does not hold the model that {files.CONFIG} beside it describes: of other shape,"
        f" missing or too many are {', '.join(wrong)}; export it again",
    )
    return config, nest(params)


def _described(beside: pathlib.Path) -> LMConfig | ViTConfig:
    """The model that a config.json of ours describes."""
    tree = json_file.read_object(beside)
    for key, kind, words in (("task", str, "text"), ("model", dict, "a group of keys")):
        value = tree.get(key)
        require(
            isinstance(value, kind),
            f"{beside}: the key {key!r} is {reprlib.repr(value)}, and must be {words}; export the"
            " model again",
        )
    try:
        config: LMConfig | ViTConfig = model_from_tree(tree["task"], tree["model"])
    except ValueError as error:
        raise ValueError(f"{beside}: {error}") from error
    return config


def read_model(source: pathlib.Path) -> EMoEViT:
    """A Vision Transformer of these weights; its routers' running state is that of a new model.

    Raises:
        ValueError: see `read_weights`, or it is a language model.
    """
    config, params = read_weights(source)
    require(
        isinstance(config, ViTConfig),
        f"{source} is a language model; train.convert and init_from take Vision Transformers",
    )
    make = model_maker(config, 0)
    _, router = jax.jit(pure.initializer(make))()
    model, _, _ = pure.abstract_split(make)
    bound: EMoEViT = model.bind(jax.tree.map(jnp.asarray, params), router)
    return bound
