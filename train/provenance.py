"""What a checkpoint says of the run that made it, and what a run must agree with to go on from it.

`meta` of a checkpoint holds what weights and the position in the data depend on (`identity`), and
under `MADE` who made it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import config_dict

from emoe_jax.config import BASIS_ROUTERS, BasisConfig, require
from train import cluster, tables
from train.config import ExperimentConfig, changed_keys, digest, merged, to_json
from train.run import CONFIG_FILE, TOKENIZER_FILE, read_config

Tree = Any

LOGGER = logging.getLogger(__name__)

MADE = "made"

FREE_OF_MODEL = (
    *("attention", "remat", "dtype", "loss_chunk", "dispatch", "capacity_factor"),
    *("exchange", "buffer_factor", "on_overflow", "exchange_chunks"),
)
"""Keys of the model that may change between starts of a run: what they mean for weights and data
stays the same, though dispatch, its room and precision may change numbers."""


def identity(config: ExperimentConfig) -> Tree:
    """What the weights and the position in the data depend on, as a JSON object."""
    return _settled(_whole_identity(config))


def _whole_identity(config: ExperimentConfig) -> Tree:
    """All keys that `identity` chooses from."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: tree[name] for name in ("seed", "batch", "data", "model")}


def _settled(tree: Tree) -> Tree:
    """The part of such a tree that counts, with numbers in place of "whatever fits"."""
    data = {
        name: value
        for name, value in tree["data"].items()
        if not name.endswith("_dir")  # where the data lie may differ between machines
    }
    model = {k: v for k, v in tree["model"].items() if k not in FREE_OF_MODEL}
    if not (model["moe_every"] or model["moe_blocks"]):
        del model["moe"]  # no block has experts
        return tree | {"data": data, "model": model}
    moe = {k: v for k, v in model["moe"].items() if k not in FREE_OF_MODEL}
    basis = moe.pop("basis")
    if moe["router"] in BASIS_ROUTERS:
        moe["basis"] = basis | {"rank": BasisConfig(**basis).rank_of(model["width"])}
    return tree | {"data": data, "model": model | {"moe": moe}}


def meta(tree: Mapping[str, Any], config: ExperimentConfig, workdir: pathlib.Path) -> Tree:
    """What every checkpoint of a run says of it, a JSON object.

    Args:
        tree: the experiment's keys, as in config.json.
        config: the same, frozen.
        workdir: the run's folder.

    Returns:
        `identity` and under `MADE`: `config`, its `digest`, `tokenizer` (the file's hash, None for
        images), how many `devices`, and what `tables.run_facts` says: command, device, versions,
        commit.
    """
    plain = json.loads(to_json(tree))
    facts = {"config": plain, "digest": digest(plain), "tokenizer": _tokenizer(workdir)}
    facts["devices"] = jax.device_count()
    return identity(config) | {MADE: facts | tables.run_facts()}


def check(config: ExperimentConfig, saved: Tree, workdir: pathlib.Path) -> None:
    """Compares a checkpoint's `meta` with the run that shall go on from it.

    Other versions of packages are told. Of checkpoints from before `MADE` only the identity counts.

    Raises:
        ValueError: another model, other data, or a tokenizer whose ids mean other text.
    """
    # A key that did not exist when the run began has the value that changes nothing, its default.
    plain = dataclasses.replace(config, model=type(config.model)(), data=type(config.data)())
    before = {name: value for name, value in saved.items() if name != MADE}
    before = _settled(merged(_whole_identity(plain), before))
    changed = changed_keys(before, identity(config))
    require(
        not changed,
        f"{workdir} holds a run of another model or of other data, in which its weights and its"
        f" position in the data mean something else ({'; '.join(changed)}); set these keys back,"
        " or use another --workdir",
    )
    if MADE not in saved:
        return
    made, tokenizer = saved[MADE], _tokenizer(workdir)
    require(
        made["tokenizer"] == tokenizer,
        f"{workdir / TOKENIZER_FILE} is not the tokenizer of the checkpoint (sha256 {tokenizer},"
        f" then {made['tokenizer']}): the same ids mean other text; put the file back, or use"
        " another --workdir",
    )
    for line in changed_keys(made["versions"], tables.versions()):
        LOGGER.warning("versions changed since the checkpoint was saved: %s", line)


def _tokenizer(workdir: pathlib.Path) -> str | None:
    """Hexadecimal SHA-256 of the run's tokenizer, None where there is none."""
    file = workdir / TOKENIZER_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def write_config(tree: config_dict.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json; says what changed since the run was started."""
    if not cluster.is_first():
        return
    file = workdir / CONFIG_FILE
    if file.is_file():
        for line in changed_keys(read_config(file), tree.to_dict()):
            LOGGER.warning("the configuration changed since this run began: %s", line)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(to_json(tree))
    temporary.replace(file)
    LOGGER.info("configuration %s in %s", digest(tree), file)
