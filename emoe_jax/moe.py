"""The Mixture-of-Experts layer: the path of a token from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.config import MoEConfig, require
from emoe_jax.dispatch import choose, dispatcher, exchange
from emoe_jax.experts import Experts, apply_experts
from emoe_jax.layers import MLP
from emoe_jax.metrics import beyond_capacity
from emoe_jax.routers import Context, ExpertChoice, Routing, make_router
from emoe_jax.sharding import ambient_mesh

Array = jax.Array


class Aux(NamedTuple):
    """What a layer tells besides its output.

    Attributes:
        loss: scalar float32, the router's auxiliary loss, weights applied.
        metrics: scalars that do not add up over microbatches.
        stats: sums over real tokens (see `routers.base.Routing`), `dropped` [], `beyond_capacity`
            [] (see `metrics`), and of exchanges over a mesh `overflows` and `exchanges` [] (see
            `dispatch.exchange`), from which `metrics.routing_metrics` computes loads, violations
            and fractions.
        captured: where asked for, what went into the router (`input` [B,S,D]) and what came out:
            `probs` [B,S,E], `weights` and `indices` [B,S,K].
    """

    loss: Array
    metrics: dict[str, Array]
    stats: dict[str, Array]
    captured: dict[str, Array] | None = None


def auxiliary_loss(aux: Mapping[str, Aux]) -> Array:
    """Scalar float32: the auxiliary losses of all layers of a model, to be added to the task's.

    Args:
        aux: what a model returns beside its output, by place in the period.
    """
    return sum((jnp.sum(layer.loss) for layer in aux.values()), jnp.zeros((), jnp.float32))


class MoE(nnx.Module):
    """Mixture-of-Experts layer: route, dispatch, experts, combine.

    Example:
        layer = MoE(MoEConfig(router="eigen", experts=8, top_k=2), 256, rngs=nnx.Rngs(0))
        out, aux = layer(tokens)  # tokens [B,S,256]; aux.stats["load"] [8]

    Args:
        config: the layer.
        width: D.
        dtype: compute dtype of the experts; the router is float32.
        out_scale: factor of the experts' initial output matrices, below 1 in deep models.
        rngs: initial weights are drawn from its stream `params`.

    Raises:
        ValueError: the configuration cannot be built; see `MoEConfig` and the routers.
    """

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        *,
        dtype: str = "float32",
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        # Keys of its own: whatever a router draws, the experts and later layers draw the same.
        own = nnx.Rngs(params=jax.random.fold_in(rngs.params(), 1))
        self.router = make_router(config, width, rngs=own)
        self.experts = Experts(config, width, dtype=dtype, out_scale=out_scale, rngs=rngs)
        if config.shared_hidden:
            self.shared = MLP(
                width,
                config.shared_hidden,
                config.activation,
                dtype,
                out_scale=out_scale,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        ids: Array | None = None,
        rows: Array | None = None,
        key: Array | None = None,
        train: bool = False,
        capture: bool = False,
    ) -> tuple[Array, Aux]:
        """Sends each token through its experts.

        Args:
            tokens: [B,S,D].
            mask: [B,S] bool, False for padding: routed nowhere, counted nowhere, output zero (but
                for a shared expert's).
            ids: [B,S] int32, token ids; the hash router needs them.
            rows: [B] int32, position of each sequence in the global batch; 0 to B-1 where omitted.
            key: random key; the random router needs it.
            train: see `routers.base.Context`.
            capture: whether `Aux.captured` is wanted; routing by token choice alone has it.

        Returns:
            Outputs [B,S,D] in the dtype of the tokens, and `Aux`.
        """
        B, S, D = tokens.shape
        mask = jnp.ones((B, S), bool) if mask is None else mask
        flat, real = tokens.reshape(B * S, D), mask.reshape(-1)

        with jax.named_scope("route"):
            routing = self.router(flat, Context(mask, ids, rows, key, train))
        mesh = ambient_mesh()
        # The oracle is left to the partitioner, so that it shares nothing with the exchange.
        if mesh is None or self.config.dispatch == "dense":
            combined, counts = self._on_one_device(flat, routing, real)
        else:
            combined, counts = self._on_mesh(flat, routing, real, mesh)

        out = combined.reshape(B, S, D).astype(tokens.dtype)
        if self.config.shared_hidden:
            out = out + self.shared(tokens)
        load, factor = routing.stats["load"], self.config.capacity_factor
        counts = counts | {"beyond_capacity": beyond_capacity(load, factor)}
        stats = jax.lax.stop_gradient(routing.stats | counts)
        captured = _captured(tokens, routing) if capture else None
        return out, Aux(routing.aux_loss, routing.metrics, stats, captured)

    def _on_one_device(
        self, tokens: Array, routing: Routing | ExpertChoice, real: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Dispatch, experts, combine: outputs [T,D] and what is counted."""
        move = dispatcher(self.config.dispatch)
        with jax.named_scope("dispatch"):
            groups = move.dispatch(tokens, routing, real, self.config.capacity_factor)
        with jax.named_scope("experts"):
            outputs = self.experts(groups)
        with jax.named_scope("combine"):
            combined = move.combine(outputs, groups)
        none = jnp.zeros((), jnp.float32)
        return combined, {"dropped": groups.dropped, "overflows": none, "exchanges": none}

    def _on_mesh(
        self,
        tokens: Array,
        routing: Routing | ExpertChoice,
        real: Array,
        mesh: jax.sharding.AbstractMesh,
    ) -> tuple[Array, dict[str, Array]]:
        """The same on the devices of a mesh, and the exchange between them."""
        choices = choose(routing, real, self.config)
        weights = self.experts.weights()
        tokens = tokens.astype(self.experts.dtype)
        done = exchange(
            tokens, choices.experts, choices.gates, weights, apply_experts, self.config, mesh
        )
        counts = {
            "dropped": choices.dropped + done.dropped,
            "overflows": done.overflows,
            "exchanges": done.exchanges,
        }
        return done.out, counts


def _captured(tokens: Array, routing: Routing | ExpertChoice) -> dict[str, Array]:
    require(isinstance(routing, Routing), "capture needs a router by which tokens choose experts")
    parts = {name: getattr(routing, name) for name in ("probs", "weights", "indices")}
    return {"input": tokens} | {k: v.reshape(*tokens.shape[:2], -1) for k, v in parts.items()}
