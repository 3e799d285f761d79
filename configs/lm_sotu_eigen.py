"""configs/lm_sotu.py with the paper's router, as released."""

from ml_collections import ConfigDict

from configs import lm_sotu
from train.config import update


def get_config() -> ConfigDict:
    config = lm_sotu.get_config()
    update(
        config,
        {
            "moe.router": "eigen",
            "moe.basis.rank": 64,
            "moe.basis.method": "retraction",
            "moe.routing.bias_rate": None,
            "optim.router_scale": 1.0,
        },
    )
    return config
