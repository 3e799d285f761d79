"""One training step and one evaluation step: pure functions of state and batch.

The training state is a nested dict of arrays: `step` [], `params`, `router` (running state of the
routers) and `opt` (the optimizer's state as nested dicts).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization
from jax.sharding import Mesh

from emoe_jax.basis import is_basis, prepare_bases
from emoe_jax.config import LMConfig, ViTConfig, moe_layers
from emoe_jax.losses import cross_entropy
from emoe_jax.metrics import routing_metrics
from emoe_jax.models.stack import idle_places, update_router_state
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
        train: (state, batch, key) to (state, metrics); `metrics["router"]` leaves out
            `idle_places`, and the orthonormality error of bases that are running state.
        calibrate: (params, router, batch, key, progress) to the routers' next state: a forward pass
            for which nothing is trained; progress as of `Router.update`.
        evaluate: (params, router, batch, key) to sums over the batch.
    """

    train: Callable[[Tree, Batch, Array], tuple[Tree, Tree]]
    calibrate: Callable[[Tree, Tree, Batch, Array, Array], Tree]
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
    forward = _forward(config)
    method = config.model.moe.basis.method
    learning_rate = schedule(config.optim, config.steps)
    idle = idle_places(config.model)

    def train_step(state: Tree, batch: Batch, key: Array) -> tuple[Tree, Tree]:
        key = jax.random.fold_in(key, state["step"])
        total = jnp.maximum(jnp.sum(_weights(batch)), 1.0)
        trained, frozen = partition(state["params"], config.optim.trainable)
        grads, sums, aux = _gradients(
            config, pure, trained, frozen, state["router"], batch, key, total
        )
        progress = state["step"].astype(jnp.float32) / config.steps
        before = serialization.from_state_dict(opt_state, state["opt"])
        updates, after = optimizer.update(grads, before, trained)
        new = {
            "params": optax.apply_updates(trained, updates),
            "router": update_router_state(config.model.moe, state["router"], aux, progress),
            "opt": serialization.to_state_dict(after),
        }
        norm = global_norm(grads)
        good = all_finite((sums, norm, _of_bases(updates), new["router"]))
        new = _chosen(good, new, {name: state[name] for name in new} | {"params": trained})
        new["params"] = merge(new["params"], frozen)  # these go through as they are
        metrics = _task_metrics(sums, total) | {
            "grad_norm": norm,
            "learning_rate": learning_rate(_updates_made(before)),
            "skipped": jnp.where(good, 0.0, 1.0),
            # To measure a layer that nothing depends on would be the one reason to compute it.
            "router": _without_state_checks(
                layer_metrics(
                    {place: layer for place, layer in aux.items() if place not in idle},
                    config.accumulate,
                ),
                state["router"],
            ),
        }
        return new | {"step": state["step"] + 1}, metrics

    def calibrate_step(
        params: Tree, router: Tree, batch: Batch, key: Array, progress: Array
    ) -> Tree:
        model = pure.bind(prepare_bases(params, method), router)
        parts = microbatches(batch, config.accumulate)
        aux = _sum_over(lambda part: forward(model, part, key)[1], parts)
        return update_router_state(config.model.moe, router, aux, progress)

    def evaluate_step(params: Tree, router: Tree, batch: Batch, key: Array) -> Tree:
        model = pure.bind(prepare_bases(params, method), router)
        sums, aux = forward(model, batch, key)
        return {"sums": sums | {"count": jnp.sum(_weights(batch))}, "aux": aux}

    return Steps(*(in_mesh(mesh, step) for step in (train_step, calibrate_step, evaluate_step)))


def compiler_options(
    model: LMConfig | ViTConfig, platform: str, devices: int
) -> dict[str, str | bool]:
    """What XLA is asked for beyond its defaults, for `jax.stages.Lowered.compile`.

    libtpu runs an all-to-all to its end where it stands; chunks of an exchange can run beside each
    other's products only if it begins one and waits for it later. That it then does is up to its
    scheduler: 0.0.52 does (docs/performance.md).

    Args:
        model: of the experiment.
        platform: compiled for.
        devices: on the mesh axis `expert`.
    """
    chunks = model.moe.exchange_chunks if any(moe_layers(model)) and devices > 1 else 1
    if platform != "tpu" or chunks == 1:
        return {}
    return {
        "xla_tpu_enable_async_all_to_all": True,
        "xla_tpu_enable_async_ragged_all_to_all": True,
    }


