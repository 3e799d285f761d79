"""The step of a layer on a mesh beside that of the dense layer on one device, and loads for both.

A load is data: tokens, router weights, ids and a mask of one shape. A compiled step takes them all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from emoe_jax import BasisConfig, MoE, MoEConfig, RouterConfig, pure
from emoe_jax.optim import global_norm
from emoe_jax.routers import Context, Router, Routing, make_router, router_class
from emoe_jax.sharding import MeshConfig, batch_sharding, in_mesh, make_mesh, replicated, shardings

D, F, E = 8, 8, 8
# B and S: 48 tokens are equally many for each of 16 chunks, of 45 the last chunk has none.
SHAPES = {"even": (8, 6), "uneven": (5, 9)}

EXCHANGES = ("all_to_all", "ragged_all_to_all", "all_gather")
MESHES = {
    "expert2": {"expert": 2},
    "expert4": {"expert": 4},
    "expert8": {"expert": 8},
    "data.fsdp.expert": {"data": 2, "fsdp": 2, "expert": 2},
    "data.expert.tensor": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp.expert.tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
}
ALL_AXES = {"data.fsdp.expert.tensor": {"data": 2, "fsdp": 2, "expert": 2, "tensor": 2}}
CHUNKS = (1, 2)

# FULL takes all first choices, NEXT all second ones, EMPTY none. FULL and NEXT are on one device
# of 2 and of 4.
FULL, NEXT, EMPTY = 2, 3, 5
FREE = ("mixed", "padded")
FORCED = ("one expert", "empty expert")
# Routers whose loads no weight and no id decides, and those whose scores can be made equal.
UNFORCED = ("expert_choice", "random", "soft")
TIED = ("softmax", "switch")

MARGIN = 1e-3
SHARE = 2e-5


OPTIONS = {
    "eigen": RouterConfig(orthogonality_weight=0.1),
    # A single gate is not renormalised: it would be 1, and its gradient rounding alone.
    "softmax": RouterConfig(z_weight=0.1),
    "switch": RouterConfig(balance_weight=1.0),
    "loss_free": RouterConfig(bias_rate=0.1),
}


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# --- the layer ----------------------------------------------------------------------------------


def layer_config(router: str, top_k: int, **values: Any) -> MoEConfig:
    options = OPTIONS.get(router, RouterConfig())
    if router == "softmax" and top_k > 1:
        options = dataclasses.replace(options, renormalize=True)
    common: dict[str, Any] = {
        "router": router,
        "experts": E,
        "top_k": E if router == "soft" else top_k,
        "hidden": F,
        "bias": True,
        "activation": "gelu",
        # Expert choice takes no other; it has its own capacity and reads no factor.
        "dispatch": "capacity" if router == "expert_choice" else "dropless",
        "basis": BasisConfig(rank=4),
        "routing": options,
    }
    return MoEConfig(**(common | values))


class AnyOf(Router):
    """Several routers, all computed, of which a number in the state is followed.

    So one compiled step, which takes seconds to compile, tries them all.
    """

    def __init__(self, configs: dict[str, MoEConfig], *, rngs: nnx.Rngs) -> None:
        self.names = tuple(configs)
        for name, config in configs.items():
            setattr(self, name, make_router(config, D, rngs=rngs))
        self.which = pure.RouterState(jnp.zeros((), jnp.int32))

    def __call__(self, tokens: jax.Array, context: Context) -> Routing:
        routings = [getattr(self, name)(tokens, context) for name in self.names]
        known = {key: jnp.zeros_like(leaf) for r in routings for key, leaf in r.stats.items()}
        whole = [r._replace(metrics={}, stats=known | r.stats) for r in routings]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves)[self.which[...]], *whole)


def make_layer(routers: tuple[str, ...], config: MoEConfig) -> tuple[pure.Pure, Any, Any]:
    """The layer split; biases and running state away from zero, where errors would not show."""
    layer = MoE(config, D, rngs=nnx.Rngs(0))
    if len(routers) > 1:
        configs = {name: layer_config(name, config.top_k) for name in routers}
        layer.router = AnyOf(configs, rngs=nnx.Rngs(1))
    split, params, state = pure.split(layer)

    def lift(path: Any, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        lifted = path[-1].key.startswith("b_") or path[-1].key == "bias"
        return leaf + 0.1 * draw(leaf.shape, leaf.size) if lifted else leaf

    return split, *jax.tree_util.tree_map_with_path(lift, (params, state))


def updated(routers: tuple[str, ...], top_k: int, state: Any, stats: Any) -> Any:
    """The running state of the next step, of each router."""
    router = state.get("router", {})
    if len(routers) == 1:
        name = routers[0]
        return router_class(name).update(layer_config(name, top_k), router, stats, jnp.zeros(()))
    return {
        name: router_class(name).update(
            layer_config(name, top_k), router[name], stats, jnp.zeros(())
        )
        for name in routers
        if name in router
    }


# --- what is compiled -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled together; more routers than one are an `AnyOf`."""

    exchange: str
    mesh: str
    routers: tuple[str, ...]
    top_k: int
    chunks: int
    shape: str

    def __str__(self) -> str:
        router = self.routers[0] if len(self.routers) == 1 else "token_choice"
        parts = (self.exchange, self.mesh, router, f"K{self.top_k}", f"chunks{self.chunks}")
        return "-".join((*parts, self.shape))


