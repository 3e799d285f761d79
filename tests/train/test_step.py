"""The training step: what it computes does not depend on microbatches, mesh or padding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax import basis as bases
from emoe_jax import pure, sharding
from emoe_jax.config import BASIS_METHODS
from emoe_jax.optim import make_optimizer
from tests.train.tiny import lm_tree, mesh_of_one, vit_tree
from train.config import freeze
from train.run import model_maker
from train.step import make_steps, microbatches

B, S, N = 8, 16, 258
FAST_COMPILE = {"xla_backend_optimization_level": 0}

EIGEN = {"router": "eigen", "basis": {"rank": 8}}
# Adam divides by the root of the second moment: a gradient that is zero but for rounding would
# move its weight by the full learning rate. A large eps makes steps as smooth as the gradients.
OPTIM = {"learning_rate": 1e-2, "warmup": 0, "eps": 1e-2}


class Trainer:
    """An experiment's step, compiled for a mesh."""

    def __init__(self, tree, mesh=None):
        self.config = freeze(tree)
        model = self.config.model
        self.optimizer = make_optimizer(self.config.optim, 24, model.moe.basis.method)
        self.make = model_maker(model, self.config.seed)
        self.model, params, _ = pure.abstract_split(self.make)
        opt_state = jax.eval_shape(self.optimizer.init, params)
        self.steps = make_steps(self.config, self.model, self.optimizer, opt_state)
        self.mesh = mesh_of_one(self.config.mesh) if mesh is None else mesh
        places = sharding.shardings(self.mesh, jax.eval_shape(self.init))
        options = {"compiler_options": FAST_COMPILE}
        self.start = jax.jit(self.init, out_shardings=places, **options)
        self.train = jax.jit(
            self.steps.train, donate_argnums=0, out_shardings=(places, None), **options
        )

    def init(self):
        from flax import serialization

        params, router = pure.initializer(self.make)()
        opt = serialization.to_state_dict(self.optimizer.init(params))
        return {"step": jnp.zeros((), jnp.int32), "params": params, "router": router, "opt": opt}

    def run(self, batches):
        state, history = self.start(), []
        where = sharding.batch_sharding(self.mesh)
        for batch in batches:
            state, metrics = self.train(state, jax.device_put(batch, where), jax.random.key(0))
            history.append(jax.device_get(metrics))
        return jax.device_get(state), history


def text_batch(seed=0):
    """Two documents a row and a few positions of padding."""
    draw = np.random.default_rng(seed)
    tokens, targets = draw.integers(0, N, (2, B, S)).astype(np.int32)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [7, 6, 3]), (B, S)).astype(np.int32)
    positions = np.broadcast_to(np.r_[0:7, 0:6, 0:3], (B, S)).astype(np.int32)
    rows = np.arange(B, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": targets,
        "segments": segments,
        "positions": positions,
        "rows": rows,
    }


def image_batch(seed=0):
    draw = np.random.default_rng(seed)
    labels = np.eye(10, dtype=np.float32)[draw.integers(0, 10, B)]
    images = draw.normal(size=(B, 8, 8, 1)).astype(np.float32)
    return {"images": images, "labels": labels, "rows": np.arange(B, dtype=np.int32)}


def small_tree(moe, **changes):
    changes = {"optim": OPTIM, "data": {"sequence_length": S}} | changes
    changes["model"] = {"depth": 1, "loss_chunk": 64} | changes.get("model", {})
    return lm_tree(moe=moe, **changes)


@functools.cache
def trained(router, **changes):
    """Three steps of a router; cached, as several tests compare with the same."""
    moe = EIGEN if router == "eigen" else {"router": router}
    return Trainer(small_tree(moe, **changes)).run([text_batch(i) for i in range(3)])