def _gradients(
    config: ExperimentConfig,
    pure: Pure,
    trained: Tree,
    frozen: Tree,
    router: Tree,
    batch: Batch,
    key: Array,
    total: Array,
) -> tuple[Tree, Sums, dict[str, Aux]]:
    """Gradients of the trained parameters; sums and statistics, all over the microbatches."""
    method = config.model.moe.basis.method
    # Bases are factorised once, outside the microbatches, and so are their gradients.
    prepared, pull_back = jax.vjp(lambda tree: prepare_bases(tree, method), trained)
    fixed = prepare_bases(frozen, method)

    def loss(params: Tree, *rest: Any) -> tuple[Array, tuple[Sums, dict[str, Aux]]]:
        return _objective(config, pure, merge(params, fixed), *rest)

    gradient = jax.grad(loss, has_aux=True)

    def one(part: Batch) -> tuple[Tree, Sums, dict[str, Aux]]:
        grads, (sums, aux) = gradient(prepared, router, part, key, total)
        return grads, sums, aux

    grads, sums, aux = _sum_over(one, microbatches(batch, config.accumulate))
    (grads,) = pull_back(grads)
    return grads, sums, aux


def _objective(
    config: ExperimentConfig,
    pure: Pure,
    params: Tree,
    router: Tree,
    batch: Batch,
    key: Array,
    total: Array,
) -> tuple[Array, tuple[Sums, dict[str, Aux]]]:
    """A microbatch's part of the loss, a mean over `total` targets; its sums and statistics."""
    sums, aux = _forward(config)(pure.bind(params, router), batch, key)
    penalty = auxiliary_loss(aux) / config.accumulate
    return sums["loss"] / total + penalty, (sums | {"penalty": penalty}, aux)


def all_finite(tree: Tree) -> Array:
    """Whether no number of a tree is NaN or infinite: a bool []."""
    each = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, each, jnp.ones((), bool))


def _of_bases(updates: Tree) -> list[Array]:
    """The updates that may be infinite though the gradients are finite: a basis is retracted."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if is_basis(path)]


def _chosen(good: Array, new: Tree, old: Tree) -> Tree:
    """The new state where a step is good, the old one, to the bit, where it is not."""
    return jax.tree.map(lambda after, before: jnp.where(good, after, before), new, old)


def _updates_made(opt: Any) -> Array:
    """The optimizer's own count of steps, by which it reads its schedule: skipped ones are out."""
    count: Array = optax.tree_utils.tree_get_all_with_path(opt, "count")[0][1]
    return count


def _task_metrics(sums: Sums, total: Array) -> dict[str, Array]:
    """Means over the targets of an optimizer step."""
    metrics = {"loss": sums["loss"] / total, "penalty": sums["penalty"]}
    return metrics | ({"accuracy": sums["correct"] / total} if "correct" in sums else {})


def _weights(batch: Batch) -> Array:
    """Which targets count, float32: those scored in evaluation, all that are no padding else."""
    if "scored" in batch:
        return batch["scored"].astype(jnp.float32)
    if "segments" in batch:
        return (batch["segments"] > 0).astype(jnp.float32)
    return jnp.ones(batch["labels"].shape[:1], jnp.float32)


def _forward(config: ExperimentConfig) -> Callable[..., tuple[Sums, dict[str, Aux]]]:
    """The pass over a batch: (model, batch, key) to sums over it and what expert layers tell."""
    return _forward_lm if config.task == "lm" else _forward_vit


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


def _sum_over(one: Callable[[Batch], Any], batches: Batch) -> Any:
    """Sums what `one` returns over microbatches, one after another."""
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        return one(first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first))

    def add(carry: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one(batch)), None

    return jax.lax.scan(add, zeros, batches)[0]


def routers_of(tree: Tree) -> dict[str, Tree]:
    """The routers' part of parameters or running state, by place in the period."""
    groups = tree.get("blocks", {}).get("groups", {})
    return {
        place: group["moe"]["router"]
        for place, group in groups.items()
        if "router" in group.get("moe", {})
    }


def _without_state_checks(
    metrics: dict[str, dict[str, Array]], router: Tree
) -> dict[str, dict[str, Array]]:
    """Routing metrics without the check of bases that are running state.

    It would take half a percent of a small step: whoever logs a step reads it off the state
    (`telemetry.Meter`). The compiler leaves out what nobody asks for.
    """
    kept = {place for place, state in routers_of(router).items() if "basis" in state}
    return {
        place: {k: v for k, v in layer.items() if k != "orthonormality_error" or place not in kept}
        for place, layer in metrics.items()
    }


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
