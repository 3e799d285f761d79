"""The layer from top to bottom: against a loop over tokens, padding, dtypes, statistics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import ROUTERS, Aux, BasisConfig, MoE, MoEConfig, RouterConfig, routing_metrics
from emoe_jax.routers import Context, RouterState

pytestmark = pytest.mark.usefixtures("strict")

B, S, D, E, F = 2, 5, 6, 3, 4


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def make_config(router="softmax", dispatch="dense", **values):
    k = E if router == "soft" else 2
    return MoEConfig(
        router=router,
        experts=E,
        top_k=k,
        hidden=F,
        dispatch=dispatch,
        basis=BasisConfig(rank=4),
        **values,
    )


def build(router="softmax", dispatch="dense", dtype="float32", **values):
    return MoE(make_config(router, dispatch, **values), D, dtype=dtype, rngs=nnx.Rngs(0))


CONTEXT = {
    "ids": jnp.arange(B * S, dtype=jnp.int32).reshape(B, S),
    "rows": jnp.arange(B, dtype=jnp.int32),
    "key": jax.random.key(4),
}


def test_the_layer_as_the_docstring_shows_it():
    layer = MoE(
        MoEConfig(router="eigen", experts=8, top_k=2, basis=BasisConfig(rank=4)),
        6,
        rngs=nnx.Rngs(0),
    )
    out, aux = jax.jit(lambda x: layer(x))(draw((2, 5, 6)))
    chex.assert_shape(out, (2, 5, 6))
    assert isinstance(aux, Aux)
    chex.assert_shape(aux.stats["load"], (8,))
    assert float(jnp.sum(aux.stats["load"])) == 2 * 5 * 2
    metrics = routing_metrics(aux.stats)
    assert 0 < float(metrics["energy"]) < 1
    assert float(metrics["drop_fraction"]) == 0.0


def test_out_is_the_gated_sum_over_chosen_experts():
    layer, tokens = build(), draw((B, S, D))
    mask = jnp.ones((B, S), bool).at[1, 3:].set(False)
    out, aux = jax.jit(lambda x, m: layer(x, mask=m))(tokens, mask)
    route = jax.jit(layer.router.__call__)
    routing = jax.tree.map(np.asarray, route(tokens.reshape(-1, D), Context(mask)))
    p = {
        name: np.asarray(getattr(layer.experts, name)[...], np.float64)
        for name in ("w_gate", "w_up", "w_down")
    }
    expected = np.zeros((B * S, D))
    for t, h in enumerate(np.asarray(tokens, np.float64).reshape(-1, D)):
        for k, gate_value in zip(routing.indices[t], routing.weights[t], strict=True):
            gate = h @ p["w_gate"][k]
            hidden = gate / (1 + np.exp(-gate)) * (h @ p["w_up"][k])
            expected[t] += float(gate_value) * (hidden @ p["w_down"][k])
    np.testing.assert_allclose(out.reshape(-1, D), expected, rtol=1e-4, atol=1e-5)
    assert not np.any(out[1, 3:])
    assert float(aux.stats["tokens"]) == 8.0


def step(layer):
    """A jitted function of (params, tokens, mask): outputs, aux, gradients of both."""
    graph, params, rest = nnx.split(layer, nnx.Param, RouterState)
    cotangent = draw((B, S, D), 9)

    def loss(params, tokens, mask):
        out, aux = nnx.merge(graph, params, rest)(tokens, mask=mask, **CONTEXT)
        return jnp.sum(out * cotangent) + aux.loss, (out, aux)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)), params


OPTIONS = {
    "switch": RouterConfig(z_weight=0.1, balance_weight=1.0),
    "softmax": RouterConfig(z_weight=0.1, renormalize=True),
}


@pytest.mark.parametrize("router", ROUTERS)
def test_what_padding_holds_changes_nothing(router):
    # Not even in the few slots of capacity 0.6.
    layer = build(
        router,
        "capacity",
        capacity_factor=0.6,
        bias=True,
        routing=OPTIONS.get(router, RouterConfig()),
    )
    run, params = step(layer)
    mask = jnp.ones((B, S), bool).at[0, 1].set(False).at[1, 3:].set(False)
    tokens = draw((B, S, D))
    other = jnp.where(mask[..., None], tokens, 10 * draw((B, S, D), 1))
    (_, (out, aux)), gradients = run(params, tokens, mask)
    (_, (out_other, aux_other)), gradients_other = run(params, other, mask)
    chex.assert_trees_all_equal((out, aux, gradients), (out_other, aux_other, gradients_other))
    assert not np.any(np.asarray(out)[~np.asarray(mask)])
    assert not np.any(np.asarray(gradients[1])[~np.asarray(mask)])
    assert np.any(gradients[1])


def test_gradients_of_the_router_do_not_depend_on_the_dispatcher():
    tokens, mask = draw((B, S, D)), jnp.ones((B, S), bool).at[1, 3:].set(False)
    results = []
    for dispatch in ("dense", "dropless", "capacity"):
        run, params = step(build("eigen", dispatch, capacity_factor=2.0))
        results.append(run(params, tokens, mask))
    for other in results[1:]:
        chex.assert_trees_all_close(results[0], other, rtol=1e-4, atol=1e-5)
    for gradient in jax.tree.leaves(results[0][1][0]["router"]):
        assert np.any(gradient)


def test_no_mask_is_a_mask_of_ones():
    layer, tokens = build("switch"), draw((B, S, D))
    run = jax.jit(lambda x, m: layer(x, mask=m))
    chex.assert_trees_all_equal(run(tokens, None), run(tokens, jnp.ones((B, S), bool)))


def test_a_shared_expert_sees_every_token_also_padding():
    tokens, mask = draw((B, S, D)), jnp.zeros((B, S), bool)
    layer = build(shared_hidden=7)
    out, _ = jax.jit(lambda x, m: layer(x, mask=m))(tokens, mask)
    chex.assert_trees_all_close(out, layer.shared(tokens), rtol=1e-5, atol=1e-6)
    chex.assert_shape(layer.shared.up.kernel[...], (D, 7))
    assert not hasattr(build(), "shared")


def test_drops_are_counted_in_stats():
    # One slot an expert, three experts, twenty assignments: three kept.
    layer = build(dispatch="capacity", capacity_factor=0.1)
    out, aux = jax.jit(lambda x: layer(x))(draw((B, S, D)))
    load = np.asarray(aux.stats["load"])
    assert float(aux.stats["dropped"]) == np.sum(np.maximum(load - 1, 0))
    assert np.sum(np.any(np.asarray(out).reshape(-1, D), axis=1)) <= 3


def test_statistics_pass_no_gradient():
    layer, tokens = build("eigen"), draw((B, S, D))

    def total(tokens):
        stats = layer(tokens)[1].stats
        return sum(jnp.sum(value) for value in stats.values())

    assert not np.any(jax.jit(jax.grad(total))(tokens))


@pytest.mark.parametrize("dispatch", ["dense", "dropless"])
def test_bfloat16_experts_are_near_float32_and_route_alike(dispatch):
    tokens = draw((B, S, D)).astype(jnp.bfloat16)
    low, high = build("eigen", dispatch, "bfloat16"), build("eigen", dispatch)
    out, aux = jax.jit(lambda x: low(x))(tokens)
    expected, aux_expected = jax.jit(lambda x: high(x))(tokens.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    chex.assert_trees_all_close(aux, aux_expected, rtol=1e-5, atol=1e-6)
    largest = float(jnp.max(jnp.abs(expected)))
    gap = jnp.abs(out.astype(jnp.float32) - expected)
    assert float(jnp.max(gap)) < 0.03 * largest
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(low(x)[0].astype(jnp.float32))))(tokens)
    chex.assert_tree_all_finite(gradient)
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("router", "dispatch", "words"),
    [
        ("hash", "dense", "pass ids"),
        ("random", "dense", "pass key"),
        ("expert_choice", "dropless", "set dispatch to 'capacity'"),
    ],
)
def test_what_a_router_misses_is_said(router, dispatch, words):
    with pytest.raises(ValueError, match=words):
        build(router, dispatch)(draw((B, S, D)))


def test_an_unknown_router_is_refused_when_the_layer_is_made():
    with pytest.raises(ValueError, match="router='best' is not known; choose one of whitened"):
        build("best")


def test_a_rank_above_the_width_is_refused_when_the_layer_is_made():
    config = MoEConfig(router="eigen", basis=BasisConfig(rank=7))
    with pytest.raises(ValueError, match=r"basis.rank=7 is more than width=6"):
        MoE(config, D, rngs=nnx.Rngs(0))
