"""How different the experts of a model are, measured on held-out data.

Two measures. The similarity of outputs (PES of arXiv 2506.14038) compares what all experts say
about the same tokens. It hardly tells a trained model from an untrained one: the outputs of drawn
matrices are nearly orthogonal already. The cost of a swap does: it is what the loss grows by if
every expert does the work of its neighbour, and that is nothing until experts have become
different in what they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from emoe_jax.config import require
from emoe_jax.experts import apply_experts
from emoe_jax.models.stack import layer_names
from emoe_jax.moe import Aux, MoE
from emoe_jax.sharding import in_mesh, replicated
from train import cluster
from train.evaluate import Evaluator, heldout
from train.observe import observe
from train.run import Run

Array = jax.Array
Tree = Any
Program = Callable[[Tree, Tree, Tree, Array], Tree]

SAMPLE = 512
"""Tokens of each held-out batch, at most, to which all experts of a layer are applied."""

NO_DIRECTION = 1e-12
"""Outputs that are shorter count as zero: their cosine with any other is 0."""


class _Recorder(nnx.Module):
    """An expert layer that tells what goes into it, whatever its router can tell of itself.

    `Aux.captured` becomes `input` [B,S,D] and `mask` [B,S].
    """

    def __init__(self, moe: MoE) -> None:
        self.moe = moe

    def __call__(
        self, tokens: Array, *, mask: Array | None = None, **context: Any
    ) -> tuple[Array, Aux]:
        out, aux = self.moe(tokens, mask=mask, **context)
        real = jnp.ones(tokens.shape[:2], bool) if mask is None else mask
        return out, aux._replace(captured={"input": tokens, "mask": real})


def compile_similarity(run: Run) -> Program:
    """The program of `expert_similarity`, compiled for the held-out batches of a run.

    Returns:
        (params, router, batch, key) to, by place in the period, `cosines` [repeats,E,E], sums over
        the sampled tokens, and `tokens` [repeats], their number.
    """
    batch = run.abstract_batch(next(heldout(run)), run.eval_batch)
    inputs = run.abstract["params"], run.abstract["router"], batch, jax.eval_shape(run.key)
    step = in_mesh(run.mesh, lambda *given: _cosine_sums(run, *given))
    lowered = jax.jit(step, out_shardings=replicated(run.mesh)).lower(*inputs)
    program: Program = cluster.compile_together(lowered)
    return program


def expert_similarity(
    run: Run, state: Tree, *, batches: int = 4, program: Program | None = None
) -> dict[str, np.ndarray]:
    """Cosine between the outputs of every pair of experts on the same token, mean over tokens.

    Every expert is applied to the same tokens, those that go into its layer: of each of the first
    `batches` held-out batches `SAMPLE` tokens that are no padding, evenly spaced among them in the
    order of the batch, or all where there are fewer.

    Args:
        run: the run.
        state: holds `params` and `router`.
        batches: how many held-out batches are read.
        program: from `compile_similarity`, where it is used more than once.

    Returns:
        For each expert layer by name [E,E] float64, symmetric.

    Raises:
        ValueError: `batches` is below one.
    """
    require(batches >= 1, f"batches={batches} must be at least 1")
    program = program or compile_similarity(run)
    total: Any = None
    for batch in islice(heldout(run), batches):
        placed = run.to_devices(batch, run.eval_batch)
        part = jax.device_get(program(state["params"], state["router"], placed, run.key()))
        part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
        total = part if total is None else jax.tree.map(np.add, total, part)
    named = {}
    for place, names in layer_names(run.config.model).items():
        for repeat, name in enumerate(names):
            sums, tokens = total[place]["cosines"][repeat], total[place]["tokens"][repeat]
            named[name] = sums / max(tokens, 1.0)
    return dict(sorted(named.items()))


def mean_similarity(matrix: np.ndarray) -> float:
    """Mean over the pairs of different experts of a matrix [E,E]; NaN for one expert."""
    E = matrix.shape[0]
    if E < 2:
        return math.nan
    return float((matrix.sum() - np.trace(matrix)) / (E * (E - 1)))


def swap_cost(run: Run, evaluator: Evaluator, state: Tree, *, batches: int = 16) -> float:
    """Nats per target or image by which the held-out loss grows if experts change places.

    In every layer the weights of expert k take the place of those of expert k+1, and the last's of
    the first; routers and gates stay. About zero where experts are interchangeable, as untrained
    ones are (the sign is then chance), and positive where each does what its tokens need.

    Args:
        run: the run.
        evaluator: from `evaluate.compile_evaluate`.
        state: holds `params` and `router`.
        batches: how many held-out batches are scored, from the first on, the same ones with and
            without the swap; all where there are fewer.

    Raises:
        ValueError: `batches` is below one.
    """
    require(batches >= 1, f"batches={batches} must be at least 1")
    rolled = {"params": roll_experts(state["params"]), "router": state["router"]}
    return _loss(run, evaluator, rolled, batches) - _loss(run, evaluator, state, batches)


def _loss(run: Run, evaluator: Evaluator, state: Tree, batches: int) -> float:
    """Nats per target or image of the first held-out batches."""
    nats = count = 0.0
    for batch in islice(heldout(run), batches):
        placed = run.to_devices(batch, run.eval_batch)
        sums = evaluator.step(state["params"], state["router"], placed, run.key())["sums"]
        nats, count = nats + float(sums["loss"]), count + float(sums["count"])
    return nats / count


def roll_experts(params: Tree) -> Tree:
    """Parameters with the experts of every layer rolled by one; shardings are kept."""

    def roll(path: tuple[str, ...], leaf: Array) -> Array:
        if "experts" not in path:
            return leaf
        # [repeats,E,...]: what stood at k stands at k+1.
        return jax.device_put(jnp.roll(leaf, 1, axis=1), leaf.sharding)

    leaves = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: roll(path, leaf) for path, leaf in leaves.items()})


def _cosine_sums(run: Run, params: Tree, router: Tree, batch: Tree, key: Array) -> Tree:
    config = run.config.model
    captured = observe(run, params, router, batch, key, _Recorder)
    sums = {}
    for place, seen in captured.items():
        weights = params["blocks"]["groups"][place]["moe"]["experts"]
        weights = {name: leaf.astype(config.dtype) for name, leaf in weights.items()}
        given = (weights, seen["input"], seen["mask"])
        sums[place] = jax.lax.map(lambda one: _layer_sums(*one), given)
    return sums


def _layer_sums(weights: dict[str, Array], tokens: Array, mask: Array) -> dict[str, Array]:
    """Sums over sampled tokens of one layer: weights [E,...], tokens [B,S,D], mask [B,S]."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    positions, counted = sample_positions(mask.reshape(-1), SAMPLE)
    E, n = weights["w_up"].shape[0], positions.shape[0]
    rows = flat[positions].astype(weights["w_up"].dtype)
    rows = jnp.broadcast_to(rows[None], (E, *rows.shape))
    outputs = apply_experts(weights, rows, jnp.full((E,), n, jnp.int32)).astype(jnp.float32)
    length = jnp.linalg.norm(outputs, axis=-1, keepdims=True)
    units = jnp.where(length > NO_DIRECTION, outputs / jnp.maximum(length, NO_DIRECTION), 0.0)
    units = jnp.where(counted[None, :, None], units, 0.0)
    cosines = jnp.einsum("end,fnd->ef", units, units, precision=jax.lax.Precision.HIGHEST)
    return {"cosines": cosines, "tokens": jnp.sum(counted, dtype=jnp.float32)}


def sample_positions(real: Array, most: int) -> tuple[Array, Array]:
    """Evenly spaced positions among those that are real, every one where there are few.

    Args:
        real: [T] bool.
        most: how many positions are wanted.

    Returns:
        Positions [n] int32 for n = min(most, T), and whether each counts: no position twice.
    """
    n = min(most, real.shape[0])
    order = jnp.argsort(~real, stable=True).astype(jnp.int32)  # the real ones first, in order
    count = jnp.sum(real, dtype=jnp.int32)
    turn = jnp.arange(n, dtype=jnp.int32)
    # turn * count / n, without a product that could leave int32.
    ranks = turn * (count // n) + turn * (count % n) // n
    fresh = jnp.concatenate([jnp.ones((1,), bool), ranks[1:] != ranks[:-1]])
    return order[ranks], fresh & (count > 0)