@pytest.mark.parametrize("router", ["loss_free", "eigen", "random"])
def test_four_microbatches_equal_one_batch(router):
    state, history = trained(router)
    other, others = trained(router, accumulate=4)
    chex.assert_trees_all_close(other["params"], state["params"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(other["router"], state["router"], rtol=1e-5)
    chex.assert_trees_all_close(others, history, rtol=2e-5, atol=1e-6)
    assert int(other["step"]) == 3


def test_strided_microbatches_hold_every_row_once():
    parts = microbatches({"rows": jnp.arange(8)}, 4)["rows"]
    np.testing.assert_array_equal(parts, [[0, 4], [1, 5], [2, 6], [3, 7]])


def test_metrics_are_all_there_and_agree_with_each_other():
    _, history = trained("loss_free")
    names = {"loss", "penalty", "grad_norm", "learning_rate", "router"}
    assert history[0].keys() == names
    layers = history[0]["router"]["0"]
    assert layers.keys() == {
        *("load", "max_vio", "cv", "entropy", "dead", "drop_fraction", "gate"),
    }
    assert layers["load"].shape == (1, 4)
    np.testing.assert_allclose(layers["load"].sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(layers["max_vio"], 4 * layers["load"].max(axis=-1) - 1, rtol=1e-5)
    # Fresh weights know nothing of the 258 ids: about ln 258 nats a target.
    assert history[0]["loss"] == pytest.approx(np.log(N), rel=0.05)
    assert [float(m["learning_rate"]) for m in history][0] == pytest.approx(1e-2)
    _, eigen = trained("eigen")
    assert {"energy", "orthonormality_error"} < eigen[0]["router"]["0"].keys()
    assert 0 < eigen[0]["router"]["0"]["energy"][0] < 1


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
    trainer = Trainer(small_tree(moe, optim=optim))
    before = jax.device_get(trainer.start())["params"]["blocks"]["groups"]["0"]["moe"]["router"]
    state, history = trainer.run([text_batch(i) for i in range(6)])
    after = state["params"]["blocks"]["groups"]["0"]["moe"]["router"]
    assert float(jnp.max(bases.orthonormality_error(after["basis"]))) < 1e-5
    assert all(m["router"]["0"]["orthonormality_error"].max() < 1e-5 for m in history)
    assert np.abs(after["basis"] - before["basis"]).max() > 0.05


def test_one_pull_back_equals_plain_differentiation():
    """The step's first moment is (1 - b1) of the clipped gradient: compare it with autodiff."""
    optim = OPTIM | {"clip": 1e6, "b1": 0.5}
    trainer = Trainer(small_tree(EIGEN, optim=optim, accumulate=2))
    batch = text_batch()
    state, _ = trainer.run([batch])
    start = trainer.start()

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    @jax.grad
    def gradient(params):
        model = trainer.model.bind(bases.prepare_bases(params), start["router"])
        weights = (batch["segments"] > 0).astype(np.float32)
        nll, aux = model.nll(batch, weights, None)
        return nll / weights.sum() + sum(jnp.sum(layer.loss) for layer in aux.values())

    moments = state["opt"]["1"]["0"]["mu"]
    expected = jax.tree.map(lambda leaf: 0.5 * leaf, gradient(start["params"]))
    assert jnp.max(jnp.abs(expected["blocks"]["groups"]["0"]["moe"]["router"]["basis"])) > 0
    chex.assert_trees_all_close(moments, jax.device_get(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("moe", [{"router": "loss_free", "dispatch": "dropless"}, EIGEN])
def test_eight_devices_equal_one(moe):
    assert len(jax.devices()) == 8
    tree = small_tree(moe, mesh={"data": 2, "fsdp": 2, "tensor": 2}, model={"kv_heads": 2})
    tree.model.depth = 1
    batches = [
        {k: np.where(v >= 256, 0, v) if k == "targets" else v for k, v in text_batch(i).items()}
        for i in range(3)
    ]
    mesh = sharding.make_mesh(freeze(tree).mesh)
    spread = Trainer(tree, mesh)
    kernel = spread.start()["params"]["blocks"]["groups"]["0"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 8, 8)  # [1,16,16] over fsdp and tensor
    state, history = spread.run(batches)
    alone, histories = Trainer(tree).run(batches)
    chex.assert_trees_all_close(state["params"], alone["params"], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state["router"], alone["router"], rtol=1e-5)
    chex.assert_trees_all_close(history, histories, rtol=1e-4, atol=1e-5)


def test_the_state_is_donated():
    trainer = Trainer(small_tree({"router": "hash"}))
    state = trainer.start()
    old = jax.tree.leaves(state["params"])
    new, _ = trainer.train(state, text_batch(), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("router", ["loss_free", "eigen", "random"])
def test_what_padding_holds_changes_nothing(router):
    moe = EIGEN if router == "eigen" else {"router": router}
    padded = []
    for i in range(3):
        batch = text_batch(i)
        blank = batch["segments"] == 0
        batch["tokens"] = np.where(blank, 255, batch["tokens"]).astype(np.int32)
        batch["targets"] = np.where(blank, 7, batch["targets"]).astype(np.int32)
        padded.append(batch)
    state, history = trained(router)
    other, others = Trainer(small_tree(moe)).run(padded)
    chex.assert_trees_all_close(other["params"], state["params"], rtol=1e-6, atol=1e-8)
    chex.assert_trees_all_equal(other["router"], state["router"])
    chex.assert_trees_all_close(others, history, rtol=1e-6, atol=1e-8)


def test_random_routes_follow_seed_and_step():
    _, history = trained("random")
    loads = [m["router"]["0"]["load"] for m in history]
    assert not np.array_equal(loads[0], loads[1])
    _, again = Trainer(small_tree({"router": "random"})).run([text_batch(0)])
    np.testing.assert_array_equal(again[0]["router"]["0"]["load"], loads[0])


def test_images_have_accuracy_and_count_every_row():
    trainer = Trainer(vit_tree(optim=OPTIM))
    batch = image_batch()
    before = jax.device_get(trainer.start())
    state, history = trainer.run([batch])
    logits, _ = jax.jit(
        lambda tree: trainer.model.bind(tree["params"], tree["router"])(batch["images"])
    )(before)
    right = np.argmax(logits, -1) == np.argmax(batch["labels"], -1)
    assert history[0]["accuracy"] == pytest.approx(right.mean())
    logs = jax.nn.log_softmax(logits)
    assert history[0]["loss"] == pytest.approx(-(logs * batch["labels"]).sum() / B, rel=1e-5)
    assert int(state["step"]) == 1


def test_evaluation_counts_only_what_is_scored():
    trainer = Trainer(small_tree({"router": "loss_free"}))
    batch = text_batch()
    scored = np.zeros((B, S), bool)
    scored[:4, 3:7] = True
    start = trainer.start()
    evaluate = jax.jit(trainer.steps.evaluate, compiler_options=FAST_COMPILE)
    whole = evaluate(start["params"], start["router"], batch, jax.random.key(0))
    some = evaluate(
        start["params"], start["router"], batch | {"scored": scored}, jax.random.key(0)
    )
    assert float(some["sums"]["count"]) == 16
    assert float(whole["sums"]["count"]) == B * 13
    model = trainer.model.bind(start["params"], start["router"])
    logits, _ = model(batch["tokens"], positions=batch["positions"], segments=batch["segments"])
    losses = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1
    )[..., 0]
    assert float(some["sums"]["loss"]) == pytest.approx(losses[scored].sum(), rel=1e-5)
    assert float(whole["sums"]["loss"]) == pytest.approx(
        losses[batch["segments"] > 0].sum(), rel=1e-5
    )
    # Context that is not scored is still routed, and counted as tokens.
    chex.assert_trees_all_equal(some["aux"], whole["aux"])
