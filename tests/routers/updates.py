"""What running state becomes of batches that pass by."""

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax import pure
from emoe_jax.routers import Context, make_router, router_class


def after_batches(some, batches):
    """The state of a router after an update by each of the batches [T,D], at the training's start.

    Args:
        some: the layer's configuration.
        batches: arrays of one shape.
    """
    graph, params, state = pure.split(make_router(some, batches[0].shape[1], rngs=nnx.Rngs(0)))
    context = Context(jnp.ones((1, batches[0].shape[0]), bool))

    @jax.jit
    def move(state, tokens):
        stats = graph.bind(params, state)(tokens, context).stats
        return router_class(some.router).update(some, state, stats, jnp.zeros(()))

    for tokens in batches:
        state = move(state, tokens)
    return state
