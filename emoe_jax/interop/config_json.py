"""The config.json beside PyTorch weights: what others' tell, and what is written for ours.

Two kinds are read, anything else tells nothing. The release's class for the Hub writes
`vit_model_name` and `moe_config`; timm writes `architecture`, `global_pool` and, where a model is
not as its name says, `model_args`. Ours is the first kind for a model with branches and the second
for one without; both have `model_args`, so that nothing is left to be told.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from emoe_jax import json_file
from emoe_jax.config import ViTConfig, moe_layers, require
from emoe_jax.interop import released

Facts = dict[str, Any]

# Width, depth and heads of the sizes (arXiv 2010.11929, table 1; tiny and small of arXiv
# 2012.12877, table 1).
_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}

# Names whose size tells the heads. Not all do: vit_base_patch16_gap_224 has 16, and those with
# "plus" have others.
_NAMED = re.compile(
    r"(?:vit|deit3?)_(tiny|small|base|large|huge)(?:_distilled)?_patch\d+(?:_reg\d+)?"
    r"_(?:\d+|dinov2)(?:_in21k|_miil)?"
)

# Names of models that the weights do not give away, and in what they differ (timm 1.0.31).
_UNSEEN = {
    re.compile(r"_rpn_"): {"block_fn": "ResPostBlock"},
    re.compile(
        r"(?:base_patch32|giantopt_patch16|so400m_patch16)_siglip_gap_|large_patch16_siglip_gap_512"
    ): {"act_layer": "gelu_tanh"},
}

# Arguments of timm's models that change nothing in evaluation at the model's own image size.
_WITHOUT_EFFECT = frozenset(
    {
        "drop_rate",
        "pos_drop_rate",
        "patch_drop_rate",
        "proj_drop_rate",
        "attn_drop_rate",
        "drop_path_rate",
        "weight_init",
        "fix_init",
        "dynamic_img_size",
        "dynamic_img_pad",
        "strict_img_size",
    }
)


class Described(NamedTuple):
    """What a config.json tells.

    Attributes:
        moe: keys of the release's MoEConfig.
        backbone: facts of the Vision Transformer by timm's names, see `vit.FACTS`.
    """

    moe: Facts
    backbone: Facts


def read(file: pathlib.Path) -> Described:
    """What a config.json tells; nothing where there is none, or one of another kind.

    Raises:
        ValueError: it is no JSON.
    """
    if not file.is_file():
        return Described({}, {})
    try:
        tree = json_file.read(file)
    except ValueError as error:
        raise ValueError(f"{error}; mend it, or take it away") from error
    tree = tree if isinstance(tree, dict) else {}
    moe = _part(tree, "moe_config")
    name = tree.get("vit_model_name" if moe else "architecture")
    if not moe and not isinstance(name, str):
        return Described({}, {})
    backbone = told_by_name(str(name))
    if isinstance(tree.get("global_pool"), str):
        backbone["global_pool"] = tree["global_pool"]
    told = {
        name: value
        for name, value in _part(tree, "model_args").items()
        if value is not None and name not in _WITHOUT_EFFECT
    }
    return Described(moe, backbone | told)


def told_by_name(name: str) -> Facts:
    """What the name of a model of timm tells that its weights do not, with or without its tag."""
    plain = name.partition(".")[0]
    size = _NAMED.fullmatch(plain)
    facts: Facts = {"num_heads": _SIZES[size[1]][2]} if size else {}
    for pattern, differs in _UNSEEN.items():
        if pattern.search(plain):
            facts |= differs
    return facts


def describe(config: ViTConfig) -> dict[str, Any]:
    """The content of a config.json for the exported weights of a model.

    With branches it is that of the release's class for the Hub, which needs a `vit_model_name` that
    timm knows: it is left out where timm has no model of just these sizes. Without, it is timm's
    (`timm.create_model("local-dir:FOLDER", pretrained=True)`): `architecture` names the class of
    the model, and `model_args` the sizes.

    Args:
        config: of the model.

    Raises:
        ValueError: the model has no counterpart there.
    """
    released.check_exportable(config)
    args, name = model_args(config), timm_name(config)
    if any(moe_layers(config)):
        named = {"vit_model_name": name} if name else {}
        return named | {
            "num_classes": config.classes,
            "backbone_pretrained": False,
            "moe_config": released.describe(config),
            "model_args": args,
        }
    kind = "deit_base_distilled_patch16_224" if config.distilled else "vit_base_patch16_224"
    size = config.image_size
    return {
        "architecture": name or kind,
        "num_classes": config.classes,
        "num_features": config.width,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [config.channels, size, size],
            "fixed_input_size": True,
            "num_classes": config.classes,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.distilled else "head",
        },
    }


def model_args(config: ViTConfig) -> Facts:
    """The arguments of timm's VisionTransformer for the backbone of a model, all facts included."""
    ratio = config.mlp_hidden / config.width
    # timm rounds the product down.
    exact = int(config.width * ratio) == config.mlp_hidden
    return {
        "img_size": config.image_size,
        "patch_size": config.patch,
        "in_chans": config.channels,
        "num_classes": config.classes,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": ratio if exact else (config.mlp_hidden + 0.5) / config.width,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale or None,
        "class_token": config.has_class_token,
        "no_embed_class": not config.embed_prefix,
        "reg_tokens": config.registers,
        "global_pool": {"class": "token", "mean": "avg"}[config.pooling],
        "fc_norm": config.norm_after_pooling,
    }


def timm_name(config: ViTConfig) -> str:
    """The name of timm's model with just the backbone of a model; empty where it has no such."""
    sizes = {shape: size for size, shape in _SIZES.items()}
    size = sizes.get((config.width, config.depth, config.heads), "")
    family = "deit" if config.distilled else "vit"
    name = f"{family}_{size}{'_distilled' * config.distilled}_patch{config.patch}"
    args = model_args(config)
    plain = {
        "in_chans": 3,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "qk_norm": False,
        "init_values": None,
        "class_token": True,
        "no_embed_class": False,
        "reg_tokens": 0,
        "global_pool": "token",
        "fc_norm": False,
    }
    same = all(args[key] == value for key, value in plain.items())
    return f"{name}_{config.image_size}" if size and same else ""


def _part(tree: Mapping[str, Any], key: str) -> Facts:
    """An object within an object, empty where there is none."""
    part = tree.get(key)
    require(part is None or isinstance(part, dict), f"{key}={part!r} in config.json is no object")
    return dict(part or {})
