"""Writes tests/data/timm: tiny Vision Transformers of timm with random weights, and their logits.

Run by hand where torch and timm are installed (made with torch 2.13.0 and timm 1.0.31):

    python tests/data/write_timm.py

Each file holds timm's state dict as `state.*`, `images` [B,height,width,channels] and `logits`; its
metadata what cannot be read off the weights (`config`, timm's names, JSON).
"""

import json
import pathlib

import torch
from safetensors.numpy import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

FOLDER = pathlib.Path(__file__).parent / "timm"

SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SMALL |= {"num_classes": 3, "mlp_ratio": 2.0}

# What differs from SMALL, and what a user has to tell besides num_heads.
CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "class_token": ({}, {}),
    "one_channel_patch2": ({"in_chans": 1, "patch_size": 2, "depth": 1, "num_heads": 4}, {}),
    "mean_fc_norm": ({"global_pool": "avg", "class_token": False}, {}),
    "mean_with_class_token": ({"global_pool": "avg", "fc_norm": False}, {"global_pool": "avg"}),
    "registers": ({"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1}, {}),
    "registers_embedded": ({"reg_tokens": 3}, {}),
    "layer_scale": ({"init_values": 1e-5}, {}),
    "qk_norm": ({"qk_norm": True, "qkv_bias": False}, {}),
    "no_head": ({"num_classes": 0}, {}),
    "larger_images": ({"img_size": 24}, {"img_size": 40}),
    "smaller_images": ({"img_size": 24}, {"img_size": 12}),
    "distilled": ({"distilled": True}, {}),
}


def build(settings: dict[str, object]) -> VisionTransformer:
    """A model whose every parameter is random, so that each one matters."""
    made = dict(settings)
    kind = VisionTransformerDistilled if made.pop("distilled", False) else VisionTransformer
    model = kind(**made).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return model


def main() -> None:
    """Writes all cases."""
    for name, (changes, told) in CASES.items():
        torch.manual_seed(0)
        settings = SMALL | changes
        model = build(settings)
        # Images of another size need timm's own resizing of the positions.
        size = told.get("img_size", settings["img_size"])
        state = {f"state.{key}": value.numpy() for key, value in model.state_dict().items()}
        if size != settings["img_size"]:
            model.set_input_size(size)
        images = torch.randn(2, settings.get("in_chans", 3), size, size)
        with torch.no_grad():
            logits = model(images).contiguous().numpy()
        config = {"num_heads": settings["num_heads"]} | told
        arrays = {"images": images.permute(0, 2, 3, 1).contiguous().numpy(), "logits": logits}
        save_file(state | arrays, FOLDER / f"{name}.safetensors", {"config": json.dumps(config)})


if __name__ == "__main__":
    main()
