"""Benchmark `grouped`: the backends of the grouped product in an expert MLP, against a dense MLP.

The expert MLP (sort by expert, gather, two grouped products around a GELU, combine) is timed with
each backend, against `dense`, one MLP over the same T*K rows, and against `batched`: a batched
product over equal groups that are in place already. That one moves and pads nothing, and so shows
what E matrices cost whatever the method.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.dispatch import dropless
from emoe_jax.grouped import grouped_matmul, is_dense, resolve_backend
from emoe_jax.layers import gelu, row_product
from emoe_jax.routers import Routing
from train import timing
from train.timing import Row, Step, interleave


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How often is timed.

    Attributes:
        most: timed rounds.
        ragged: of them those that include `ragged_dot` where it is dense (not on TPU).
    """

    most: int
    ragged: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """An expert MLP and its tokens.

    Attributes:
        T: tokens.
        D: width.
        F: hidden width of an expert.
        K: experts a token.
        E: experts.
        dtype: of rows. Weights and gates are float32, as in training; `train.bench peers`, where
            nobody's time is to include a cast of the weights, has weights of it too.
    """

    T: int
    D: int
    F: int
    K: int
    E: int
    dtype: str


def grouped(shapes: list[Shape], loads: list[str], rounds: Rounds) -> list[Row]:
    """Times the grouped product's backends in an expert MLP, for each load and number of experts.

    Args:
        shapes: which differ in E.
        loads: "balanced" (random) and "skewed" (falling as 1/rank), or one of them.
        rounds: how often.

    Returns:
        One row for each load, E and kernel: milliseconds (median, least, most) and ratios to the
        dense MLP, forward alone (`forward_`) and with the gradients of tokens, gates and weights
        (`step_`); seconds to compile; how many rounds were timed.

    Raises:
        ValueError: K is above E.
    """
    for shape in shapes:
        if shape.K > shape.E:
            raise ValueError(
                f"--chosen={shape.K} experts a token needs at least as many in --experts; "
                f"got {shape.E}."
            )
    return [row for load in loads for shape in shapes for row in _rows(load, shape, rounds)]


def _rows(load: str, shape: Shape, turns: Rounds) -> list[Row]:
    arrays_of = operands(shape, load)
    rounds = _rounds(turns)
    calls: dict[tuple[str, str], Step] = {}
    seconds: dict[str, float] = {}
    for kernel in rounds:
        arrays = arrays_of.get(kernel, arrays_of["experts"])
        start = time.perf_counter()
        for part, program in programs(kernel).items():
            calls[kernel, part] = partial(jax.jit(program).lower(*arrays).compile(), *arrays)
        seconds[kernel] = time.perf_counter() - start
    times = interleave(calls, {key: rounds[key[0]] for key in calls})

    rows = []
    for kernel, count in rounds.items():
        row: Row = {"load": load, "E": shape.E, "kernel": kernel, "rounds": count}
        for part in ("forward", "step"):
            row |= timing.against(part, times[kernel, part], times["dense", part])
        rows.append(row | {"compile_s": seconds[kernel]})
    return rows


def _rounds(turns: Rounds) -> dict[str, int]:
    """How many rounds each kernel is timed for: what "auto" takes here, and the others."""
    rounds = dict.fromkeys(("dense", "batched", resolve_backend("auto"), "loops"), turns.most)
    if is_dense("ragged_dot"):
        rounds.setdefault("ragged_dot", min(turns.ragged, turns.most))
    return {kernel: count for kernel, count in rounds.items() if count}


def operands(shape: Shape, load: str) -> dict[str, tuple[jax.Array, ...]]:
    """Arrays for the kernels: K times the tokens for those that do not route."""
    T, D, F, K, E = shape.T, shape.D, shape.F, shape.K, shape.E
    random = np.random.default_rng(0)

    def normal(*sizes: int) -> np.ndarray:
        return random.standard_normal(sizes, np.float32)

    def rows(*sizes: int) -> jax.Array:
        return jnp.asarray(normal(*sizes, D), shape.dtype)

    def matrix(*sizes: int) -> jax.Array:
        return jnp.asarray(normal(*sizes) / np.float32(sizes[-2] ** 0.5))

    share = np.ones(E) if load == "balanced" else 1 / np.arange(1, E + 1)
    # The K largest of log(share) + Gumbel noise: K different experts drawn by their shares.
    scores = np.log(share) + random.gumbel(size=(T, E))
    indices = jnp.asarray(np.argsort(-scores, axis=1)[:, :K], jnp.int32)
    matrices = matrix(E, D, F), matrix(E, F, D)
    return {
        "experts": (rows(T), jnp.full((T, K), 1 / K), *matrices, indices),
        "batched": (rows(E, -(-T * K // E)), *matrices),
        "dense": (rows(T * K), matrix(D, F), matrix(F, D)),
    }


def programs(kernel: str) -> dict[str, Step]:
    """The forward pass, and `step`: it with the gradients of all that is not an index."""
    plain = {"dense": _dense_mlp, "batched": _dense_mlp}
    forward = plain.get(kernel) or partial(_expert_mlp, kernel)
    arguments = (0, 1, 2) if kernel in plain else (0, 1, 2, 3)

    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(*operands)), dtype=jnp.float32)

    return {"forward": forward, "step": jax.value_and_grad(loss, arguments)}


def _dense_mlp(rows: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """[M,D] by [D,F] and [F,D], or the same with a leading E everywhere; exact GELU."""
    product = row_product if w_in.ndim == 2 else jax.vmap(row_product)
    hidden = gelu(product(rows, w_in).astype(rows.dtype))
    return product(hidden, w_out).astype(rows.dtype)


def _expert_mlp(
    kernel: str,
    tokens: jax.Array,
    gates: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
    indices: jax.Array,
) -> jax.Array:
    """The library's own dropless path, with the routing given."""
    T, E = tokens.shape[0], w_in.shape[0]
    none = jnp.zeros((), jnp.float32)
    probs = jnp.zeros((T, E), jnp.float32)
    routing = Routing(indices, gates, probs, none, {}, {})
    groups = dropless.dispatch(tokens, routing, jnp.ones((T,), bool), 1.0)
    hidden = gelu(grouped_matmul(groups.rows, w_in, groups.sizes, backend=kernel))
    return dropless.combine(grouped_matmul(hidden, w_out, groups.sizes, backend=kernel), groups)