Step = Callable[[Any, Any, dict[str, np.ndarray]], dict[str, Any]]


def make_step(routers: tuple[str, ...], config: MoEConfig, split: pure.Pure) -> Step:
    """A function to everything that mesh and exchange must leave as it is."""

    def step(params: Any, state: Any, batch: dict[str, Any]) -> dict[str, Any]:
        def loss(params: Any, tokens: jax.Array) -> Any:
            out, aux = split.bind(params, state)(
                tokens, mask=batch["mask"], ids=batch["ids"], key=jax.random.key(3)
            )
            return jnp.sum(jnp.square(out - batch["target"])) + aux.loss, (out, aux)

        (total, (out, aux)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            params, batch["tokens"]
        )
        return {
            "out": out,
            "loss": total,
            "auxiliary": aux.loss,
            "stats": aux.stats,
            "params": gradients[0],
            "tokens": gradients[1],
            "norm": global_norm(gradients[0]),
            "state": updated(routers, config.top_k, state, aux.stats),
        }

    return step


@functools.cache
def oracle(routers: tuple[str, ...], top_k: int, shape: str) -> tuple[Any, Any, Step]:
    """Parameters, state, and the compiled step of the dense layer on one device."""
    config = layer_config(routers[0], top_k, dispatch="dense")
    split, params, state = make_layer(routers, config)
    step = jax.jit(make_step(routers, config, split))
    return params, state, step


def mesh_of(name: str) -> Mesh:
    """The mesh, on the first devices; too few are an error."""
    sizes = (MESHES | ALL_AXES)[name]
    need, devices = math.prod(sizes.values()), jax.devices()
    assert len(devices) >= need, f"{need} devices needed, {len(devices)} here; EMOE_TEST_DEVICES"
    return make_mesh(MeshConfig(**{"data": 1, **sizes}), devices[:need])


