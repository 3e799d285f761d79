"""The training step where parts are frozen: the rest trains as if nothing were."""

import chex
import jax
import numpy as np
import pytest

from emoe_jax import sharding
from emoe_jax.optim import partition
from tests.train.tiny import vit_tree
from tests.train.trainer import EIGEN, OPTIM, Trainer, image_batch, small_tree, text_batch
from train.config import freeze

BRANCHES = ("moe", "alpha", "head")


def adapter_tree(trainable, **changes):
    """A Vision Transformer with an eigenbasis adapter, of which parts are trained.

    Not behind the last block: there the class token would not see the patches any more.
    """
    model = {"patch": 4, "width": 16, "depth": 2, "heads": 2, "mlp_hidden": 16, "moe_blocks": (0,)}
    tree = {
        "model": model | {"pooling": "class", "moe_form": "adapter"},
        "moe": EIGEN | {"experts": 4, "hidden": 8, "dispatch": "dense"},
        "optim": OPTIM | {"trainable": trainable},
    }
    return vit_tree(**tree | changes)


def adapter(trainable, **changes):
    return Trainer(adapter_tree(trainable, **changes))


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


def test_a_branch_that_reaches_no_output_is_not_measured_in_training_and_trains_alike():
    # The branch of block 1, the last, has no gradient; weight decay shrinks it all the same.
    tree = adapter_tree(BRANCHES)
    tree.model.moe_blocks = (0, 1)
    tree.optim.weight_decay = 0.1
    trainer = Trainer(tree)
    state, history = trainer.run([image_batch()])
    assert list(history[0]["router"]) == ["0"]
    before, after = (
        params["blocks"]["groups"]["1"]["moe"]["experts"]["w_up"]
        for params in (trainer.fresh["params"], state["params"])
    )
    shrunk = before * (1 - 0.1 * float(history[0]["learning_rate"]))
    chex.assert_trees_all_close(after, shrunk, rtol=1e-6)


def test_branches_of_the_release_train_on_eight_devices_as_on_one():
    """Parameters, experts and heads are split; so are the moments, which only branches have."""
    assert len(jax.devices()) == 8
    basis = {"rank": 8, "method": "retraction", "companion": True}
    moe = EIGEN | {"basis": basis, "experts": 4, "top_k": 2, "hidden": 8, "activation": "gelu"}
    moe |= {"dispatch": "dropless"}
    tree = adapter_tree(BRANCHES, moe=moe, mesh={"fsdp": 2, "expert": 2, "tensor": 2})
    spread = Trainer(tree, sharding.make_mesh(freeze(tree).mesh))
    alone = Trainer(tree)
    block = spread.start()["params"]["blocks"]["groups"]["0"]
    # Two of the four experts [16,8] on a device, split over the other axes; [16,16] of attention.
    shapes = {
        name: leaf.addressable_shards[0].data.shape
        for name, leaf in (
            ("experts", block["moe"]["experts"]["w_up"]),
            ("query", block["attention"]["query"]["kernel"]),
        )
    }
    assert shapes == {"experts": (1, 2, 8, 4), "query": (1, 8, 8)}

    batches = [image_batch(i) for i in range(3)]
    state, history = spread.run(batches)
    expected, histories = alone.run(batches)
    for ours, theirs in zip(history, histories, strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-5)
    trained, frozen = partition(state["params"], BRANCHES)
    wanted, _ = partition(expected["params"], BRANCHES)
    before, same = partition(alone.fresh["params"], BRANCHES)
    chex.assert_trees_all_equal(frozen, same)
    # P and log_lambda are carried along.
    router = state["router"]["blocks"]["groups"]["0"]["moe"]["router"]
    carried = alone.fresh["router"]["blocks"]["groups"]["0"]["moe"]["router"]
    assert {"companion", "log_lambda"} <= router.keys()
    chex.assert_trees_all_equal(router, carried)
    jax.tree.map(assert_close, trained, wanted)
    jax.tree.map(assert_close, state["opt"]["1"]["0"], expected["opt"]["1"]["0"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained, before)
    assert min(jax.tree.leaves(moved)) > 1e-4


def assert_close(ours, theirs):
    """Within 2e-5 of the tensor's largest entry."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
