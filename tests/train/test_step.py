"""The training step: what it computes does not depend on microbatches, mesh or padding."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from emoe_jax import basis as bases
from emoe_jax import pure, sharding
from emoe_jax.config import BASIS_METHODS
from emoe_jax.optim import make_optimizer, partition
from tests.train.tiny import lm_tree, mesh_of_one, vit_tree
from train.config import freeze
from train.run import model_maker
from train.step import make_steps, microbatches

B, S, N = 8, 16, 258
# A quarter of the time to compile; the programs are too small for their own speed to matter.
FAST_COMPILE: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later compilers do not know it
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False

EIGEN = {"router": "eigen", "basis": {"rank": 8}}
# Adam divides by the root of the second moment: a gradient that is zero but for rounding would
# move its weight by the full learning rate. A large eps makes steps as smooth as the gradients.
OPTIM = {"learning_rate": 1e-2, "warmup": 0, "eps": 1e-2, "clip": 1e6, "b1": 0.5}


@functools.cache
def fresh(config):
    """A new training state, on the host."""
    optimizer = make_optimizer(config.optim, config.steps, config.model.moe.basis.method)

    def init():
        params, router = pure.initializer(model_maker(config.model, config.seed))()
        trained, _ = partition(params, config.optim.trainable)
        opt = serialization.to_state_dict(optimizer.init(trained))
        return {"step": jnp.zeros((), jnp.int32), "params": params, "router": router, "opt": opt}

    return jax.device_get(jax.jit(init, compiler_options=FAST_COMPILE)())


class Trainer:
    """An experiment's step, compiled for a mesh."""

    def __init__(self, tree, mesh=None):
        config = freeze(tree)
        optimizer = make_optimizer(config.optim, config.steps, config.model.moe.basis.method)
        self.model, params, _ = pure.abstract_split(model_maker(config.model, config.seed))
        trained, _ = partition(params, config.optim.trainable)
        opt_state = jax.eval_shape(optimizer.init, trained)
        self.steps = make_steps(config, self.model, optimizer, opt_state)
        self.mesh = mesh_of_one(config.mesh) if mesh is None else mesh
        plain = dataclasses.replace(config, accumulate=1, mesh=sharding.MeshConfig())
        self.fresh = fresh(plain)
        self.places = sharding.shardings(self.mesh, self.fresh)
        self.train = jax.jit(
            self.steps.train,
            donate_argnums=0,
            out_shardings=(self.places, None),
            compiler_options=FAST_COMPILE,
        )

    def start(self):
        return jax.device_put(self.fresh, self.places)

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
def trainer(router, accumulate=1):
    moe = EIGEN if router == "eigen" else {"router": router}
    return Trainer(small_tree(moe, accumulate=accumulate))


@functools.cache
def trained(router, accumulate=1):
    """Three steps; cached, as several tests compare with the same."""
    return trainer(router, accumulate).run([text_batch(i) for i in range(3)])


@pytest.mark.parametrize("router", ["loss_free", "eigen", "random"])
def test_four_microbatches_equal_one_batch(router):
    state, history = trained(router)
    other, others = trained(router, 4)
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
    assert float(history[0]["learning_rate"]) == pytest.approx(1e-2)
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

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
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


