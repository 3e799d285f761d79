"""Modules as pure functions: nothing is lost between a module and plain dicts."""

import gc
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emoe_jax import EMoELM, LMConfig, MoEConfig, pure

CONFIG = LMConfig(
    vocab_size=11,
    width=8,
    depth=2,
    heads=2,
    mlp_hidden=6,
    moe=MoEConfig(experts=2, hidden=3, dispatch="dense"),
)


TOKENS = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)


def make():
    return EMoELM(CONFIG, rngs=nnx.Rngs(0))


@cache
def built():
    return pure.split(make())


def keys_of(tree):
    for key, value in tree.items():
        yield key
        if isinstance(value, dict):
            yield from keys_of(value)


def test_a_round_trip_keeps_every_bit():
    model = make()
    split, params, router = pure.split(model)
    bound = split.bind(params, router)
    _, again, router_again = pure.split(bound)
    chex.assert_trees_all_equal(again, params)
    chex.assert_trees_all_equal(router_again, router)
    chex.assert_trees_all_equal(*(jax.jit(m.__call__)(TOKENS) for m in (model, bound)))


def test_trees_are_plain_dicts_with_string_keys():
    _, params, router = built()
    for tree in (params, router):
        assert all(type(key) is str for key in keys_of(tree))
        for leaf in jax.tree.leaves(tree):
            assert isinstance(leaf, jax.Array)
        containers = jax.tree_util.tree_structure(tree)
        assert "State" not in str(containers)
    assert list(router) == ["blocks"]
    # One place in the period, two repeats, two experts.
    chex.assert_shape(router["blocks"]["groups"]["0"]["moe"]["router"]["offset"], (2, 2))
    assert set(params) == {"embedding", "blocks", "norm"}
    assert set(params["blocks"]["groups"]) == {"0"}


def test_bound_values_are_the_given_ones():
    split, params, router = built()
    marked = jax.tree.map(lambda x: x, params)
    marked["embedding"] = jnp.full_like(params["embedding"], 7.0)
    router = jax.tree.map(lambda x: x + 3.0, router)
    bound = split.bind(marked, router)
    assert float(bound.embedding[...][0, 0]) == 7.0
    assert np.all(bound.blocks.groups[0].moe.router.offset[...] == 3.0)


def test_the_abstract_split_matches_the_built_model_and_holds_nothing():
    gc.collect()  # what earlier tests left may go at any moment
    before = len(jax.live_arrays())
    split, params, router = pure.abstract_split(make)
    assert len(jax.live_arrays()) == before
    for leaf in jax.tree.leaves((params, router)):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
    _, made, made_router = built()
    chex.assert_trees_all_equal_shapes_and_dtypes((params, router), (made, made_router))
    bound = split.bind(made, made_router)
    chex.assert_trees_all_equal(pure.split(bound)[1], made)


def test_the_initializer_builds_the_same_under_jit():
    params, router = jax.jit(pure.initializer(make))()
    _, made, made_router = built()
    chex.assert_trees_all_equal_shapes_and_dtypes((params, router), (made, made_router))
    chex.assert_trees_all_close((params, router), (made, made_router), rtol=1e-5, atol=1e-6)


def test_gradients_come_back_as_the_same_dicts():
    split, params, router = built()

    def loss(params):
        return jnp.sum(jnp.square(split.bind(params, router)(TOKENS)[0]))

    gradients = jax.jit(jax.grad(loss))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))
