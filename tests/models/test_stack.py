"""The stack: scanned and unrolled alike, remat, router state by layer, the adapter branch."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import LMConfig, MoEConfig, ViTConfig, pure
from emoe_jax.models.stack import Block, Stack, layer_names, update_router_state
from emoe_jax.moe import Aux

B, S, D, DEPTH = 2, 4, 8, 4


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def make_config(router="loss_free", **values):
    moe = MoEConfig(router=router, experts=3, hidden=4, dispatch="dense")
    sizes = {"width": D, "depth": DEPTH, "heads": 2, "mlp_hidden": 6, "moe": moe}
    return LMConfig(vocab_size=11, **(sizes | values))


SEGMENTS = jnp.array([[1, 1, 1, 1], [1, 1, 2, 0]], jnp.int32)
POSITIONS = jnp.array([[0, 1, 2, 3], [0, 1, 0, 0]], jnp.int32)
IDS = jnp.arange(B * S, dtype=jnp.int32).reshape(B, S)


@cache
def run(config):
    """(value and aux, gradients) of a stack from the same seed, and its split."""
    split, params, router = pure.split(Stack(config, rngs=nnx.Rngs(0)))
    cotangent, key = draw((B, S, D), 1), jax.random.key(0)

    def loss(params, x):
        stack = split.bind(params, router)
        rows = jnp.arange(B, dtype=jnp.int32)
        out, aux = stack(x, POSITIONS, SEGMENTS, IDS, rows, key)
        return jnp.sum(out * cotangent), (out, aux)

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (out, aux)), gradients = step(params, draw((B, S, D)))
    return out, aux, gradients, params


def by_block(groups, repeats):
    """Leaves of the blocks in order: block r·period + p is groups[p] at r."""
    period = len(groups)
    return [
        jax.tree.map(lambda leaf, r=r: leaf[r], groups[str(place)])
        for r in range(repeats)
        for place in range(period)
    ]


def test_a_scanned_pattern_equals_the_same_pattern_listed():
    out, aux, gradients, params = run(make_config(moe_every=2))
    listed_out, listed_aux, listed_gradients, listed = run(make_config(moe_blocks=(1, 3)))
    for ours, theirs in ((params, listed), (gradients[0], listed_gradients[0])):
        for a, b in zip(by_block(ours["groups"], 2), by_block(theirs["groups"], 1), strict=True):
            chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(out, listed_out, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(gradients[1], listed_gradients[1], rtol=1e-4, atol=1e-5)
    assert list(aux) == ["1"]
    assert list(listed_aux) == ["1", "3"]
    stacked = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), listed_aux["1"], listed_aux["3"]
    )
    chex.assert_trees_all_close(aux["1"], stacked, rtol=1e-5, atol=1e-5)
    assert aux["1"].stats["load"].shape == (2, 3)
    # Seven real tokens, one expert each.
    chex.assert_trees_all_equal(jnp.sum(aux["1"].stats["load"], axis=1), jnp.array([7.0, 7.0]))


@pytest.mark.parametrize("remat", ["full", "dots", "exchange"])
def test_remat_changes_neither_values_nor_gradients(remat):
    plain, again = run(make_config(moe_every=2)), run(make_config(moe_every=2, remat=remat))
    chex.assert_trees_all_close(plain, again, rtol=1e-5, atol=1e-6)


def remat_count(config):
    stack = Stack(config, rngs=nnx.Rngs(0))
    arrays = (draw((B, S, D)), POSITIONS, SEGMENTS, IDS, jnp.arange(B, dtype=jnp.int32), None)
    return str(jax.make_jaxpr(lambda *a: stack(*a)[0])(*arrays[:-1], None)).count("remat2[")


def test_remat_wraps_each_block_of_the_period():
    assert remat_count(make_config(depth=2, moe_every=2)) == 0
    assert remat_count(make_config(depth=2, moe_every=2, remat="full")) == 2


def test_without_experts_there_is_no_aux_and_no_state():
    out, aux, _, params = run(make_config(depth=2, moe_every=0))
    chex.assert_shape(out, (B, S, D))
    assert aux == {}
    assert "moe" not in params["groups"]["0"]
    assert update_router_state(make_config().moe, {}, aux, jnp.zeros(())) == {}
    assert layer_names(make_config(depth=2, moe_every=0)) == {}


def test_every_layer_draws_its_own_random_experts():
    _, aux, _, _ = run(make_config("random", moe_every=1))
    loads = np.asarray(aux["0"].stats["load"])
    assert loads.shape == (DEPTH, 3)
    assert len({tuple(load) for load in loads}) > 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"moe_every": 1}, {"0": ("layer_00", "layer_01", "layer_02", "layer_03")}),
        ({"moe_every": 2}, {"1": ("layer_01", "layer_03")}),
        ({"moe_every": 4}, {"3": ("layer_03",)}),
        ({"moe_blocks": (0, 2)}, {"0": ("layer_00",), "2": ("layer_02",)}),
    ],
)
def test_layer_names_say_which_block_an_aux_belongs_to(values, expected):
    assert layer_names(make_config(**values)) == expected


@pytest.mark.parametrize("values", [{"moe_every": 2}, {"moe_blocks": (1, 3)}])
def test_router_state_is_updated_layer_by_layer(values):
    # Block 1 sends all to expert 0, block 3 all to expert 2.
    loads = {"layer_01": [9.0, 0.0, 0.0], "layer_03": [0.0, 0.0, 9.0]}
    expected = {"layer_01": [-0.001, 0.001, 0.001], "layer_03": [0.001, 0.001, -0.001]}
    config = make_config(**values)
    names = layer_names(config)
    aux = {
        place: Aux(jnp.zeros(()), {}, {"load": jnp.array([loads[name] for name in blocks])})
        for place, blocks in names.items()
    }
    zeros = {
        place: {"moe": {"router": {"bias": jnp.zeros((len(blocks), 3))}}}
        for place, blocks in names.items()
    }
    new = update_router_state(config.moe, {"blocks": {"groups": zeros}}, aux, jnp.zeros(()))
    for place, blocks in names.items():
        bias = new["blocks"]["groups"][place]["moe"]["router"]["bias"]
        np.testing.assert_allclose(bias, [expected[name] for name in blocks], rtol=1e-6)
    chex.assert_trees_all_equal_structs(new, {"blocks": {"groups": zeros}})


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_the_adapter_branch_follows_the_block_and_spares_the_class_token(pooling):
    moe = MoEConfig(router="hash", experts=3, hidden=4, dispatch="dense", activation="gelu")
    config = ViTConfig(width=D, heads=2, mlp_hidden=6, pooling=pooling, moe_form="adapter", moe=moe)
    block, x = Block(config, True, rngs=nnx.Rngs(0)), draw((B, S, D))
    block.alpha = nnx.Param(jnp.float32(0.7))
    extra = {"ids": POSITIONS, "rows": None, "key": None}
    segments = jnp.ones((B, S), jnp.int32)
    first = 1 if pooling == "class" else 0

    @jax.jit
    def ours(x):
        return block(x, POSITIONS, segments, extra)

    @jax.jit
    def by_hand(x):
        x = x + block.attention(block.norm_attention(x), POSITIONS, segments)
        x = x + block.mlp(block.norm_mlp(x))
        branch, aux = block.moe(x[:, first:], ids=POSITIONS[:, first:])
        return jnp.concatenate([x[:, :first], x[:, first:] + 0.7 * branch], axis=1), aux

    chex.assert_trees_all_close(ours(x), by_hand(x), rtol=1e-5, atol=1e-6)
    assert float(ours(x)[1].stats["tokens"]) == B * (S - first)
