"""The rounds of an exchange of limited room: out, through the experts, and back.

The first round is an ordinary function. Further ones run in a loop, none but for an overflow, and
keep nothing for the backward pass but the inputs, which are kept anyway: they are run again there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from emoe_jax.dispatch import transport
from emoe_jax.dispatch.dropless import group_by_expert
from emoe_jax.dispatch.rows import collect_rows, combine_rows, no_gradient, spread_rows
from emoe_jax.remat import decided, exchanged

Array = jax.Array
Weights = dict[str, Array]
Experts = Callable[[Weights, Array, Array], Array]


class Method(NamedTuple):
    """What a round is: nothing of it is traced.

    Attributes:
        way: how rows move.
        room: of one round, in rows, see `transport.Transport`.
        apply: the experts.
    """

    way: transport.Transport
    room: int
    apply: Experts


def one_round(
    method: Method,
    plan: transport.Sorted,
    turn: Any,
    tokens: Array,
    gates: Array,
    weights: Weights,
) -> Array:
    """What round `turn` adds to the outputs, [T,D] float32."""
    move = method.way.window(plan, method.room, turn)
    with jax.named_scope("dispatch"):
        rows = spread_rows(tokens, move.leaving)
    with jax.named_scope("exchange"):
        rows = exchanged(move.there(rows))
    with jax.named_scope("experts"):
        layout, sizes = group_by_expert(decided(move.arriving)[:, None], plan.held)
        rows = method.apply(weights, spread_rows(rows, layout), sizes)
        rows = collect_rows(rows, layout)
    with jax.named_scope("return"):
        rows = exchanged(move.back(rows))
    with jax.named_scope("combine"):
        return combine_rows(rows, gates, move.leaving)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def all_rounds(
    method: Method,
    plan: transport.Sorted,
    rounds: Array,
    inputs: tuple[Array, Array, Weights],
) -> Array:
    """Outputs [T,D] float32 of as many rounds as the group needs."""
    return _further(method, plan, rounds, inputs, one_round(method, plan, 0, *inputs))


def _further(
    method: Method,
    plan: transport.Sorted,
    rounds: Array,
    inputs: tuple[Array, Array, Weights],
    out: Array,
) -> Array:
    def add(turn: Array, out: Array) -> Array:
        return out + one_round(method, plan, turn, *inputs)

    return lax.fori_loop(1, rounds, add, out)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Input:
    """In place of an array that a pull-back holds: it is the `number`-th leaf of the inputs."""

    number: int


def _without(pull: Any, inputs: Any) -> Any:
    """A pull-back, or another tree, without what it holds of the inputs: those are there anyway."""
    leaves, tree = jax.tree.flatten(pull)
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(inputs))}
    own = [_Input(numbers[id(leaf)]) if id(leaf) in numbers else leaf for leaf in leaves]
    return jax.tree.unflatten(tree, own)


def _with(own: Any, inputs: Any) -> Any:
    """The pull-back again."""
    leaves, tree = jax.tree.flatten(own, is_leaf=lambda leaf: isinstance(leaf, _Input))
    given = jax.tree.leaves(inputs)
    return jax.tree.unflatten(
        tree, [given[leaf.number] if isinstance(leaf, _Input) else leaf for leaf in leaves]
    )


def _rounds_forward(
    method: Method,
    plan: transport.Sorted,
    rounds: Array,
    inputs: tuple[Array, Array, Weights],
) -> tuple[Array, Any]:
    """Keeps what the first round's backward pass needs; further rounds keep their inputs alone."""
    first, pull = jax.vjp(partial(one_round, method, plan, 0), *inputs)
    out = _further(method, plan, rounds, inputs, first)
    return out, (_without(pull, inputs), plan, rounds, inputs)


def _rounds_backward(method: Method, saved: Any, cotangent: Array) -> tuple[Any, Any, Any]:
    own, plan, rounds, inputs = saved

    def add(turn: Array, gradients: Any) -> Any:
        _, pull = jax.vjp(partial(one_round, method, plan, turn), *inputs)
        # Or XLA finds that both passes compute the same, and keeps what would be computed again.
        own = lax.optimization_barrier(_without(pull, inputs))
        return jax.tree.map(jnp.add, gradients, _with(own, inputs)(cotangent))

    gradients = lax.fori_loop(1, rounds, add, _with(own, inputs)(cotangent))
    return no_gradient(plan), no_gradient(rounds), gradients


all_rounds.defvjp(_rounds_forward, _rounds_backward)
