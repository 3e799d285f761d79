"""Vision Transformer with experts on CIFAR-100, from scratch.

Data: tensorflow-datasets `cifar100`, prepared once where there is a network (extra `tfds`):
`tfds build cifar100 --file_format=array_record`.
Hardware: one GPU. Time and result: not run; its router, the default, is measured on small images
alone.

    python -m train --config=configs/vit_cifar100.py --workdir=runs/vit_cifar100
"""

from ml_collections import ConfigDict

from train.config import experiment


def get_config() -> ConfigDict:
    return experiment(
        "vit",
        steps=40_000,
        batch=512,
        log_every=100,
        eval_every=2000,
        model={
            "patch": 4,
            "width": 384,
            "depth": 12,
            "heads": 6,
            "mlp_hidden": 1536,
            "moe_every": 2,
            "dtype": "bfloat16",
        },
        moe={"experts": 8, "top_k": 2, "hidden": 1536, "activation": "gelu"},
        data={
            "source": "tfds:cifar100",
            "image_size": 32,
            "channels": 3,
            "classes": 100,
            "crop_padding": 4,
            "flip": True,
            "mixup": 0.2,
        },
        optim={"learning_rate": 1e-3, "warmup": 2000, "final": 0.01},
        checkpoint={"every": 2000},
    )
