"""Model FLOPs: the multiply-adds that a model must do, by formula, for the utilisation (MFU)."""

from __future__ import annotations

import math
from typing import Any

import jax

from emoe_jax.config import LMConfig, ViTConfig, moe_layers

Tree = Any

MATRICES = ("kernel", "w_gate", "w_up", "w_down", "basis", "masks")


def active_parameters(config: LMConfig | ViTConfig, params: Tree) -> int:
    """Parameters of matrix products that one token passes.

    Experts count for the K of E that a token takes; the token embedding counts once as the output
    head and never as the look-up; norms and biases are left out. The head of a Vision Transformer
    is left out as well: images pass it, not tokens.
    """
    share = config.moe.top_k / config.moe.experts
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(part, "key", part)) for part in path]
        if names[-1] in MATRICES and names[0] not in ("head", "head_distilled"):
            total += math.prod(leaf.shape) * (share if "experts" in names else 1.0)
    if isinstance(config, LMConfig):
        total += config.vocab_size * config.width
    return round(total)


def flops_per_token(config: LMConfig | ViTConfig, params: Tree, length: int) -> float:
    """FLOPs of one token's forward and backward pass: 6 N + 12 L H dim S.

    N active parameters, L blocks, H heads of width dim, S positions: PaLM, arXiv 2204.02311,
    appendix B. Causal attention is not discounted and recomputation not counted, as there.

    Args:
        config: the model.
        params: its parameters, abstract or not.
        length: S.
    """
    dim = config.head_dim or config.width // config.heads
    attention = 12 * len(moe_layers(config)) * config.heads * dim * length
    return 6.0 * active_parameters(config, params) + attention


def flops_per_unit(config: LMConfig | ViTConfig, params: Tree, length: int) -> float:
    """FLOPs of one token of a language model, or of one image with all its `length` tokens."""
    per_token = flops_per_token(config, params, length)
    if isinstance(config, LMConfig):
        return per_token
    return per_token * length + 6.0 * config.width * config.classes * (1 + config.distilled)
