"""What every router returns, and the selections and counts that routers share.

A router decides and never moves a token. It sees tokens [T,D] of B sequences of S positions
(T = B S, row-major) and returns a `Routing`, or an `ExpertChoice` where experts choose tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from emoe_jax.config import MoEConfig, require
from emoe_jax.remat import decided
from emoe_jax.sharding import on_rows

Array = jax.Array
State = dict[str, Array]


class Routing(NamedTuple):
    """Each token's experts.

    Attributes:
        indices: [T,K] int32, the experts of a token, the best first.
        weights: [T,K] float32, the gates that combine uses; zero for padding.
        probs: [T,E] float32, the router's distribution over all experts.
        aux_loss: scalar float32, to be added to the task loss, weights already applied.
        metrics: scalars that do not add up over microbatches; they are averaged.
        stats: sums over real tokens, which add up over microbatches and devices: `tokens` [],
            `load` [E] (assignments), `gate` [] (largest gate of each token), and what the router
            itself needs for its update.
    """

    indices: Array
    weights: Array
    probs: Array
    aux_loss: Array
    metrics: dict[str, Array]
    stats: dict[str, Array]


class ExpertChoice(NamedTuple):
    """Each expert's tokens.

    Attributes:
        tokens: [E,C] int32, the tokens of an expert as rows of [T,D].
        weights: [E,C] float32, the gates; zero where the chosen token is padding.
        probs: [T,E] float32.
        aux_loss: as in `Routing`.
        metrics: as in `Routing`.
        stats: as in `Routing`.
    """

    tokens: Array
    weights: Array
    probs: Array
    aux_loss: Array
    metrics: dict[str, Array]
    stats: dict[str, Array]


class RouterState(nnx.Variable[Array]):
    """Running state of a router: carried and checkpointed like parameters, never differentiated."""


class Context(NamedTuple):
    """What a router may know of the tokens besides their features.

    Attributes:
        mask: [B,S] bool, False for padding, which no router counts and no gate lets through.
        ids: [B,S] int32, vocabulary ids, or patch positions of images.
        rows: [B] int32, position of each sequence in the global batch, so that random choices do
            not depend on how the batch is split.
        key: a random key, or None where nothing random may happen.
        train: whether this is a training pass over weights that `basis.prepare_bases` did not
            prepare: a router with a basis then prepares its own.
    """

    mask: Array
    ids: Array | None = None
    rows: Array | None = None
    key: Array | None = None
    train: bool = False


class Router(nnx.Module):
    """A router: parameters, and two functions.

    Calling it routes tokens by the state of the step before; `update` makes the next step's state
    from the summed statistics of an accepted optimizer step. Both are pure.
    """

    OPTIONS: ClassVar[frozenset[str]] = frozenset()
    """Names of the `RouterConfig` options that this router reads."""

    CALIBRATES: ClassVar[bool] = False
    """Whether passes forward before and after training, which train nothing, improve its state."""

    CAUSAL: ClassVar[bool] = True
    """Whether the route of a token depends on no later token of its sequence."""

    def __call__(self, tokens: Array, context: Context) -> Routing | ExpertChoice:
        """Routes tokens [T,D]; the products are float32 whatever the dtype of the tokens."""
        raise NotImplementedError

    @staticmethod
    def update(config: MoEConfig, state: State, stats: dict[str, Array], progress: Array) -> State:
        """The state of the next step; leading axes [...] (stacked layers) pass through.

        Args:
            config: of the layer.
            state: arrays [...,*] by name.
            stats: of `Routing`, summed over the global batch of an accepted optimizer step.
            progress: [] float32, the share of the training's steps that are done; 1 + n at the n-th
                batch after them, which moves nothing but this state.
        """
        return state


def router_options(config: MoEConfig, router: type[Router], **defaults: Any) -> dict[str, Any]:
    """The options of a router, the given ones over its defaults.

    Raises:
        ValueError: an option is set that the router does not read.
    """
    given = config.routing.given()
    for name in given:
        require(
            name in router.OPTIONS,
            f"routing.{name}={given[name]!r} is set, but the router {config.router!r} does not read"
            " it; set it to None (it reads"
            f" {', '.join(sorted(router.OPTIONS)) or 'no option'})",
        )
    return defaults | given


def linear(tokens: Array, kernel: Array) -> Array:
    """float32 product of tokens [T,D] and a kernel [D,N], in full precision on every platform."""
    return jnp.dot(tokens.astype(jnp.float32), kernel, precision=lax.Precision.HIGHEST)


def select_top_k(scores: Array, k: int) -> Array:
    """Indices [T,K] int32 of the K largest scores [T,E]; of equal scores the lower index is first.

    No gradient passes: the choice is piecewise constant.
    """
    return decided(top_k_of_rows(lax.stop_gradient(scores), k)[1])


def top_k_of_rows(x: Array, k: int) -> tuple[Array, Array]:
    """Values and int32 indices of the k largest of each row's last axis, [B,...,N] to [B,...,k].

    Each device sorts its own rows: left to the partitioner, all rows are gathered on all devices.
    """
    values, indices = on_rows(lambda part: tuple(lax.top_k(part, k)), x)
    return values, indices.astype(jnp.int32)


def gates_of(scores: Array, score: str) -> tuple[Array, Array]:
    """The gates of all experts, and as shares of 1 over them, both [T,E].

    Args:
        scores: [T,E] float32.
        score: "softmax", whose gates are those shares, or "sigmoid", each expert's gate its own.
    """
    if score == "softmax":
        gates = jax.nn.softmax(scores, axis=-1)
        return gates, gates
    gates = jax.nn.sigmoid(scores)
    return gates, gates / jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), 1e-9)


def gather_gates(gates: Array, indices: Array, *, renormalize: bool = False) -> Array:
    """The gates [T,K] of the chosen experts out of [T,E].

    A masked sum over E instead of a gather: its gradient is then a product and no scatter.

    Args:
        gates: [T,E] float32.
        indices: [T,K] int32.
        renormalize: divide by the sum over K.
    """
    chosen = _one_hot(indices, gates.shape[-1])
    weights = jnp.sum(jnp.where(chosen, gates[:, None, :], 0.0), axis=-1)
    if not renormalize:
        return weights
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-9)


def count(indices: Array, real: Array, experts: int) -> Array:
    """Assignments of each expert, [E] float32, from indices [T,K] of the tokens that are real."""
    chosen = _one_hot(indices, experts)
    return jnp.sum(jnp.where(chosen & real[:, None, None], 1.0, 0.0), axis=(0, 1))


def _one_hot(indices: Array, experts: int) -> Array:
    """Which expert each choice is: [T,K] int32 to [T,K,E] bool."""
    order = jnp.arange(experts, dtype=indices.dtype)
    return indices[:, :, None] == order[None, None, :]


def mean_over(values: Array, real: Array) -> Array:
    """Mean of values [T] over real tokens."""
    return jnp.sum(jnp.where(real, values, 0.0)) / jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1)


def make_routing(
    indices: Array,
    weights: Array,
    probs: Array,
    mask: Array,
    *,
    aux_loss: Array | None = None,
    metrics: dict[str, Array] | None = None,
    stats: dict[str, Array] | None = None,
) -> Routing:
    """Masks the padding and counts: the last line of every token-choice router.

    Args:
        indices: [T,K].
        weights: [T,K], before masking.
        probs: [T,E].
        mask: [B,S].
        aux_loss: zero where omitted.
        metrics: more metrics.
        stats: more statistics.
    """
    real = mask.reshape(-1)
    weights = jnp.where(real[:, None], weights, 0.0)
    common = {
        "tokens": jnp.sum(real, dtype=jnp.float32),
        "load": count(indices, real, probs.shape[-1]),
        "gate": jnp.sum(lax.stop_gradient(jnp.max(weights, axis=-1))),
    }
    loss = jnp.zeros((), jnp.float32) if aux_loss is None else aux_loss
    return Routing(indices, weights, probs, loss, metrics or {}, common | (stats or {}))
