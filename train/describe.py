"""What a run says of itself before it begins."""

from __future__ import annotations

import logging
from typing import Any

import jax
from jax.sharding import Mesh

from emoe_jax.config import LMConfig, MoEConfig, ViTConfig, moe_layers
from emoe_jax.dispatch.exchange import choose_exchange
from emoe_jax.grouped import is_dense, resolve_backend
from emoe_jax.optim import partition
from train.data.text import TextData
from train.flops import active_parameters
from train.run import Run

Tree = Any

LOGGER = logging.getLogger(__name__)


def describe(run: Run) -> None:
    """Logs the model's size, the mesh, and the kernel of the experts' products."""
    params = run.abstract["params"]
    trained, frozen = partition(params, run.config.optim.trainable)
    processes = jax.process_count()
    LOGGER.info(
        "%s parameters%s, %s active per token; mesh %s of %s%s; %s",
        f"{count_parameters(params):,}",
        f", {count_parameters(trained):,} of them trained" if frozen else "",
        f"{active_parameters(run.config.model, params):,}",
        dict(run.mesh.shape),
        jax.devices()[0].device_kind,
        f" in {processes} processes" if processes > 1 else "",
        _routing(run.config.model, run.mesh),
    )
    if run.config.data.shards % processes:
        LOGGER.info(
            "data.shards=%d is no multiple of the %d processes: some parts of the data are read by"
            " several of them",
            run.config.data.shards,
            processes,
        )
    data = run.data
    epoch = data.train_targets if isinstance(data, TextData) else data.train_images
    passes = run.config.steps * run.units_per_step / max(epoch, 1)
    if epoch:
        LOGGER.info("%s training %s; %.2f passes over them", f"{epoch:,}", run.unit, passes)


def count_parameters(params: Tree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _routing(model: LMConfig | ViTConfig, mesh: Mesh) -> str:
    """How tokens come to experts, if there are any."""
    if not any(moe_layers(model)):
        return "no experts"
    moe = model.moe
    kernel = _kernel(moe.dispatch, mesh)
    return f"{moe.router} router, {moe.dispatch} dispatch{kernel}{_way(moe, mesh)}"


def _way(moe: MoEConfig, mesh: Mesh) -> str:
    """How tokens travel between devices, if they do."""
    X = mesh.shape["expert"]
    exchanges = X > 1 and moe.dispatch != "dense"
    return f", {choose_exchange(moe)} over {X} devices" if exchanges else ""


def _kernel(dispatch: str, mesh: Mesh) -> str:
    """The kernel of the grouped products, and a warning where it may do E times the work."""
    # Equal groups on one device, and the oracle everywhere, are batched products.
    if dispatch == "dense" or (dispatch == "capacity" and mesh.size == 1):
        return ""
    kernel = resolve_backend("auto")
    warning = ", which XLA may lower to E times the arithmetic: time it" if is_dense(kernel) else ""
    return f" by {kernel}{warning}"
