"""The released EMoE's checkpoints to `EMoEViT` and back (github.com/Belis0811/EMoE at 5453639)."""

from __future__ import annotations

import difflib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from emoe_jax import pure
from emoe_jax.config import (
    BasisConfig,
    MoEConfig,
    RouterConfig,
    ViTConfig,
    moe_layers,
    require,
)
from emoe_jax.interop import files, mapping, vit
from emoe_jax.models.vit import EMoEViT

Tree = Any
State = Mapping[str, np.ndarray]
Source = str | pathlib.Path | State

# Defaults of the release's MoEConfig.
_RELEASED = {
    "experts": 8,
    "r": 128,
    "bottleneck": 192,
    "tau": 1.0,
    "router_mode": "soft",
    "alpha": 1.0,
    "blocks": "last6",
    "apply_to_patches_only": True,
    "ortho_lambda": 1e-3,
    "freeze_backbone": True,
    "unfreeze_layernorm": False,
}

# Heads of timm's sizes, by the part of a model's name that tells the size (arXiv 2010.11929,
# table 1; tiny and small of arXiv 2012.12877, table 1).
_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}


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
            writes it. Then sizes and blocks are read off the weights, and the rest (router_mode
            "soft", tau 1, ortho_lambda 1e-3, apply_to_patches_only) is the release's default.
            Another `img_size` than the checkpoint's resizes the position embeddings.

    Raises:
        ValueError: unknown or contradictory configuration, a variant of ViT that is not supported,
            or tensors that are missing, unexpected or of another shape, all at once.
        FileNotFoundError: no such file.
        ModuleNotFoundError: a Hub repository without the extra `hub`.
    """
    state, config = _read(source, config)
    given = _released_config(config, state)
    backbone = _part(state, "vit.")
    require(
        bool(backbone),
        "the checkpoint holds no tensor vit.*, so it is none of the EMoE release; load a plain"
        " Vision Transformer of timm with load_vit",
    )
    require(
        "reg_token" not in backbone and "cls_token" in backbone,
        "the release needs a class token and knows no register tokens; load this backbone with"
        " load_vit",
    )
    facts = {name: config[name] for name in vit.FACTS if name in config}
    trunk = vit.settings(backbone, facts)
    blocks = released_blocks(given["blocks"], trunk["depth"])
    model = ViTConfig(
        **trunk,
        moe_form="adapter",
        moe_every=0,
        moe_blocks=blocks,
        route_class=bool(blocks) and not given["apply_to_patches_only"],
        moe=_moe_config(given, trunk["width"]),
    )
    return _fill(model, state)


def load_vit(source: Source, config: Mapping[str, Any]) -> EMoEViT:
    """A timm Vision Transformer without experts, with the same outputs.

    Args:
        source: as of `load_emoe`; timm's state dict.
        config: `num_heads`, and where the weights leave a choice the other `interop.vit.FACTS`.

    Raises:
        ValueError: as of `load_emoe`.
        FileNotFoundError: no such file.
    """
    state, config = _read(source, config)
    _refuse_unknown(config, vit.FACTS)
    trunk = vit.settings(state, config)
    named = {f"vit.{name}": tensor for name, tensor in state.items()}
    return _fill(ViTConfig(**trunk, moe_every=0), named)


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
        _check_exportable(model.config)
    tree = pure.plain(nnx.state(model)) if whole else _as_tree(model)
    state = mapping.to_torch(tree)
    return _with_companions(state) if whole else state


def _check_exportable(config: ViTConfig) -> None:
    """Raises `ValueError` for what the release computes in another way, or not at all."""
    require(
        config.head_dim in (0, config.width // config.heads),
        f"head_dim={config.head_dim} is not width / heads, as it is in every timm model",
    )
    if not any(moe_layers(config)):
        return
    moe = config.moe
    same = {
        "moe_form": (config.moe_form, ("adapter",)),
        "moe.router": (moe.router, ("eigen",)),
        "moe.activation": (moe.activation, ("gelu",)),
        "moe.dispatch": (moe.dispatch, ("dense", "dropless")),
        "moe.top_k": (moe.top_k, (1, 2, moe.experts)),
    }
    for name, (value, choices) in same.items():
        require(
            value in choices,
            f"the release has no {name}={value!r}, only {', '.join(map(str, choices))}; such a"
            " model has no place in a checkpoint of the release",
        )


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
    state = dict(_read(source, {})[0])
    if not _part(state, "vit."):
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
    vit.refuse_variants(_part(state, "vit."))
    _resize(state, config)
    entries = mapping.table(params)
    optional = ("vit.head.", "vit.head_dist.", "branches.")
    wrong = [
        line
        for line in mapping.problems(state, params, entries)
        if not line.split(" ")[1].startswith(optional)
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
    notes = [f"{'/'.join(path)} starts anew" for path in sorted(short)]
    notes += [f"{name} is not used" for name in state if name not in names]
    return mapping.from_torch(state, params, taken), notes


def released_blocks(spec: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """The blocks that the release's `blocks` names: "all", "last6", "last4", or as in "1,3".

    A sequence of numbers, or one, does as well.

    Numbers outside the depth are dropped, as in the release.

    Raises:
        ValueError: another word.
    """
    if spec == "all":
        return tuple(range(depth))
    if spec in ("last6", "last4"):
        return tuple(range(max(0, depth - int(spec[4:])), depth))
    listed = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    parts = [part.strip() for part in ",".join(map(str, listed)).split(",")]
    require(
        all(part.lstrip("-").isdigit() for part in parts),
        f"blocks={spec!r} must be 'all', 'last6', 'last4', or numbers as in '1,3'",
    )
    return tuple(sorted({int(part) for part in parts if 0 <= int(part) < depth}))


def _read(source: Source, config: Mapping[str, Any] | None) -> tuple[State, Mapping[str, Any]]:
    if isinstance(source, Mapping):
        require(config is not None, "a state dict comes without a configuration; give it")
        return files.cleaned(source), dict(config or {})
    path = files.locate(source)
    beside = path.parent / files.CONFIG
    require(
        config is not None or beside.is_file(),
        f"there is no {beside}; give the release's MoEConfig and num_heads as config",
    )
    return files.read_state(path), _beside(beside) | dict(config or {})


def _beside(file: pathlib.Path) -> dict[str, Any]:
    """What the config.json of the release's class for the Hub tells; nothing of other files."""
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "moe_config" not in tree:
        return {}
    name = str(tree.get("vit_model_name", ""))
    heads = [count for size, count in _HEADS.items() if f"_{size}_" in name]
    return dict(tree["moe_config"]) | ({"num_heads": heads[0]} if len(heads) == 1 else {})


