"""The training step: what it computes does not depend on microbatches, mesh or padding."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax import basis as bases
from emoe_jax import sharding
from emoe_jax.config import BASIS_METHODS, BASIS_ROUTERS, LMConfig, MoEConfig
from tests.train.tiny import vit_tree
from tests.train.trainer import (
    EIGEN,
    OPTIM,
    B,
    S,
    Trainer,
    image_batch,
    small_tree,
    text_batch,
)
from train import step as step_module
from train.step import microbatches

ROUTERS = ["loss_free", "eigen", "whitened", "learned", "softmax_offset", "random"]


@functools.cache
def trainer(router, accumulate=1):
    # With rank 8 of width 16 a basis moves.
    moe = EIGEN | {"router": router} if router in BASIS_ROUTERS else {"router": router}
    if router == "learned":
        moe = EIGEN | {"router": "whitened", "routing": {"subspace": "learned"}}
    return Trainer(small_tree(moe, accumulate=accumulate))


@functools.cache
def trained(router, accumulate=1):
    """Three steps; cached, as several tests compare with the same."""
    return trainer(router, accumulate).run([text_batch(i) for i in range(3)])


@pytest.mark.parametrize("router", ROUTERS)
def test_four_microbatches_equal_one_batch(router):
    state, history = trained(router)
    other, others = trained(router, 4)
    chex.assert_trees_all_close(other["params"], state["params"], rtol=1e-5, atol=1e-6)
    # Whitening divides by small eigenvalues, which rounding moves by more of themselves.
    slack = 1e-5 if router in ("whitened", "learned") else 0
    chex.assert_trees_all_close(other["router"], state["router"], rtol=1e-5, atol=slack)
    # Slots are counted in each microbatch, which has its own load.
    alike = [jax.tree.map(lambda leaf: leaf, each) for each in (*history, *others)]
    for metrics in alike:
        for layer in metrics["router"].values():
            layer.pop("drop_at_capacity")
    chex.assert_trees_all_close(alike[3:], alike[:3], rtol=2e-5, atol=1e-6)
    assert int(other["step"]) == 3


@jax.custom_vjp
def spoil(x, bad):
    """x, with a gradient that is not a number where a batch is bad."""
    return x


spoil.defvjp(lambda x, bad: (x, bad), lambda bad, ct: (jnp.where(bad, jnp.nan, ct), None))

GUARDED = {
    "alone": ({}, None),
    # One row in one microbatch on one shard is bad.
    "spread": (
        {"accumulate": 2, "model": {"remat": "full"}},
        sharding.MeshConfig(fsdp=2, expert=2, tensor=2),
    ),
}


@functools.cache
def guarded(case):
    """A trainer for which a batch with row 100 has a gradient that is not finite, in one weight."""
    changes, mesh = GUARDED[case]
    objective = step_module._objective

    def spoilt(config, pure, params, router, batch, *rest):
        scale = params["norm"]["scale"]
        weight = spoil(scale[0], jnp.any(batch["rows"] == 100))
        params = params | {"norm": {"scale": scale.at[0].set(weight)}}
        return objective(config, pure, params, router, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "_objective", spoilt)
        own = Trainer(
            small_tree({"router": "whitened"}, **changes),
            mesh=None if mesh is None else sharding.make_mesh(mesh),
        )
        own.run([text_batch()])  # traced while it is patched
    return own


def bad_gradient(seed):
    batch = text_batch(seed)
    batch["rows"] = np.where(batch["rows"] == 3, 100, batch["rows"]).astype(np.int32)
    return batch


@pytest.mark.parametrize("case", GUARDED)
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count_of_steps(case):
    own, good = guarded(case), text_batch(0)
    state, _ = own.run([good])
    other, history = own.run([good, bad_gradient(1), bad_gradient(2)])
    assert (int(state.pop("step")), int(other.pop("step"))) == (1, 3)
    chex.assert_trees_all_equal(other, state)
    assert [float(metrics["skipped"]) for metrics in history] == [0.0, 1.0, 1.0]
    assert np.isfinite([metrics["loss"] for metrics in history]).all()
    assert np.isnan(history[1]["grad_norm"])
    # The schedule counts the updates that were made.
    assert history[2]["learning_rate"] == history[1]["learning_rate"] < history[0]["learning_rate"]
    _, history = own.run([good, bad_gradient(1), text_batch(2)])
    assert [float(metrics["skipped"]) for metrics in history] == [0.0, 1.0, 0.0]
    assert np.isfinite(history[2]["grad_norm"])


def test_strided_microbatches_hold_every_row_once():
    parts = microbatches({"rows": jnp.arange(8)}, 4)["rows"]
    np.testing.assert_array_equal(parts, [[0, 4], [1, 5], [2, 6], [3, 7]])


def test_metrics_are_all_there_and_agree_with_each_other():
    _, history = trained("loss_free")
    names = {"loss", "penalty", "grad_norm", "learning_rate", "skipped", "router"}
    assert history[0].keys() == names
    layers = history[0]["router"]["0"]
    assert layers.keys() == {
        *("load", "max_vio", "cv", "entropy", "dead"),
        *("drop_fraction", "overflow_fraction", "drop_at_capacity", "gate"),
    }
    assert layers["load"].shape == (1, 4)
    np.testing.assert_allclose(layers["load"].sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(layers["max_vio"], 4 * layers["load"].max(axis=-1) - 1, rtol=1e-5)
    assert float(history[0]["learning_rate"]) == pytest.approx(1e-2)
    _, eigen = trained("eigen")
    assert {"energy", "orthonormality_error"} < eigen[0]["router"]["0"].keys()
    assert 0 < eigen[0]["router"]["0"]["energy"][0] < 1


@pytest.mark.parametrize(
    ("subspace", "told"), [("tracked", False), ("fixed", False), ("learned", True)]
)
def test_a_step_checks_only_the_bases_that_are_parameters(subspace, told):
    moe = {"router": "whitened", "basis": {"rank": 4}, "routing": {"subspace": subspace}}
    own = Trainer(small_tree(moe))
    state = jax.eval_shape(lambda: own.fresh)
    key = jax.random.key(0)
    _, metrics = jax.eval_shape(own.steps.train, state, text_batch(), key)
    assert ("orthonormality_error" in metrics["router"]["0"]) == told
    sums = jax.eval_shape(own.steps.evaluate, state["params"], state["router"], text_batch(), key)
    assert "orthonormality_error" in sums["aux"]["0"].metrics


def test_the_selection_bias_moves_against_the_load():
    state, history = trained("loss_free")
    bias = state["router"]["blocks"]["groups"]["0"]["moe"]["router"]["bias"][0]
    loads = [m["router"]["0"]["load"][0] for m in history]
    expected = sum(0.001 * np.sign(0.25 - load) for load in loads)
    np.testing.assert_allclose(bias, expected, atol=1e-7)


@pytest.mark.parametrize("method", BASIS_METHODS)
def test_bases_stay_orthonormal(method):
    moe = {"router": "eigen", "basis": {"rank": 8, "method": method}}
    optim = OPTIM | {"learning_rate": 0.3, "eps": 1e-8}
    own = Trainer(small_tree(moe, optim=optim))
    before = own.fresh["params"]["blocks"]["groups"]["0"]["moe"]["router"]
    state, history = own.run([text_batch(i) for i in range(6)])
    after = state["params"]["blocks"]["groups"]["0"]["moe"]["router"]
    assert float(jnp.max(bases.orthonormality_error(after["basis"]))) < 1e-5
    assert all(m["router"]["0"]["orthonormality_error"].max() < 1e-5 for m in history)
    assert np.abs(after["basis"] - before["basis"]).max() > 0.05


def test_one_pull_back_equals_plain_differentiation():
    """The first moment after one step is (1 - b1) of the gradient: compare it with autodiff."""
    batch = text_batch()
    state, _ = trainer("eigen", 4).run([batch])
    model, start = trainer("eigen", 4).model, trainer("eigen", 4).fresh

    @jax.jit
    @jax.grad
    def gradient(params):
        weights = (batch["segments"] > 0).astype(np.float32)
        lm = model.bind(bases.prepare_bases(params), start["router"])
        nll, aux = lm.nll(batch, weights, None)
        return nll / weights.sum() + sum(jnp.sum(layer.loss) for layer in aux.values())

    expected = jax.tree.map(lambda leaf: 0.5 * leaf, jax.device_get(gradient(start["params"])))
    router = expected["blocks"]["groups"]["0"]["moe"]["router"]
    assert np.abs(router["basis"]).max() > 1e-6
    chex.assert_trees_all_close(state["opt"]["1"]["0"]["mu"], expected, rtol=1e-4, atol=1e-7)


def test_the_state_is_donated():
    state = trainer("loss_free").start()
    old = jax.tree.leaves(state)
    new, _ = trainer("loss_free").train(state, text_batch(), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("router", ["loss_free", "eigen", "whitened", "softmax_offset", "random"])
def test_what_padding_holds_changes_nothing(router):
    padded = []
    for i in range(3):
        batch = text_batch(i)
        blank = batch["segments"] == 0
        batch["tokens"] = np.where(blank, 255, batch["tokens"]).astype(np.int32)
        batch["targets"] = np.where(blank, 7, batch["targets"]).astype(np.int32)
        padded.append(batch)
    state, history = trained(router)
    other, others = trainer(router).run(padded)
    chex.assert_trees_all_close(other["params"], state["params"], rtol=1e-6, atol=1e-8)
    chex.assert_trees_all_equal(other["router"], state["router"])
    chex.assert_trees_all_close(others, history, rtol=1e-6, atol=1e-8)


def test_routes_drawn_at_random_follow_the_step():
    same = [text_batch(0), text_batch(0)]
    _, history = trainer("random").run(same)
    loads = [metrics["router"]["0"]["load"] for metrics in history]
    assert not np.array_equal(loads[0], loads[1])
    _, again = trainer("random").run(same)
    chex.assert_trees_all_equal(again, history)


def test_a_router_without_parameters_trains():
    _, history = trainer("hash").run([text_batch(0)])
    assert np.isfinite(history[0]["loss"])
    np.testing.assert_allclose(history[0]["router"]["0"]["gate"], 0.5, rtol=1e-6)  # 1/K


def test_images_have_accuracy_and_count_every_row():
    own = Trainer(vit_tree(optim=OPTIM))
    batch = image_batch()

    @jax.jit
    def plain(state):
        logits, _ = own.model.bind(state["params"], state["router"])(batch["images"])
        return logits, jax.nn.log_softmax(logits)

    logits, logs = map(np.asarray, plain(own.fresh))
    _, history = own.run([batch])
    right = np.argmax(logits, -1) == np.argmax(batch["labels"], -1)
    assert float(history[0]["accuracy"]) == pytest.approx(right.mean())
    expected = -(logs * batch["labels"]).sum() / B
    assert float(history[0]["loss"]) == pytest.approx(expected, rel=1e-5)


def test_evaluation_counts_only_what_is_scored():
    own, batch = trainer("loss_free"), text_batch()
    scored = np.zeros((B, S), bool)
    scored[:4, 3:7] = True

    @jax.jit
    def plain(state):
        lm = own.model.bind(state["params"], state["router"])
        logits, _ = lm(batch["tokens"], positions=batch["positions"], segments=batch["segments"])
        return jax.nn.log_softmax(logits)

    logs = np.asarray(plain(own.fresh))
    losses = -np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
    evaluate = jax.jit(own.steps.evaluate)
    batch["scored"] = scored
    some = evaluate(own.fresh["params"], own.fresh["router"], batch, jax.random.key(0))
    assert float(some["sums"]["count"]) == 16
    assert float(some["sums"]["loss"]) == pytest.approx(losses[scored].sum(), rel=1e-5)
    # Context that is not scored is still routed, and counted; padding is not.
    assert float(some["aux"]["0"].stats["tokens"][0]) == B * 13


# --- compiler options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "platform", "devices", "asked"),
    [
        ({"exchange_chunks": 2}, "tpu", 4, True),
        ({"exchange_chunks": 1}, "tpu", 4, False),
        ({"exchange_chunks": 2}, "tpu", 1, False),
        ({"exchange_chunks": 2}, "gpu", 4, False),
        ({"exchange_chunks": 2}, "cpu", 4, False),
    ],
)
def test_chunks_on_tpu_ask_for_exchanges_that_are_not_waited_for(changes, platform, devices, asked):
    model = LMConfig(depth=2, moe_every=1, moe=MoEConfig(experts=4, **changes))
    options = step_module.compiler_options(model, platform, devices)
    names = {"xla_tpu_enable_async_all_to_all", "xla_tpu_enable_async_ragged_all_to_all"}
    assert options == (dict.fromkeys(names, True) if asked else {})
    dense = dataclasses.replace(model, moe_every=0, moe_blocks=())
    assert step_module.compiler_options(dense, platform, devices) == {}
