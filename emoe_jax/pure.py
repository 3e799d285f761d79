"""Modules as pure functions: the one place that knows how Flax keeps parameters.

A model is split once into a graph and two plain nested dicts of arrays: parameters, and running
router state. From then on training, sharding and checkpoints see only the dicts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from emoe_jax.routers.base import RouterState

Tree = Any


class Pure(NamedTuple):
    """A model without its arrays.

    Attributes:
        graph: Flax's static description.
        params: abstract parameters as Flax keeps them.
        router: abstract router state, likewise.
    """

    graph: Any
    params: Any
    router: Any

    def bind(self, params: Tree, router: Tree) -> Any:
        """The model with these arrays; made where it is used, inside a traced function too."""
        return nnx.merge(self.graph, _fill(self.params, params), _fill(self.router, router))


def split(model: nnx.Module) -> tuple[Pure, Tree, Tree]:
    """Splits a model into its graph, parameters and router state, the two as plain dicts."""
    graph, params, *others = nnx.split(model, nnx.Param, RouterState)
    (router,) = others
    pure = Pure(graph, _abstract(params), _abstract(router))
    return pure, plain(params), plain(router)


def abstract_split(make: Callable[[], nnx.Module]) -> tuple[Pure, Tree, Tree]:
    """The same for a model that is not built: dicts of `jax.ShapeDtypeStruct`, no memory."""
    return split(nnx.eval_shape(make))


def initializer(make: Callable[[], nnx.Module]) -> Callable[[], tuple[Tree, Tree]]:
    """A function for `jax.jit` that builds parameters and router state where they shall live."""

    def build() -> tuple[Tree, Tree]:
        _, params, router = split(make())
        return params, router

    return build


def plain(state: Any) -> Tree:
    """Nested dict of arrays with string keys, from Flax's state of a module or of gradients."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = variable.get_value()
    return tree


def _fill(state: Any, tree: Tree) -> Any:
    """Flax's state with the arrays of a plain dict."""
    filled = []
    for path, variable in nnx.to_flat_state(state):
        leaf = tree
        for part in path:
            leaf = leaf[str(part)]
        filled.append((path, variable.replace(leaf)))
    return nnx.from_flat_state(filled)


def _abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
