"""One training step and one evaluation step: pure functions of state and batch.

The training state is a nested dict of arrays: `step` [], `params`, `router` (running state of the
routers) and `opt` (the optimizer's state as nested dicts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization
from jax.sharding import Mesh

from emoe_jax.basis import prepare_bases
from emoe_jax.losses import cross_entropy
from emoe_jax.metrics import routing_metrics
from emoe_jax.models.stack import update_router_state
from emoe_jax.moe import Aux, auxiliary_loss
from emoe_jax.optim import global_norm, merge, partition, schedule
from emoe_jax.pure import Pure
from emoe_jax.sharding import in_mesh
from train.config import ExperimentConfig

Array = jax.Array
Tree = Any
Batch = dict[str, Array]
Sums = dict[str, Array]


class Steps(NamedTuple):
    """The functions of a run, not yet compiled.

    Attributes:
        train: (state, batch, key) to (state, metrics).
        evaluate: (params, router, batch, key) to sums over the batch.
    """

    train: Callable[[Tree, Batch, Array], tuple[Tree, Tree]]
    evaluate: Callable[[Tree, Tree, Batch, Array], Tree]


def make_steps(
    config: ExperimentConfig,
    mesh: Mesh,
    pure: Pure,
    optimizer: optax.GradientTransformation,
    opt_state: Any,
) -> Steps:
    """The steps of an experiment.

    Args:
        config: the experiment.
        mesh: the devices; experts exchange tokens over its axis `expert`.
        pure: the model without its arrays.
        optimizer: the optimizer.
        opt_state: its abstract state for the trained parameters, whose structure the dicts of the
            training state fill.
    """
    forward = _forward_lm if config.task == "lm" else _forward_vit
    method = config.model.moe.basis.method
    learning_rate = schedule(config.optim, config.steps)

    def objective(
        params: Tree, router: Tree, batch: Batch, key: Array, total: Array
    ) -> tuple[Array, tuple[Sums, dict[str, Aux]]]:
        sums, aux = forward(pure.bind(params, router), batch, key)
        penalty = auxiliary_loss(aux)
        loss = sums["loss"] / total + penalty / config.accumulate
        return loss, (sums | {"penalty": penalty / config.accumulate}, aux)

    def train_step(state: Tree, batch: Batch, key: Array) -> tuple[Tree, Tree]:
        key = jax.random.fold_in(key, state["step"])
        total = jnp.maximum(jnp.sum(_weights(batch)), 1.0)
        trained, frozen = partition(state["params"], config.optim.trainable)
        # Bases are factorised once, outside the microbatches, and so are their gradients.
        prepared, pull_back = jax.vjp(lambda tree: prepare_bases(tree, method), trained)
        fixed = prepare_bases(frozen, method)

        def loss(params: Tree, *rest: Any) -> tuple[Array, tuple[Sums, dict[str, Aux]]]:
            return objective(merge(params, fixed), *rest)

        grads, sums, aux = _accumulate(
            jax.grad(loss, has_aux=True),
            prepared,
            state["router"],
            microbatches(batch, config.accumulate),
            key,
            total,
        )
        (grads,) = pull_back(grads)
        opt = serialization.from_state_dict(opt_state, state["opt"])
        updates, opt = optimizer.update(grads, opt, trained)
        new = {
            "step": state["step"] + 1,
            "params": merge(optax.apply_updates(trained, updates), frozen),
            "router": update_router_state(config.model.moe, state["router"], aux),
            "opt": serialization.to_state_dict(opt),
        }
        metrics = {
            "loss": sums["loss"] / total,
            "penalty": sums["penalty"],
            "grad_norm": global_norm(grads),
            "learning_rate": learning_rate(state["step"]),
            "router": layer_metrics(aux, config.accumulate),
        }
        if "correct" in sums:
            metrics["accuracy"] = sums["correct"] / total
        return new, metrics

    def evaluate_step(params: Tree, router: Tree, batch: Batch, key: Array) -> Tree:
        model = pure.bind(prepare_bases(params, method), router)
        sums, aux = forward(model, batch, key)
        return {"sums": sums | {"count": jnp.sum(_weights(batch))}, "aux": aux}

    return Steps(in_mesh(mesh, train_step), in_mesh(mesh, evaluate_step))


def _weights(batch: Batch) -> Array:
    """Which targets count, float32: those scored in evaluation, all that are no padding else."""
    if "scored" in batch:
        return batch["scored"].astype(jnp.float32)
    if "segments" in batch:
        return (batch["segments"] > 0).astype(jnp.float32)
    return jnp.ones(batch["labels"].shape[:1], jnp.float32)


def _forward_lm(model: Any, batch: Batch, key: Array) -> tuple[Sums, dict[str, Aux]]:
    """Sum of negative log-likelihoods in nats."""
    nll, aux = model.nll(batch, _weights(batch), key)
    return {"loss": nll}, aux


def _forward_vit(model: Any, batch: Batch, key: Array) -> tuple[Sums, dict[str, Aux]]:
    """Sums of cross-entropies and of right answers."""
    logits, aux = model(batch["images"], mask=_mask(batch), rows=batch["rows"], key=key)
    weights = _weights(batch)
    right = jnp.argmax(logits, axis=-1) == jnp.argmax(batch["labels"], axis=-1)
    sums = {
        "loss": jnp.sum(weights * cross_entropy(logits, batch["labels"])),
        "correct": jnp.sum(weights * right),
    }
    return sums, aux


def _mask(batch: Batch) -> Array | None:
    """Images that pad the last batch of an evaluation are no tokens to any router."""
    return batch.get("scored")


def microbatches(batch: Batch, parts: int) -> Batch:
    """Folds [B,...] to [parts, B/parts, ...]; part i takes rows i, i + parts, and so on.

    Strided, not in blocks, so that each device's rows of every part are rows that it holds already.
    """

    def fold(leaf: Array) -> Array:
        return jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(fold, batch)


def _accumulate(
    gradient: Callable[..., Any],
    params: Tree,
    router: Tree,
    batches: Batch,
    key: Array,
    total: Array,
) -> Any:
    """Sums gradients, losses and statistics over microbatches."""

    def one(batch: Batch) -> Any:
        grads, (sums, aux) = gradient(params, router, batch, key, total)
        return grads, sums, aux

    first = jax.tree.map(lambda leaf: leaf[0], batches)
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        return one(first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first))

    def add(carry: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one(batch)), None

    return jax.lax.scan(add, zeros, batches)[0]


def layer_metrics(aux: dict[str, Aux], parts: int | Array) -> dict[str, dict[str, Array]]:
    """Routing metrics by place in the period, each with a leading axis over the repeats.

    Args:
        aux: summed over `parts` microbatches or batches.
        parts: how many; metrics that do not add up are averaged over them.
    """
    return {
        place: routing_metrics(layer.stats) | jax.tree.map(lambda leaf: leaf / parts, layer.metrics)
        for place, layer in aux.items()
    }
