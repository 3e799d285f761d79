"""A pass over held-out data that looks into the expert layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from emoe_jax.basis import prepare_bases
from emoe_jax.config import LMConfig
from emoe_jax.moe import MoE
from train.run import Run

Tree = Any


def observe(
    run: Run,
    params: Tree,
    router: Tree,
    batch: Tree,
    key: jax.Array,
    wrap: Callable[[MoE], nnx.Module],
) -> dict[str, dict[str, jax.Array]]:
    """What wrappers of the expert layers capture of a held-out batch.

    Args:
        run: the run.
        params: of its model.
        router: running state of its routers.
        batch: see `TextData.heldout_batches` and `VisionData.heldout_batches`; rows of images that
            are not scored are no tokens.
        key: random key of the routers.
        wrap: takes a layer and returns what is called in its place, with the same arguments, and
            fills `Aux.captured`.

    Returns:
        What was captured by place in the period, with a leading axis over the repeats.
    """
    config = run.config.model
    model = run.model.bind(prepare_bases(params, config.moe.basis.method), router)
    for group in model.blocks.groups:
        if group.experts:
            group.moe = wrap(group.moe)
    if isinstance(config, LMConfig):
        context = {name: batch[name] for name in ("positions", "segments", "rows")}
        _, aux = model.features(batch["tokens"], key=key, **context)
    else:
        _, aux = model(batch["images"], mask=batch["scored"], rows=batch["rows"], key=key)
    return {place: layer.captured for place, layer in aux.items() if layer.captured is not None}
