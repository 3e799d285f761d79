"""Language model of pod size on C4: 16 blocks, 64 experts, top-8.

About 6.9 billion parameters, 1.2 billion of them active per token (the shape of OLMoE,
arXiv 2409.02060). Data: tensorflow-datasets `c4/en`. Hardware: a TPU v5p-128, 16 hosts of 4 chips,
see launch/tpu_pod.sh and launch/gke_jobset.yaml. Time and result: not run.

    python -m train --config=configs/lm_c4.py --workdir=/mnt/share/runs/lm_c4
"""

from ml_collections import ConfigDict

from train.config import experiment


def get_config() -> ConfigDict:
    return experiment(
        "lm",
        steps=500_000,
        batch=1024,
        log_every=50,
        eval_every=5000,
        model={
            "width": 2048,
            "depth": 16,
            "heads": 16,
            "kv_heads": 16,
            "tie_head": False,
            "remat": "dots",
            "loss_chunk": 8192,
            "dtype": "bfloat16",
        },
        moe={
            "experts": 64,
            "top_k": 8,
            "hidden": 1024,
            "routing": {"renormalize": True},
        },
        data={
            "sources": ("tfds:c4/en",),
            "tokenizer": "bpe",
            "vocab_size": 50_304,
            "sequence_length": 4096,
            "shards": 64,
        },
        mesh={"fsdp": 8, "expert": 8},
        optim={"learning_rate": 4e-4, "warmup": 2000, "final": 0.1},
        checkpoint={"every": 1000},
    )
