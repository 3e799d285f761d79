"""Model FLOPs, by formula, and the peaks of devices: what utilisation (MFU) is made of."""

from __future__ import annotations

import math
from typing import Any

import jax

from emoe_jax.config import LMConfig, ViTConfig, moe_layers

Tree = Any

MATRICES = ("kernel", "w_gate", "w_up", "w_down", "basis", "directions", "masks")

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 FLOP/s of one JAX device, by `jax.Device.device_kind`; sources in `peak_flops`."""


def peak_flops(device_kind: str) -> float | None:
    """Published dense bfloat16 peak of one JAX device, for the model FLOP utilisation.

    Sources: cloud.google.com/tpu/docs pages v4, v5e, v5p, v6e, tpu7x, "peak compute per chip
    (BF16)" (275, 197, 459, 918, 2307 TFLOP/s; a TPU7x chip appears as two devices, each with half
    of it, while v4 and v5p chips appear as one). NVIDIA data sheets "BFLOAT16 Tensor Core", of
    which the figures with sparsity are halved: A100 312, H100 SXM 989 (1,979 sparse), H200 SXM 989
    (1,979 sparse), B200 in HGX 2250 (4,500 sparse). PCIe and NVL models of Hopper are slower and
    have names of their own, which are not in the table.

    Args:
        device_kind: `jax.devices()[0].device_kind`.

    Returns:
        FLOP/s, or None for a device that the table does not have, such as "cpu".
    """
    return PEAK_FLOPS.get(device_kind)


def image_tokens(config: ViTConfig) -> int:
    """Tokens of one image that are routed: all, or all but those that pass the experts by."""
    passed_by = config.moe_form == "adapter" and config.has_class_token and not config.route_class
    return (config.image_size // config.patch) ** 2 + config.prefix - passed_by


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
