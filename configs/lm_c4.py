"""Language models of pod size on C4; by default 16 blocks, 64 experts, top-8.

About 6.9 billion parameters, 1.2 billion of them active per token (the shape of OLMoE,
arXiv 2409.02060). Data: tensorflow-datasets `c4/en`. Hardware: a TPU v5p-128, 16 hosts of 4 chips,
see launch/tpu_pod.sh and launch/gke_jobset.yaml. Time and result: not run.

    python -m train --config=configs/lm_c4.py --workdir=/mnt/share/runs/lm_c4

A size behind a colon, as in --config=configs/lm_c4.py:30b, is another shape: those of `SIZES`. They
are there to be planned (docs/planning.md); none of them has been trained.
"""

from typing import Any

from ml_collections import ConfigDict

from train.config import experiment

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # 1.0 billion parameters: narrow, 32 small experts.
    "1b": (
        {"width": 1024, "depth": 16, "heads": 8, "kv_heads": 8},
        {"experts": 32, "top_k": 4, "hidden": 512},
    ),
    "7b": (
        {"width": 2048, "depth": 16, "heads": 16, "kv_heads": 16},
        {"experts": 64, "top_k": 8, "hidden": 1024},
    ),
    # 30 billion: Mixtral's blocks (arXiv 2401.04088), 20 of them.
    "30b": (
        {"width": 4096, "depth": 20, "heads": 32, "kv_heads": 8},
        {"experts": 8, "top_k": 2, "hidden": 14336},
    ),
    # 47 billion: Mixtral 8x7B.
    "mixtral": (
        {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 8},
        {"experts": 8, "top_k": 2, "hidden": 14336},
    ),
    # 405 billion: the widths and experts of DeepSeek-V3 (arXiv 2412.19437) in 35 blocks, with plain
    # attention of 56 heads in place of its latent one.
    "400b": (
        {"width": 7168, "depth": 35, "heads": 56, "kv_heads": 56},
        {"experts": 256, "top_k": 8, "hidden": 2048, "shared_hidden": 2048},
    ),
}


def get_config(size: str = "7b") -> ConfigDict:
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    model, moe = SIZES[size]
    return experiment(
        "lm",
        steps=500_000,
        batch=1024,
        log_every=50,
        eval_every=5000,
        model=model | {"tie_head": False, "remat": "dots", "loss_chunk": 2048, "dtype": "bfloat16"},
        # Published and used at such sizes; of ours none has been measured there.
        moe=moe | {"router": "loss_free", "routing": {"renormalize": True}},
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