def _sizes(state: State) -> dict[str, Any]:
    """What the weights tell of the release's configuration."""
    branches = sorted({int(name.split(".")[1]) for name in state if name.startswith("branches.")})
    if not branches:
        return {}
    branch = f"branches.{branches[0]}"
    masks, down = f"{branch}.router.masks", f"{branch}.experts.0.down.weight"
    found: dict[str, Any] = {"blocks": branches}
    if masks in state and state[masks].ndim == 2:
        found |= {"experts": state[masks].shape[0], "r": state[masks].shape[1]}
    if down in state:
        found["bottleneck"] = state[down].shape[0]
    return found


def _released_config(config: Mapping[str, Any], state: State) -> dict[str, Any]:
    _refuse_unknown(config, (*_RELEASED, *vit.FACTS))
    given = _RELEASED | _sizes(state)
    given |= {key: value for key, value in config.items() if key in _RELEASED}
    modes = ("soft", "top1", "top2")
    require(
        given["router_mode"] in modes,
        f"router_mode={given['router_mode']!r} is not known; choose one of {', '.join(modes)}",
    )
    return given


def _refuse_unknown(config: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in config:
        near = difflib.get_close_matches(name, known, 1)
        require(
            name in known,
            f"the configuration has an unknown key {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"),
        )


def _moe_config(given: Mapping[str, Any], width: int) -> MoEConfig:
    E = int(given["experts"])
    # As in the release, top-k of no more experts than k is the soft mode.
    K = {"soft": E, "top1": 1, "top2": 2}[given["router_mode"]]
    require(
        int(given["r"]) <= width,
        f"r={given['r']} is more than the width {width}; a basis has at most as many directions",
    )
    return MoEConfig(
        router="eigen",
        experts=E,
        top_k=min(K, E),
        hidden=int(given["bottleneck"]),
        dispatch="dense" if K >= E else "dropless",
        activation="gelu",
        basis=BasisConfig(rank=int(given["r"]), method="retraction", companion=True),
        routing=RouterConfig(
            temperature=float(given["tau"]), orthogonality_weight=float(given["ortho_lambda"])
        ),
    )


def _fill(config: ViTConfig, state: State) -> EMoEViT:
    """The model of a configuration with the tensors of a state dict."""
    state = dict(state)
    _resize(state, config)
    model, params, router = pure.abstract_split(lambda: EMoEViT(config, rngs=nnx.Rngs(0)))
    flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(router)
    tree = traverse_util.unflatten_dict(flat)
    entries = mapping.table(tree)
    wrong = mapping.problems(state, tree, entries)
    require(not wrong, _report("the checkpoint does not fit its configuration", wrong))
    arrays = jax.tree.map(jnp.asarray, mapping.from_torch(state, tree, entries))
    filled: EMoEViT = model.bind(arrays, arrays)
    return filled


def _resize(state: dict[str, np.ndarray], config: ViTConfig) -> None:
    name, prefix = "vit.pos_embed", config.prefix * config.embed_prefix
    if name in state and state[name].ndim == 3 and state[name].shape[1] > prefix:
        side = config.image_size // config.patch
        state[name] = vit.resize_positions(state[name], prefix, side)


def _report(what: str, lines: list[str]) -> str:
    return f"{what}; nothing was loaded:\n  " + "\n  ".join(lines)


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
