"""timm's Vision Transformers: what a state dict tells of its model, and what it does not."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from emoe_jax.config import ViTConfig, require

State = Mapping[str, np.ndarray]

# What no weight shows, and what some would: each has one value that `EMoEViT` computes, which is
# timm's default.
_ONLY: dict[str, Any] = {
    "act_layer": "gelu",
    "norm_layer": "layernorm",
    "block_fn": "Block",
    "mlp_layer": "Mlp",
    "attn_layer": "attn",
    "embed_layer": "PatchEmbed",
    "embed_norm_layer": "",
    "pos_embed": "learn",
    "pool_include_prefix": False,
    "pre_norm": False,
    "final_norm": True,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "proj_bias": True,
}

FACTS = (
    "num_heads",
    "img_size",
    "global_pool",
    "no_embed_class",
    "depth",
    "num_classes",
    "embed_dim",
    "patch_size",
    "in_chans",
    "reg_tokens",
    "class_token",
    "qk_norm",
    "qkv_bias",
    "mlp_ratio",
    "init_values",
    "fc_norm",
    *_ONLY,
)
"""Facts of a Vision Transformer by timm's names. `num_heads` cannot be read off the weights;
`img_size`, `global_pool` and `no_embed_class` not always; the others are checked against them.

Some facts leave no trace in the weights: what is not told is taken for timm's default. So tell
`global_pool` where it is neither the class token before a last norm nor the mean before it;
`act_layer`, `block_fn`, `norm_layer` and `pool_include_prefix` are refused but for the default: the
exact GELU, norms before attention and MLP, LayerNorm with 1e-6, a mean over patches alone."""

_REFUSED = {
    "norm_pre.": "a norm before the blocks (pre_norm, as in CLIP)",
    "attn_pool.": "attention pooling (global_pool 'map' or 'prr')",
    "patch_embed.norm.": "a norm behind the patches (embed_norm_layer)",
    "patch_embed.backbone.": "a convolutional stem (hybrid)",
    "patch_embed.conv": "a convolutional stem",
    "rope.": "rotary positions",
    "stages.": "a hierarchical model (Swin, Hiera and the like)",
    "layers.": "a hierarchical model (Swin and the like)",
}

_REFUSED_IN_BLOCK = {
    "mlp.fc1_g.": "a gated MLP (SwiGLU)",
    "mlp.w12.": "a gated MLP (SwiGLU)",
    "mlp.w1.": "a gated MLP (SwiGLU)",
    "attn.gate.": "gated attention",
    "attn.lambda_": "differential attention",
    "attn.sub_norm.": "differential attention",
    "mlp.norm.": "a norm inside the MLP (scale_mlp_norm)",
    "attn.norm.": "a norm inside attention (scale_attn_norm)",
    "attn.q_proj.": "separate queries, keys and values (EVA, BEiT)",
    "attn.q_bias": "biases of queries and values alone (BEiT)",
    "attn.relative_position": "relative positions (BEiT)",
    "attn.rel_pos": "relative positions",
    "gamma_1": "scales in BEiT's form",
    "attn.in_proj.": "parallel blocks (ViT-22B)",
    "in_proj.": "parallel blocks (ViT-22B)",
    "attns.": "parallel blocks",
    "ffns.": "parallel blocks",
}


def refuse_variants(state: State) -> None:
    """Raises `ValueError` for variants of timm's Vision Transformer that `EMoEViT` cannot compute.

    Args:
        state: timm's state dict.
    """
    for name in state:
        _, _, inner = name.partition("blocks.")
        inner = inner.partition(".")[2]
        for start, what in (*_REFUSED.items(), *_REFUSED_IN_BLOCK.items()):
            where = inner if start in _REFUSED_IN_BLOCK else name
            require(
                not where.startswith(start),
                f"the checkpoint has {what} (tensor {name}); EMoEViT has none. Supported: timm's"
                " VisionTransformer with class, distillation and register tokens, LayerScale,"
                " qk_norm, and pooling by token or mean",
            )
    known = ("pos_embed", "patch_embed.", "blocks.", "cls_token", "head.", "norm.")
    require(
        any(name.startswith(known) for name in state),
        "the checkpoint has no tensor by a name of timm's VisionTransformer; its first are"
        f" {', '.join(list(state)[:3])}",
    )
    absent = {
        "pos_embed": "has no learned positions (pos_embed='none' or rotary)",
        "patch_embed.proj.weight": "has no patch embedding",
        "patch_embed.proj.bias": "has no bias in the patch embedding (pre_norm, as in CLIP)",
        "blocks.0.norm1.weight": "has no norm before attention (post-norm blocks)",
        "blocks.0.norm1.bias": "has norms without bias (RMSNorm)",
        "blocks.0.attn.proj.bias": "has no bias behind attention (proj_bias=False)",
        "blocks.0.mlp.fc1.weight": "has no MLP of two matrices",
        "blocks.0.mlp.fc2.weight": "has no MLP of two matrices",
    }
    for name, what in absent.items():
        require(
            name in state,
            f"the checkpoint {what}: there is no {name}; it is not a timm VisionTransformer that"
            " EMoEViT can compute",
        )
    require(
        "norm.weight" in state or "fc_norm.weight" in state,
        "the checkpoint has neither norm.weight nor fc_norm.weight (final_norm=False); EMoEViT has"
        " a last norm",
    )
    _refuse_shapes(state)


def _refuse_shapes(state: State) -> None:
    """Raises `ValueError` for variants whose tensors have the usual names and other shapes."""
    for name, axes in (("pos_embed", 3), ("patch_embed.proj.weight", 4)):
        shape = state[name].shape
        require(
            len(shape) == axes,
            f"{name} has shape {shape}, not {axes} axes as in timm's VisionTransformer",
        )
    up, down = (state[f"blocks.0.mlp.{name}.weight"].shape for name in ("fc1", "fc2"))
    require(
        up[:1] == down[1:],
        f"the checkpoint has a gated MLP (SwiGLU, both maps in one matrix): blocks.0.mlp.fc1 gives"
        f" {up[0]} features and blocks.0.mlp.fc2 takes {down[-1]}; EMoEViT has none",
    )


def refuse_facts(facts: Mapping[str, Any]) -> None:
    """Raises `ValueError` for facts that `EMoEViT` does not compute, or of another type.

    Args:
        facts: see `FACTS`.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "num_heads": (int,),
        "global_pool": (str,),
        "mlp_ratio": (int, float),
    }
    for name, kind in kinds.items():
        given = facts.get(name)
        require(
            given is None or (type(given) in kind and given not in (math.inf, -math.inf)),
            f"{name}={reprlib.repr(given)} is no {kind[-1].__name__}",
        )
    for name, only in _ONLY.items():
        given = facts.get(name)
        require(
            given is None or given == only,
            f"{name}={given!r} is not supported; EMoEViT computes {name}={only!r} alone",
        )


