r"""The paper's recipe: expert adapters on a frozen ViT-B/16, fine-tuned on CIFAR-100.

The last six blocks get a branch of eight experts behind the paper's router, for patches only. The
figures are those of the release (github.com/Belis0811/EMoE at 5453639, train_eval.py). It differs
in this: the release's freeze_backbone freezes the head as well, here it is trained; the release
decays every trained weight, here matrices alone are; it crops with bilinear interpolation, here
it is bicubic; it evaluates the centre 224 of 256 pixels, here the whole image; it stops early; its
mixed precision is float16, here bfloat16 with float32 routers; its experts start uniform, here
normal. As in the release, the branch behind the last block is idle: it changes patches alone, and
the class token that is classified never sees them again.

Data: tensorflow-datasets `cifar100`, prepared once where there is a network (extra `tfds`):
`tfds build cifar100 --file_format=array_record`; and timm's weights of vit_base_patch16_224. With
`init_from` left empty the frozen backbone keeps drawn weights.
Hardware: one GPU. Time and result: not run.

    python -m train --config=configs/vit_b16_emoe_adapter.py --workdir=runs/vit_b16_emoe_adapter \
        --config.init_from=vit_base_patch16_224.safetensors
"""

from ml_collections import ConfigDict

from train.config import experiment

IMAGES = 50_000
BATCH = 128


def get_config() -> ConfigDict:
    return experiment(
        "vit",
        steps=50 * IMAGES // BATCH,
        batch=BATCH,
        log_every=100,
        eval_every=5 * IMAGES // BATCH,
        model={
            "patch": 16,
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_hidden": 3072,
            "pooling": "class",
            "moe_form": "adapter",
            "moe_blocks": (6, 7, 8, 9, 10, 11),
            "dtype": "bfloat16",
        },
        moe={
            "router": "eigen",
            "experts": 8,
            "top_k": 1,
            "hidden": 192,
            "activation": "gelu",
            "basis": {"rank": 128, "method": "retraction"},
            "routing": {"orthogonality_weight": 5e-4},
        },
        data={
            "source": "tfds:cifar100",
            "image_size": 224,
            "channels": 3,
            "classes": 100,
            "resize": True,
            "crop_scale": 0.6,
            "flip": True,
            # ImageNet's, as in the release.
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        optim={
            "learning_rate": 5e-4,
            "warmup": 0,
            "final": 1.0,
            "b2": 0.999,
            "weight_decay": 0.05,
            "clip": 1e9,  # never reached: the release does not clip
            "trainable": ("moe", "alpha", "head"),
        },
        checkpoint={"every": 5 * IMAGES // BATCH},
    )
