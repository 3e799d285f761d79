"""Benchmark `router`: what routing costs, as a share of a training step of the layer.

The router's part is everything that an expert layer of fixed routes would not do: scores, top-k and
gates, their gradients, the statistics, the update of the running state, and the factorisation of
bases before and after the step. It is timed alone, and as a share of the time of the whole layer in
the same rounds.
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
from emoe_jax.moe import MoE
from emoe_jax.routers import Context, make_router, router_class
from train.timing import Row, Step, interleave, milliseconds

Array = jax.Array
Tree = Any

RATE = 1e-3
"""Of the plain gradient step that stands for the optimizer."""


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
        One row for each router and E: milliseconds (median, least, most) of a training step of the
        layer (`layer_`) and of the router alone (`router_`), and `share`, the median over rounds of
        their ratio.

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
        times = interleave(programs, dict.fromkeys(programs, repeats))
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
    row |= milliseconds("layer", layer) | milliseconds("router", router)
    return row | {
        "share": shares[len(shares) // 2],
        "share_min": shares[0],
        "share_max": shares[-1],
    }


def _programs(config: MoEConfig, T: int, D: int, dtype: str) -> dict[str, Step]:
    """A training step of the layer, and of its router alone, compiled."""
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
        "layer": _step(config, layer, whole, tokens, lambda state: state.get("router", {})),
        "router": _step(config, router, route, tokens, lambda state: state),
    }


def _step(config: MoEConfig, module: Any, call: Any, tokens: Array, own: Any) -> Step:
    """One training step of a module, compiled for its arrays.

    Args:
        config: of the layer.
        module: the layer, or its router.
        call: (module, tokens) to what the loss is of, an auxiliary loss and statistics.
        tokens: [1,T,D].
        own: the router's part of the module's running state.
    """
    graph, params, state = pure.split(module)
    method, update = config.basis.method, router_class(config.router).update

    def loss(params: Tree, tokens: Array) -> tuple[Array, Tree]:
        out, penalty, stats = call(graph.bind(prepare_bases(params, method), state), tokens)
        return jnp.sum(jnp.square(out), dtype=jnp.float32) + penalty, stats

    def step(params: Tree, tokens: Array) -> Tree:
        (grads, towards), stats = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, tokens)
        moved = jax.tree.map(lambda leaf, grad: leaf - RATE * grad, params, grads)
        moved = map_bases(lambda weight: orthonormalize(weight, method), moved)
        return moved, towards, update(config, own(state), stats, jnp.ones(()))

    return partial(jax.jit(step).lower(params, tokens).compile(), params, tokens)