def on_mesh(case: Case) -> Step:
    """The step on the mesh: parameters and gradients sharded by the rules."""
    values = {"exchange": case.exchange, "exchange_chunks": case.chunks}
    config = layer_config(case.routers[0], case.top_k, **values)
    split, params, _ = make_layer(case.routers, config)
    mesh = mesh_of(case.mesh)
    where = shardings(mesh, params)
    whole = replicated(mesh)
    # Five sequences cannot be split evenly: there the partitioner finds its own way.
    rows = batch_sharding(mesh) if case.shape == "even" else whole
    names = ("out", "loss", "auxiliary", "stats", "tokens", "norm", "state")
    run = jax.jit(
        in_mesh(mesh, make_step(case.routers, config, split)),
        in_shardings=(where, whole, rows),
        out_shardings=dict.fromkeys(names, whole) | {"params": where},
    )

    def placed(params: Any, state: Any, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return run(
            jax.device_put(params, where), jax.device_put(state, whole), jax.device_put(batch, rows)
        )

    return placed


# --- loads ----------------------------------------------------------------------------------------


def loads(router: str) -> tuple[str, ...]:
    ties = ("ties",) if router in TIED else ()
    return FREE if router in UNFORCED else FREE + FORCED + ties


def tilt(load: str) -> np.ndarray:
    """[E] float32, added to the scores by which a router selects."""
    tilt = np.zeros((E,), np.float32)
    if load == "one expert":
        tilt[FULL], tilt[NEXT] = 8.0, 5.0
    if load == "empty expert":
        tilt[EMPTY] = -8.0
    return tilt


def inputs(case: Case, router: str, load: str, params: Any, state: Any) -> tuple[Any, Any, Any]:
    """Parameters, state and batch that give this router this load."""
    B, S = SHAPES[case.shape]
    params, state = jax.tree.map(np.copy, (params, state))
    mine = params.get("router", {})
    running = state.get("router", {})
    if len(case.routers) > 1:
        running["which"] = np.int32(case.routers.index(router))
        mine, running = mine.get(router, {}), running.get(router, {})
    # The first feature of every token is 1, so the first row of a kernel is a bias.
    if load == "ties":
        mine["kernel"][:] = 0.0
    elif router in ("softmax", "switch"):
        mine["kernel"][0] = tilt(load)
    if router == "eigen":
        mine["bias"] += tilt(load)
    if router == "loss_free":
        running["bias"] += tilt(load)
    mask = np.ones((B, S), bool)
    if load == "padded":
        mask = np.random.default_rng(5).uniform(size=(B, S)) > 0.3
        mask[1] = False
    batch = {
        "mask": mask,
        "ids": ids_for(load, case.top_k, (B, S)),
        "tokens": 0.7 * draw((B, S, D), 1),
        "target": draw((B, S, D), 11),
    }
    if load != "ties":
        batch["tokens"] = clear_tokens(router, case.top_k, mine, running, mask)
    return params, state, batch


@functools.cache
def hashed() -> np.ndarray:
    """[100] the first expert of the ids 0 to 99."""
    router = make_router(layer_config("hash", 1), D, rngs=nnx.Rngs(0))
    ids = jnp.arange(100, dtype=jnp.int32)[None, :]
    context = Context(jnp.ones((1, 100), bool), ids)
    return np.asarray(router(jnp.zeros((100, D)), context).indices[:, 0])


def ids_for(load: str, top_k: int, shape: tuple[int, int]) -> np.ndarray:
    """Ids for the hash router, whose K experts follow each other from the hashed one on."""
    allowed = np.ones((100,), bool)
    if load == "one expert":
        allowed = hashed() == FULL
    if load == "empty expert":
        allowed = (EMPTY - hashed()) % E >= top_k
    return np.random.default_rng(2).choice(np.flatnonzero(allowed), shape).astype(np.int32)


def clear_tokens(router: str, top_k: int, mine: Any, running: Any, mask: np.ndarray) -> np.ndarray:
    """Tokens [B,S,D] none of which is near a tie: sequences are drawn again until that is so."""
    tokens = 0.7 * draw((*mask.shape, D), 1)
    for turn in range(2, 200):
        tokens[..., 0] = 1.0
        near = margins(router, top_k, mine, running, tokens, mask) < MARGIN
        if not near.any():
            break
        tokens[near] = 0.7 * draw(tokens.shape, turn)[near]
    assert margins(router, top_k, mine, running, tokens, mask).min() >= MARGIN
    return tokens


def margins(
    router: str, top_k: int, mine: Any, running: Any, tokens: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """[B,S] for tokens that choose, [B] for experts that do: how far the choice is from a tie."""
    if router in ("hash", "random", "soft"):
        return np.full(mask.shape, np.inf)
    scores = selection_scores(router, mine, running, tokens)
    if router != "expert_choice":
        ranked = -np.sort(-scores, axis=-1)
        return ranked[..., top_k - 1] - ranked[..., top_k]
    taken = -(-mask.shape[1] * top_k // E)
    ranked = -np.sort(-np.where(mask[..., None], scores, -1.0), axis=1)
    # Padding, at -1, is taken where nothing else is left, with a gate of zero.
    gap = ranked[:, taken - 1] - ranked[:, taken]
    return np.where(ranked[:, taken - 1] < 0, np.inf, gap).min(axis=-1)


def selection_scores(router: str, mine: Any, running: Any, tokens: np.ndarray) -> np.ndarray:
    """[B,S,E] what the router ranks, in numpy."""
    if router == "loss_free":
        return 1 / (1 + np.exp(-(tokens @ mine["kernel"]))) + running["bias"]
    if router != "eigen":
        return softmax(tokens @ mine["kernel"], -1)
    square = (tokens @ mine["basis"]) ** 2
    energy = square / (square.sum(axis=-1, keepdims=True) + 1e-6)
    shares = softmax(mine["masks"], 0) * mine["gamma"]
    return softmax(energy @ shares.T + mine["bias"], -1)


def softmax(scores: np.ndarray, axis: int) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


# --- what is claimed ------------------------------------------------------------------------------


def assert_agrees(actual: dict[str, Any], expected: dict[str, Any], words: str) -> None:
    """Every number within SHARE of the largest of its array."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree_util.tree_leaves_with_path(expected),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        limit = SHARE * max(float(np.abs(b).max()), 1e-2)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=f"{words}: {name}")


def assert_load(case: Case, load: str, stats: dict[str, np.ndarray]) -> None:
    """The load is what its name says, nothing is dropped, and overflows are counted."""
    tokens, counts = stats["tokens"], stats["load"]
    B, S = SHAPES[case.shape]
    assert tokens < B * S if load == "padded" else tokens == B * S
    if load == "empty expert":
        assert counts[EMPTY] == 0
    if load == "one expert":
        assert counts[FULL] == tokens
        assert case.top_k == 1 or counts[NEXT] == tokens
    if load == "ties":
        assert counts[: case.top_k].tolist() == [tokens] * case.top_k
    assert stats["dropped"] == 0
    sizes = {"data": 1, "fsdp": 1} | (MESHES | ALL_AXES)[case.mesh]
    assert stats["exchanges"] == sizes["data"] * sizes["fsdp"] * case.chunks
    if load == "one expert" and case.exchange == "all_to_all":
        assert stats["overflows"] == stats["exchanges"]
    if case.exchange == "all_gather":
        assert stats["overflows"] == 0


def assert_case(case: Case) -> None:
    """Every router and load of a case, against the oracle."""
    params, state, dense = oracle(case.routers, case.top_k, case.shape)
    step = on_mesh(case)
    for router in case.routers:
        for load in loads(router):
            given = inputs(case, router, load, params, state)
            actual = jax.device_get(step(*given))
            expected = jax.device_get(dense(*given))
            words = f"{case}: {router}, {load}"
            assert_load(case, load, actual["stats"])
            for name in ("overflows", "exchanges"):
                del actual["stats"][name], expected["stats"][name]
            assert_agrees(actual, expected, words)
