"""Models: decoder language model and Vision Transformer."""

from emoe_jax.models.lm import EMoELM
from emoe_jax.models.vit import EMoEViT

__all__ = ["EMoELM", "EMoEViT"]
