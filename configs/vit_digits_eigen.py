"""configs/vit_digits.py with the paper's router, as released."""

from ml_collections import ConfigDict

from configs import vit_digits
from train.config import update


def get_config() -> ConfigDict:
    config = vit_digits.get_config()
    eigen = {"moe.router": "eigen", "moe.basis.rank": 32, "moe.basis.method": "retraction"}
    update(config, eigen)
    return config
