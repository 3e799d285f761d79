"""The release's MoEConfig and ours, both ways (github.com/Belis0811/EMoE at 5453639).

The release tells a model by `MoEConfig`, which its class for the Hub writes into config.json. Sizes
and blocks are in the weights as well; how tokens are routed is in the configuration alone.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emoe_jax.config import (
    BasisConfig,
    MoEConfig,
    RouterConfig,
    ViTConfig,
    moe_layers,
    require,
)

State = Mapping[str, np.ndarray]

MODES = ("soft", "top1", "top2")
"""Of the release's router: every expert, the best one, the best two."""

DEFAULTS = {
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
"""Those of the release's MoEConfig."""


def complete(given: Mapping[str, Any], state: State) -> dict[str, Any]:
    """A whole MoEConfig: what is given, then what the weights tell, then the defaults.

    Args:
        given: some of its keys; others are left alone.
        state: the release's state dict.

    Raises:
        ValueError: the router's mode is unknown, or neither given nor without effect; or a value is
            of another type than its default.
    """
    there = sizes(state)
    # The one default on which the release does not agree with itself.
    require(
        not there or "router_mode" in given,
        "router_mode cannot be read off the weights, and the release has no one default: 'top1' in"
        " its training script and its export, 'soft' in its MoEConfig; give router_mode in the"
        f" configuration: {', '.join(MODES)}",
    )
    known = {key: value for key, value in given.items() if key in DEFAULTS}
    _check_kinds(known)
    whole = DEFAULTS | there | known
    mode = whole["router_mode"]
    require(mode in MODES, f"router_mode={mode!r} is not known; choose one of {', '.join(MODES)}")
    return whole


def _check_kinds(given: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a value of another type than the release's; `blocks` is free."""
    for key, value in given.items():
        kind = type(DEFAULTS[key])
        kinds = (int, float) if kind is float else (kind,)
        require(
            key == "blocks" or type(value) in kinds,
            f"{key}={reprlib.repr(value)} in the release's configuration is no {kind.__name__}",
        )


def sizes(state: State) -> dict[str, Any]:
    """What the weights tell: `blocks`, `experts`, `r` and `bottleneck`; nothing without branches.

    Raises:
        ValueError: a branch that has no number.
    """
    names = {name.split(".")[1] for name in state if name.startswith("branches.")}
    wrong = sorted(name for name in names if not name.isdecimal())
    require(
        not wrong,
        f"the checkpoint has branches {', '.join(wrong)}; those of the release are numbered as the"
        " blocks that they follow",
    )
    if not names:
        return {}
    found: dict[str, Any] = {"blocks": sorted(map(int, names))}
    branch = f"branches.{found['blocks'][0]}"
    masks, down = f"{branch}.router.masks", f"{branch}.experts.0.down.weight"
    if masks in state and state[masks].ndim == 2:
        found |= {"experts": state[masks].shape[0], "r": state[masks].shape[1]}
    if down in state and state[down].ndim == 2:
        found["bottleneck"] = state[down].shape[0]
    return found


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


def moe_config(whole: Mapping[str, Any], width: int) -> MoEConfig:
    """The layer of experts that a whole MoEConfig describes.

    Args:
        whole: see `complete`.
        width: D.

    Raises:
        ValueError: more directions than the width, or sizes that no layer has.
    """
    E = int(whole["experts"])
    # As in the release, top-k of no more experts than k is the soft mode.
    K = {"soft": E, "top1": 1, "top2": 2}[whole["router_mode"]]
    require(
        int(whole["r"]) <= width,
        f"r={whole['r']} is more than the width {width}; a basis has at most as many directions",
    )
    return MoEConfig(
        router="eigen",
        experts=E,
        top_k=min(K, E),
        hidden=int(whole["bottleneck"]),
        dispatch="dense" if K >= E else "dropless",
        activation="gelu",
        basis=BasisConfig(rank=int(whole["r"]), method="retraction", companion=True),
        routing=RouterConfig(
            temperature=float(whole["tau"]), orthogonality_weight=float(whole["ortho_lambda"])
        ),
    )


def check_exportable(config: ViTConfig) -> None:
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
        "class_token": (config.has_class_token, (True,)),
        "registers": (config.registers, (0,)),
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


def describe(config: ViTConfig) -> dict[str, Any]:
    """The whole MoEConfig of a model of ours; `alpha` and what is frozen are the defaults.

    Args:
        config: of a model with branches that `check_exportable` passes.
    """
    moe, routing = config.moe, config.moe.routing
    blocks = [block for block, has_experts in enumerate(moe_layers(config)) if has_experts]
    tau, weight = routing.temperature, routing.orthogonality_weight
    return DEFAULTS | {
        "experts": moe.experts,
        "r": moe.basis.rank_of(config.width),
        "bottleneck": moe.hidden,
        # The defaults of `routers.eigen.EigenRouter`.
        "tau": 1.0 if tau is None else tau,
        "ortho_lambda": 5e-4 if weight is None else weight,
        "router_mode": "soft" if moe.top_k == moe.experts else f"top{moe.top_k}",
        "blocks": ",".join(map(str, blocks)),
        "apply_to_patches_only": not config.route_class,
    }