def settings(state: State, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `ViTConfig` for a timm state dict, those of the experts left out.

    Args:
        state: timm's state dict.
        facts: see `FACTS`.

    Raises:
        ValueError: a variant that is not supported, or facts that are missing or contradict the
            weights.
    """
    refuse_variants(state)
    refuse_facts(facts)
    size = _square("img_size", facts.get("img_size"))
    D, channels, patch, other = state["patch_embed.proj.weight"].shape
    require(patch == other, f"patches of {patch} by {other} pixels are not square")
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    class_token, distilled = "cls_token" in state, "dist_token" in state
    prefix = class_token + distilled + registers
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    require(
        classes > 0 or not distilled,
        "the checkpoint has a distillation token and no head: timm's model of it gives the mean of"
        " two tokens' features, which EMoEViT does not compute; load it with its heads",
    )
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    known = {
        "depth": depth,
        "num_classes": classes,
        "embed_dim": D,
        "patch_size": patch,
        "in_chans": channels,
        "reg_tokens": registers,
        "class_token": class_token,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "fc_norm": "fc_norm.weight" in state,
        "mlp_ratio": hidden,
        "init_values": "blocks.0.ls1.gamma" in state,
    }
    _compare(facts, known)
    grid, embed_prefix = _grid(state["pos_embed"].shape[1], prefix, patch, facts, size)
    return {
        "image_size": size or grid * patch,
        "patch": patch,
        "channels": channels,
        "classes": classes,
        "width": D,
        "depth": depth,
        "heads": _heads(state, D, facts),
        "mlp_hidden": hidden,
        "pooling": _pooling(state, facts),
        "class_token": class_token,
        "distilled": distilled,
        "registers": registers,
        "embed_prefix": embed_prefix,
        "norm_after_pooling": known["fc_norm"],
        # The initial value, which the checkpoint's replace.
        "layer_scale": 1.0 if known["init_values"] else 0.0,
        "qk_norm": known["qk_norm"],
        "qkv_bias": known["qkv_bias"],
    }


def _compare(facts: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a fact that the weights contradict; None is none."""
    as_found: dict[str, Callable[[Any], Any]] = {
        "patch_size": lambda size: _square("patch_size", size),
        # As timm computes the hidden width of the MLP, and whether there is LayerScale.
        "mlp_ratio": lambda ratio: int(known["embed_dim"] * ratio),
        "init_values": bool,
    }
    for name, found in known.items():
        given = facts.get(name)
        told = given if given is None else as_found.get(name, lambda fact: fact)(given)
        shown = given if told == given else f"{given} ({told})"
        require(told in (None, found), f"{name}={shown}, but the checkpoint has {found}")


def _square(name: str, size: Any) -> int:
    """The side of images or patches, of a number or a pair; 0 for None."""
    sides = size if isinstance(size, list | tuple) else [size or 0]
    require(
        bool(sides) and all(type(s) is int and 0 <= s < 2**31 and s == sides[0] for s in sides),
        f"{name}={reprlib.repr(size)} is no square of whole pixels, which EMoEViT takes",
    )
    return int(sides[0])


def _heads(state: State, width: int, facts: Mapping[str, Any]) -> int:
    if "blocks.0.attn.q_norm.weight" in state:
        found = width // state["blocks.0.attn.q_norm.weight"].shape[0]
        given = facts.get("num_heads", found)
        require(given == found, f"num_heads={given}, but the norms of queries tell {found}")
        return int(found)
    require(
        "num_heads" in facts,
        f"the number of heads cannot be read off weights of width {width}; give num_heads in the"
        " configuration (timm's tiny, small, base, large and huge have 3, 6, 12, 16 and 16)",
    )
    return int(facts["num_heads"])


def _pooling(state: State, facts: Mapping[str, Any]) -> str:
    default = "token" if "cls_token" in state and "fc_norm.weight" not in state else "avg"
    pool = facts.get("global_pool", default)
    names = {"token": "class", "avg": "mean"}
    require(
        pool in names,
        f"global_pool={pool!r} is not supported; EMoEViT pools by 'token' or 'avg'",
    )
    require(
        pool != "token" or "cls_token" in state,
        "global_pool='token', but the checkpoint has no cls_token; set it to 'avg'",
    )
    return names[pool]


def _grid(
    positions: int, prefix: int, patch: int, facts: Mapping[str, Any], size: int
) -> tuple[int, bool]:
    """Patches along a side of the checkpoint's images, and whether the prefix has positions."""
    choices: tuple[bool, ...] = (True, False)
    if "no_embed_class" in facts:
        choices = (not facts["no_embed_class"],)
    counts = {embedded: positions - prefix * embedded for embedded in choices}
    found = {
        embedded: math.isqrt(count)
        for embedded, count in counts.items()
        if count > 0 and math.isqrt(count) ** 2 == count
    }
    require(
        bool(found),
        f"{positions} positions less {prefix} for other tokens are no square of patches; EMoEViT"
        " takes square images",
    )
    # Where both would do, which takes registers, the image size tells; models with registers
    # usually give the prefix no positions.
    likely = [embedded for embedded, side in found.items() if side * patch == size]
    embedded = [*likely, *sorted(found)][0]
    return found[embedded], embedded


def fit_positions(positions: np.ndarray, config: ViTConfig) -> tuple[np.ndarray, list[str]]:
    """Position embeddings of weights that a model starts from, resized where its images differ.

    Args:
        positions: [S,D], those of no patch first, of a model with as many of these as the new one.
        config: of the new model.

    Returns:
        [S',D] for the new model (as they are if they are too few for any patch), and a note for the
        user if they were resized.

    Raises:
        ValueError: the positions of patches are no square.
    """
    prefix, side = config.prefix * config.embed_prefix, config.image_size // config.patch
    if positions.shape[0] <= prefix:
        return positions, []
    fitted = resize_positions(positions[None], prefix, side)[0]
    if fitted.shape == positions.shape:
        return positions, []
    old = math.isqrt(positions.shape[0] - prefix)
    return fitted, [f"positions are resized from {old} x {old} patches to {side} x {side}"]


def resize_positions(positions: np.ndarray, prefix: int, side: int) -> np.ndarray:
    """Position embeddings for another image size: bicubic with antialiasing, as timm does it.

    Args:
        positions: [1,S,D], the first `prefix` of which belong to no patch.
        prefix: tokens before the patches that have positions.
        side: patches along a side of the new images.

    Returns:
        [1, prefix + side², D].
    """
    first, grid = positions[0, :prefix], positions[0, prefix:]
    old = math.isqrt(grid.shape[0])
    require(
        old * old == grid.shape[0],
        f"{positions.shape[1]} positions, {prefix} of them of no patch, are no square of patches;"
        " the checkpoint and the model differ in class, distillation or register tokens",
    )
    if old == side:
        return positions
    D = grid.shape[1]
    resized = jax.image.resize(grid.reshape(old, old, D), (side, side, D), "cubic", antialias=True)
    return np.concatenate([first, np.asarray(resized).reshape(side * side, D)])[None]
