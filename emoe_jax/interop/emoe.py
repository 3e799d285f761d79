"""The released EMoE's checkpoints to `EMoEViT` and back (github.com/Belis0811/EMoE at 5453639)."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from emoe_jax import pure
from emoe_jax.config import ViTConfig, require
from emoe_jax.interop import config_json, files, mapping, released, vit
from emoe_jax.models.vit import EMoEViT

Tree = Any
State = Mapping[str, np.ndarray]
Source = str | pathlib.Path | State
Config = Mapping[str, Any]

MOST_LINES = 100
"""Lines of an error at most."""


def load(source: Source, config: Config | None = None) -> EMoEViT:
    """The model of a checkpoint: `load_emoe` where its names begin with vit., `load_vit` else.

    Args:
        source: as of `load_emoe`.
        config: as of the one or the other.

    Raises:
        ValueError: as of both.
        FileNotFoundError: no such file.
    """
    state, told, beside = _read(source, config)
    return (_emoe if _part(state, "vit.") else _vit)(state, told, beside)


def load_emoe(source: Source, config: Mapping[str, Any] | None = None) -> EMoEViT:
    """The `EMoEViT` of a released checkpoint, with the same outputs.

    Its bases are kept as the release keeps them (`BasisConfig.method` "retraction"), and P and
    log_lambda, which never reach the output, are carried along.

    Args:
        source: a `.safetensors` or `.pth` file, a folder with model.safetensors, a Hub repository
            such as "anzheCheng/EMoE" (needs the extra `hub`), or the state dict as arrays.
        config: the release's MoEConfig as a mapping, with `num_heads`, and where the weights leave
            a choice `img_size` and `global_pool`; see `interop.vit.FACTS`. Of a file, what is left
            out is first looked for in the config.json beside it, as the release's class for the Hub
            or `describe` writes it. Then sizes and blocks are read off the weights, and the rest
            but `router_mode` (tau 1, ortho_lambda 1e-3, apply_to_patches_only) is the release's
            default. Another `img_size` than the checkpoint's resizes the position embeddings.

    Raises:
        ValueError: unknown or contradictory configuration, a variant of ViT that is not supported,
            or tensors that are missing, unexpected or of another shape, all at once.
        FileNotFoundError: no such file.
        ModuleNotFoundError: a Hub repository without the extra `hub`.
    """
    return _emoe(*_read(source, config))


def load_vit(source: Source, config: Config | None = None) -> EMoEViT:
    """A timm Vision Transformer without experts, with the same outputs.

    Args:
        source: as of `load_emoe`; timm's state dict.
        config: `num_heads`, and where the weights leave a choice the other `interop.vit.FACTS`. Of
            a file, what is left out is first looked for in the config.json beside it, as timm or
            `describe` writes it.

    Raises:
        ValueError: as of `load_emoe`.
        FileNotFoundError: no such file.
    """
    return _vit(*_read(source, config))


def _emoe(state: State, told: Config, beside: config_json.Described) -> EMoEViT:
    _refuse_unknown(told, (*released.DEFAULTS, *vit.FACTS))
    _refuse_unknown(beside.moe, tuple(released.DEFAULTS))
    backbone = _part(state, "vit.")
    require(
        bool(backbone),
        "the checkpoint holds no tensor vit.*, so it is none of the EMoE release; load a plain"
        " Vision Transformer of timm with load_vit",
    )
    given = released.complete(beside.moe | dict(told), state)
    require(
        "reg_token" not in backbone and "cls_token" in backbone,
        "the release needs a class token and knows no register tokens; load this backbone with"
        " load_vit",
    )
    trunk = vit.settings(backbone, _facts(told, beside))
    blocks = released.released_blocks(given["blocks"], trunk["depth"])
    model = ViTConfig(
        **trunk,
        moe_form="adapter",
        moe_every=0,
        moe_blocks=blocks,
        route_class=bool(blocks) and not given["apply_to_patches_only"],
        moe=released.moe_config(given, trunk["width"]),
    )
    return _fill(model, state)


def _vit(state: State, told: Config, beside: config_json.Described) -> EMoEViT:
    _refuse_unknown(told, vit.FACTS)
    trunk = vit.settings(state, _facts(told, beside))
    named = {f"vit.{name}": tensor for name, tensor in state.items()}
    return _fill(ViTConfig(**trunk, moe_every=0), named)


def _facts(told: Config, beside: config_json.Described) -> dict[str, Any]:
    """What is told of the backbone, first by the user."""
    _refuse_unknown(beside.backbone, vit.FACTS)
    return beside.backbone | {name: fact for name, fact in told.items() if name in vit.FACTS}


def describe(model: EMoEViT | ViTConfig) -> dict[str, Any]:
    """The content of the config.json that belongs beside a model's exported weights.

    With it beside them `load` needs no configuration; `config_json.describe` says more.

    Args:
        model: a model, or its configuration.

    Raises:
        ValueError: the release computes such a model in another way, or not at all.
    """
    return config_json.describe(model.config if isinstance(model, EMoEViT) else model)


def export_emoe(model: nnx.Module | Tree) -> dict[str, np.ndarray]:
    """The release's state dict, `vit.*` and `branches.*`, which it loads with strict=True.

    Bases are written as they stand: what the last step retracted. A model whose routers keep no P
    and log_lambda (`BasisConfig.companion`) gets a copy of Q and zeros, as the release needs them
    and its output does not.

    Args:
        model: an `EMoEViT`, its state as Flax or `pure.split` gives it, or gradients of that
            structure. P and log_lambda are added to whole models alone, never to gradients.

    Returns:
        float32 arrays by name, bit-equal to those of the model.

    Raises:
        ValueError: the model has parts that the release knows nothing of; all are named.
    """
    whole = isinstance(model, nnx.Module)
    if isinstance(model, EMoEViT):
        released.check_exportable(model.config)
    tree = pure.plain(nnx.state(model)) if whole else _as_tree(model)
    state = mapping.to_torch(tree)
    return _with_companions(state) if whole else state


def export_vit(model: nnx.Module | Tree) -> dict[str, np.ndarray]:
    """State dict in timm's names of a model without experts; see `export_emoe`.

    Raises:
        ValueError: the model has experts.
    """
    state = export_emoe(model)
    branches = [name for name in state if not name.startswith("vit.")]
    require(
        not branches,
        f"the model has experts ({branches[:1]}), and timm's Vision Transformer has none; use"
        " export_emoe",
    )
    return _part(state, "vit.")


def initial_params(source: Source, config: ViTConfig, params: Tree) -> tuple[Tree, list[str]]:
    """Parameters to start a training from: those of a checkpoint that fit the model.

    The backbone must fit; position embeddings are resized. A head for other classes, and expert
    branches that the checkpoint does not have, are left out, and so start anew.

    Args:
        source: as of `load_emoe`; a release's or timm's state dict.
        config: the model that is to be trained.
        params: its parameters, abstract or not, as of `pure.split`.

    Returns:
        Nested dict of numpy arrays, of the leaves of `params` that were taken; and what was left
        out, a line each.

    Raises:
        ValueError: tensors of the backbone that are missing or of another shape, all at once.
    """
    state, told, beside = _read(source, {})
    if not _part(state, "vit."):
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
    _check_source(_part(state, "vit."), _facts(told, beside), config)
    state, resized = _with_positions(state, config)
    entries = mapping.table(params)
    optional = ("vit.head.", "vit.head_dist.", "branches.")
    wrong = [
        line
        for line in mapping.problems(state, params, entries)
        if line.startswith("dtype") or not line.split(" ")[1].startswith(optional)
    ]
    require(not wrong, _report("the checkpoint does not fit the model", wrong))
    fits = {
        entry.name: state[entry.name].shape == mapping.torch_shape(params, entry)
        for entry in entries
        if entry.name in state
    }
    # A leaf is taken whole or not at all: one missing expert leaves all of its block's out.
    short = {p.path for e in entries if not fits.get(e.name) for p in e.pieces}
    taken = [e for e in entries if not any(piece.path in short for piece in e.pieces)]
    names = {entry.name for entry in taken}
    notes = resized + [f"{'/'.join(path)} starts anew" for path in sorted(short)]
    notes += [f"{name} is not used" for name in state if name not in names]
    return mapping.from_torch(state, params, taken), notes


def _check_source(backbone: State, facts: Config, config: ViTConfig) -> None:
    """Raises `ValueError` for weights that would compute something else in this model."""
    vit.refuse_variants(backbone)
    vit.refuse_facts(facts)
    heads = facts.get("num_heads", config.heads)
    require(
        heads == config.heads,
        f"the config.json beside the checkpoint tells num_heads={heads}, the model has"
        f" heads={config.heads}, in which the same weights mean something else; set"
        f" model.heads={heads}",
    )


def _read(source: Source, config: Config | None) -> tuple[State, Config, config_json.Described]:
    """The tensors, what the user told of them, and what the config.json beside them tells."""
    if isinstance(source, Mapping):
        require(config is not None, "a state dict comes without a configuration; give it")
        return files.cleaned(source), dict(config or {}), config_json.Described({}, {})
    path = files.locate(source)
    beside = path.parent / files.CONFIG
    require(
        config is not None or beside.is_file(),
        f"there is no {beside}; give the release's MoEConfig and num_heads as config",
    )
    return files.read_state(path), dict(config or {}), config_json.read(beside)


def _refuse_unknown(config: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in config:
        near = difflib.get_close_matches(name, known, 1)
        require(
            name in known,
            f"the configuration has an unknown key {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"),
        )


def _fill(config: ViTConfig, state: State) -> EMoEViT:
    """The model of a configuration with the tensors of a state dict."""
    state, _ = _with_positions(state, config)
    model, params, router = pure.abstract_split(lambda: EMoEViT(config, rngs=nnx.Rngs(0)))
    flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(router)
    tree = traverse_util.unflatten_dict(flat)
    entries = mapping.table(tree)
    wrong = mapping.problems(state, tree, entries)
    require(not wrong, _report("the checkpoint does not fit its configuration", wrong))
    arrays = jax.tree.map(jnp.asarray, mapping.from_torch(state, tree, entries))
    filled: EMoEViT = model.bind(arrays, arrays)
    return filled


def _with_positions(state: State, config: ViTConfig) -> tuple[State, list[str]]:
    """The tensors with position embeddings for a model, and a note where they were resized."""
    name = "vit.pos_embed"
    if name not in state or state[name].ndim != 3:
        return state, []
    positions, notes = vit.fit_positions(state[name][0], config)
    return {**state, name: positions[None]}, notes


def _report(what: str, lines: list[str]) -> str:
    told = lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        told.append(f"and {len(lines) - MOST_LINES} more")
    return f"{what}; nothing was loaded:\n  " + "\n  ".join(told)


def _part(state: State, prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names start with a prefix, without it."""
    return {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}


def _as_tree(state: Any) -> Tree:
    return state if type(state) is dict else pure.plain(state)


def _with_companions(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    added = {}
    for name, tensor in state.items():
        if name.endswith(".basis.Q"):
            stem = name[: -len("Q")]
            added[f"{stem}P"] = tensor.copy()
            added[f"{stem}log_lambda"] = np.zeros(tensor.shape[1], np.float32)
    return added | state