@pytest.mark.parametrize(
    ("router", "mesh", "shard"),
    [
        ("loss_free", {"data": 2, "fsdp": 2, "tensor": 2}, (1, 8, 8)),
        ("eigen", {"data": 2, "expert": 4}, (1, 16, 16)),
        ("eigen", {"fsdp": 2, "expert": 2, "tensor": 2}, (1, 8, 8)),
    ],
)
def test_eight_devices_equal_one(router, mesh, shard):
    assert len(jax.devices()) == 8
    moe = (EIGEN if router == "eigen" else {"router": router}) | {"dispatch": "dropless"}
    tree = small_tree(moe, mesh=mesh)
    spread = Trainer(tree, sharding.make_mesh(freeze(tree).mesh))
    kernel = spread.start()["params"]["blocks"]["groups"]["0"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == shard  # [1,16,16] over fsdp and tensor
    state, history = spread.run([text_batch(i) for i in range(3)])
    alone, histories = trained(router)
    chex.assert_trees_all_close(state["params"], alone["params"], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state["router"], alone["router"], rtol=1e-5)
    chex.assert_trees_all_close(history, histories, rtol=1e-4, atol=1e-5)


def test_the_state_is_donated():
    state = trainer("loss_free").start()
    old = jax.tree.leaves(state)
    new, _ = trainer("loss_free").train(state, text_batch(), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("router", ["loss_free", "eigen", "random"])
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

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
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

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def plain(state):
        lm = own.model.bind(state["params"], state["router"])
        logits, _ = lm(batch["tokens"], positions=batch["positions"], segments=batch["segments"])
        return jax.nn.log_softmax(logits)

    logs = np.asarray(plain(own.fresh))
    losses = -np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
    evaluate = jax.jit(own.steps.evaluate, compiler_options=FAST_COMPILE)
    batch["scored"] = scored
    some = evaluate(own.fresh["params"], own.fresh["router"], batch, jax.random.key(0))
    assert float(some["sums"]["count"]) == 16
    assert float(some["sums"]["loss"]) == pytest.approx(losses[scored].sum(), rel=1e-5)
    # Context that is not scored is still routed, and counted; padding is not.
    assert float(some["aux"]["0"].stats["tokens"][0]) == B * 13


# ------------------------------------------------------------------------------------ frozen parts

BRANCHES = ("moe", "alpha", "head")


def adapter(trainable, **changes):
    """A Vision Transformer with an eigenbasis adapter, of which parts are trained.

    Not behind the last block: there the class token would not see the patches any more.
    """
    model = {"patch": 4, "width": 16, "depth": 2, "heads": 2, "mlp_hidden": 16, "moe_blocks": (0,)}
    tree = {
        "model": model | {"pooling": "class", "moe_form": "adapter"},
        "moe": EIGEN | {"experts": 4, "hidden": 8, "dispatch": "dense"},
        "optim": OPTIM | {"trainable": trainable},
    }
    return Trainer(vit_tree(**tree | changes))


def test_frozen_parameters_keep_their_bits_and_have_no_moments():
    own = adapter(BRANCHES, accumulate=2)
    state, history = own.run([image_batch(i) for i in range(3)])
    trained, frozen = partition(state["params"], BRANCHES)
    before, same = partition(own.fresh["params"], BRANCHES)
    chex.assert_trees_all_equal(frozen, same)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained, before)
    assert min(jax.tree.leaves(moved)) > 0
    moments = state["opt"]["1"]["0"]
    chex.assert_trees_all_equal_shapes(moments["mu"], trained)
    chex.assert_trees_all_equal_shapes(moments["nu"], trained)
    counts = len(jax.tree.leaves(state["opt"])) - 2 * len(jax.tree.leaves(trained))
    assert counts == 2
    assert history[0]["router"]["0"]["orthonormality_error"].max() < 1e-5


def test_trained_parameters_have_the_gradients_of_the_whole():
    batch = image_batch()
    some, _ = adapter(BRANCHES).run([batch])
    every, history = adapter(()).run([batch])
    moments = every["opt"]["1"]["0"]["mu"]
    wanted, _ = partition(moments, BRANCHES)
    chex.assert_trees_all_close(some["opt"]["1"]["0"]["mu"], wanted, rtol=1e-4, atol=1e-8)
    # b1 = 0.5: the first moment is half of the gradient.
    total = sum(float(np.sum(np.square(2 * leaf))) for leaf in jax.tree.leaves(moments))
    assert float(history[0]["grad_norm"]) == pytest.approx(total**0.5, rel=1e-4)


def traced(own):
    batch = image_batch()
    state = jax.eval_shape(lambda: own.fresh)
    step = jax.make_jaxpr(own.steps.train, return_shape=True)
    jaxpr, _ = step(state, batch, jax.random.key(0))
    forward = jax.make_jaxpr(own.steps.evaluate)
    return jaxpr, forward(state["params"], state["router"], batch, jax.random.key(0)), state


def test_no_gradient_is_computed_for_what_is_frozen():
    whole, head = traced(adapter(())), traced(adapter(("head",)))
    # Beyond the forward pass: the gradient of the head's kernel.
    assert str(head[0]).count("dot_general") == str(head[1]).count("dot_general") + 1
    assert str(whole[0]).count("dot_general") > 2 * str(whole[1]).count("dot_general")
    # The step hands the frozen arrays on, untouched.
    jaxpr, _, state = head
    frozen = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path({"params": state["params"]})
        if "head" not in jax.tree_util.keystr(path)
    }
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    outputs = dict(zip(paths, jaxpr.jaxpr.outvars, strict=False))
    inputs = dict(zip(paths, jaxpr.jaxpr.invars, strict=False))
    assert len(frozen) > 20
    assert all(outputs[path] is inputs[path] for path in frozen)


def test_a_frozen_basis_is_orthonormal_in_the_pass_and_as_it_was_in_the_state():
    own = adapter(("head",))
    own.fresh = jax.tree.map(np.copy, own.fresh)
    router = own.fresh["params"]["blocks"]["groups"]["0"]["moe"]["router"]
    router["basis"] *= 2
    state, history = own.run([image_batch()])
    after = state["params"]["blocks"]["groups"]["0"]["moe"]["router"]
    assert history[0]["router"]["0"]["orthonormality_error"].max() < 1e-5
    np.testing.assert_array_equal(after["basis"], router["basis"])


def test_a_part_of_blocks_that_are_scanned_is_trained():
    own = Trainer(small_tree(EIGEN, model={"depth": 2}, optim=OPTIM | {"trainable": ("experts",)}))
    state, _ = own.run([text_batch()])
    trained, frozen = partition(state["params"], ("experts",))
    before, same = partition(own.fresh["params"], ("experts",))
    chex.assert_trees_all_equal(frozen, same)
    assert trained["blocks"]["groups"]["0"]["moe"]["experts"]["w_up"].shape[0] == 2
    assert not np.array_equal(*[jax.tree.leaves(tree)[0] for tree in (trained, before)])
