"""Mixture-of-Experts layers routed by a learned orthonormal eigenbasis, in JAX and Flax."""

from emoe_jax.basis import orthonormalize, prepare_bases
from emoe_jax.config import BasisConfig, LMConfig, MoEConfig, RouterConfig, ViTConfig
from emoe_jax.metrics import routing_metrics
from emoe_jax.models import EMoELM, EMoEViT
from emoe_jax.moe import Aux, MoE
from emoe_jax.routers import ROUTERS

__version__ = "0.1.0"

__all__ = [
    "ROUTERS",
    "Aux",
    "BasisConfig",
    "EMoELM",
    "EMoEViT",
    "LMConfig",
    "MoE",
    "MoEConfig",
    "RouterConfig",
    "ViTConfig",
    "orthonormalize",
    "prepare_bases",
    "routing_metrics",
]
