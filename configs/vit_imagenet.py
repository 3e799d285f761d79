"""Vision Transformer (S/16) with experts on ImageNet-1k, from scratch.

Data: tensorflow-datasets `imagenet2012`, whose archives have to be fetched by hand; see its page.
Hardware: a TPU v5e-64 or eight GPUs. Time and result: not run; its router, the default, is measured
on small images alone.

    python -m train --config=configs/vit_imagenet.py --workdir=runs/vit_imagenet
"""

from ml_collections import ConfigDict

from train.config import experiment


def get_config() -> ConfigDict:
    return experiment(
        "vit",
        steps=112_000,
        batch=1024,
        log_every=100,
        eval_every=5000,
        model={
            "patch": 16,
            "width": 384,
            "depth": 12,
            "heads": 6,
            "mlp_hidden": 1536,
            "moe_every": 2,
            "dtype": "bfloat16",
        },
        moe={"experts": 16, "top_k": 2, "hidden": 1536, "activation": "gelu"},
        data={
            "source": "tfds:imagenet2012",
            "image_size": 224,
            "channels": 3,
            "classes": 1000,
            "crop_padding": 28,
            "flip": True,
            "mixup": 0.2,
            "shards": 16,
        },
        optim={"learning_rate": 1e-3, "warmup": 10_000, "final": 0.01},
        checkpoint={"every": 5000},
    )
