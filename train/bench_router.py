"""Benchmark `router`: what routing costs, and what its layer costs against a dense MLP.

A layer's part here is forward and backward, and what its router needs besides at each step. The
router's part is everything that an expert layer of fixed routes would not do: scores, top-k and
gates, their gradients, the statistics, the update of the running state, and the factorisation of
bases before and after the step. It is timed alone, and as a share of the time of the whole layer in
the same rounds. `dense` is one GELU MLP of hidden width K·F over the T tokens, which has the
multiply-adds of K experts of width F.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax import pure
from emoe_jax.basis import map_bases, orthonormalize, prepare_bases
from emoe_jax.config import BASIS_ROUTERS, BasisConfig, MoEConfig
from emoe_jax.layers import MLP
from emoe_jax.moe import MoE
from emoe_jax.routers import Context, make_router, router_class
from train.timing import Row, Step, against, interleave, milliseconds

Array = jax.Array
Tree = Any

RATE = 1e-3
"""Of the plain gradient step of the router's weights that stands for the optimizer."""


def routers(
    names: list[str], experts: list[int], shape: dict[str, int], dtype: str, repeats: int
) -> list[Row]:
    """Times routers and their layers, all routers of one E in turn.

    Args:
        names: of the routers.
        experts: the values of E.
        shape: T, D, F, K and R.
        dtype: compute dtype of the experts; routers compute in float32.
        repeats: timed rounds.

    Returns:
        For each E a row for each router: milliseconds (median, least, most) of the layer (`layer_`)
        and of the router alone (`router_`), `layer_ratio`, the median over rounds of the layer's
        ratio to the dense MLP, and `share`, that of the router's to the layer. The first row is the
        dense MLP's.

    Raises:
        ValueError: a router or a number does not fit.
    """
    rows = []
    for E in experts:
        configs = {name: _config(name, E, shape) for name in names}
        programs = {
            (name, part): program
            for name, config in configs.items()
            for part, program in _programs(config, shape["T"], shape["D"], dtype).items()
        }
        programs["dense", "layer"] = _dense(shape, dtype)
        times = interleave(programs, dict.fromkeys(programs, repeats))
        base = times["dense", "layer"]
        rows.append({"router": "(dense)", "E": E, "R": "", "rounds": repeats})
        rows[-1] |= against("layer", base, base)
        rows += [_row(config, shape["D"], repeats, times) for config in configs.values()]
    return rows


def _config(name: str, E: int, shape: dict[str, int]) -> MoEConfig:
    return MoEConfig(
        router=name,
        experts=E,
        top_k=shape["K"],
        hidden=shape["F"],
        activation="gelu",
        basis=BasisConfig(rank=shape["R"]),
    )


def _row(config: MoEConfig, D: int, repeats: int, times: dict[Any, list[float]]) -> Row:
    name = config.router
    layer, router = times[name, "layer"], times[name, "router"]
    shares = sorted(part / whole for part, whole in zip(router, layer, strict=True))
    R = config.basis.rank_of(D) if name in BASIS_ROUTERS else ""
    row: Row = {"router": name, "E": config.experts, "R": R, "rounds": repeats}
    row |= against("layer", layer, times["dense", "layer"]) | milliseconds("router", router)
    return row | {
        "share": shares[len(shares) // 2],
        "share_min": shares[0],
        "share_max": shares[-1],
    }


def _dense(shape: dict[str, int], dtype: str) -> Step:
    """Forward and backward of the dense MLP, compiled."""
    T, D, hidden = shape["T"], shape["D"], shape["K"] * shape["F"]
    # Not [1,T,D]: with two axes to sum over XLA on CPU takes twice as long for the gradients.
    tokens = jax.random.normal(jax.random.key(0), (T, D), jnp.float32)
    graph, params, _ = pure.split(MLP(D, hidden, "gelu", dtype, rngs=nnx.Rngs(0)))

    def loss(params: Tree, tokens: Array) -> Array:
        return jnp.sum(jnp.square(graph.bind(params, {})(tokens)), dtype=jnp.float32)

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return partial(step.lower(params, tokens).compile(), params, tokens)


def _programs(config: MoEConfig, T: int, D: int, dtype: str) -> dict[str, Step]:
    """A pass of the layer, and of its router alone, forward and backward, compiled."""
    tokens = jax.random.normal(jax.random.key(0), (1, T, D), jnp.float32)
    mask = jnp.ones((1, T), bool)

    def route(router: Any, tokens: Array) -> Any:
        routing = router(tokens.reshape(T, D), Context(mask))
        return routing.weights, routing.aux_loss, routing.stats

    def whole(layer: Any, tokens: Array) -> Any:
        out, aux = layer(tokens)
        return out, aux.loss, aux.stats

    layer = MoE(config, D, dtype=dtype, rngs=nnx.Rngs(0))
    router = make_router(config, D, rngs=nnx.Rngs(0))
    return {
        "layer": _step(config, layer, whole, tokens, lambda tree: tree.get("router", {})),
        "router": _step(config, router, route, tokens, lambda tree: tree),
    }


def _step(config: MoEConfig, module: Any, call: Any, tokens: Array, own: Any) -> Step:
    """Forward and backward of a module, and its router's step, compiled for its arrays.

    Args:
        config: of the layer.
        module: the layer, or its router.
        call: (module, tokens) to what the loss is of, an auxiliary loss and statistics.
        tokens: [1,T,D].
        own: the router's part of a tree of the module.
    """
    graph, params, state = pure.split(module)
    method, update = config.basis.method, router_class(config.router).update

    def loss(params: Tree, tokens: Array) -> tuple[Array, Tree]:
        out, penalty, stats = call(graph.bind(prepare_bases(params, method), state), tokens)
        return jnp.sum(jnp.square(out), dtype=jnp.float32) + penalty, stats

    def step(params: Tree, tokens: Array) -> Tree:
        (grads, towards), stats = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, tokens)
        moved = jax.tree.map(lambda leaf, grad: leaf - RATE * grad, own(params), own(grads))
        moved = map_bases(lambda weight: orthonormalize(weight, method), moved)
        return grads, moved, towards, update(config, own(state), stats, jnp.ones(()))

    return partial(jax.jit(step).lower(params, tokens).compile(), params, tokens)
