"""Weights from and for PyTorch: the released EMoE's checkpoints and timm's Vision Transformers."""

from emoe_jax.interop.emoe import (
    describe,
    export_emoe,
    export_vit,
    initial_params,
    load,
    load_emoe,
    load_vit,
)
from emoe_jax.interop.files import read_state, write_safetensors

__all__ = [
    "describe",
    "export_emoe",
    "export_vit",
    "initial_params",
    "load",
    "load_emoe",
    "load_vit",
    "read_state",
    "write_safetensors",
]
