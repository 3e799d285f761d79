"""configs/lm_sotu.py with the paper's router, as released.

The basis is retracted by QR and its gradient is that of a free matrix, as in the release; routers
learn at the full rate. Data: package `sotu`. Hardware: two CPU cores, shared with other work, 11
to 21 min. Result: 1.413 and 1.418 bits per byte held out in two runs of one seed; in both the
router collapses: MaxVio 6.9 to 7.0 in every layer (7 is one expert for all tokens), 25 of 32
experts dead.

    python -m train --config=configs/lm_sotu_eigen.py --workdir=runs/lm_sotu_eigen
"""

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
            "optim.router_scale": 1.0,
        },
    )
    return config
