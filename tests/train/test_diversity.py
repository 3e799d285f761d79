"""Diversity of experts: arithmetic by hand, a plain computation, and what training does to it."""

import functools
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from tests.train.tiny import lm_tree, vit_tree
from train import diversity, evaluate, run
from train.config import freeze
from train.diversity import expert_similarity, mean_similarity, swap_cost
from train.loop import train


@functools.cache
def loaded(workdir):
    return run.load_trained(workdir, {})


def with_experts(state, change):
    """A state whose experts' arrays are changed: change(name, array [repeats,E,...])."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(path[-1].key, leaf) if "experts" in str(path) else leaf,
        state["params"],
    )
    return {"params": params, "router": state["router"]}


def test_positions_are_evenly_spaced_among_the_real_ones():
    # The real positions are 1, 2, 4, 5, 7 and 8; three of six are wanted: ranks 0, 2 and 4.
    real = jnp.array([False, True, True, False, True, True, False, True, True])
    positions, counted = diversity.sample_positions(real, 3)
    assert positions.tolist() == [1, 4, 7]
    assert counted.tolist() == [True, True, True]


def test_no_position_counts_twice_where_few_are_real():
    # Two real ones for four places: ranks 0, 0, 1, 1.
    real = jnp.array([False, False, True, False, True])
    positions, counted = diversity.sample_positions(real, 4)
    assert positions.tolist() == [2, 2, 4, 4]
    assert counted.tolist() == [True, False, True, False]


@hypothesis.given(
    real=strategies.lists(strategies.booleans(), min_size=20, max_size=20),
    most=strategies.sampled_from([1, 7, 30]),
)
def test_positions_counted_are_real_different_and_as_many_as_can_be(real, most):
    positions, counted = diversity.sample_positions(jnp.array(real), most)
    chosen = np.asarray(positions)[np.asarray(counted)].tolist()
    assert len(set(chosen)) == len(chosen) == min(most, sum(real))
    assert all(real[position] for position in chosen)


def test_similarity_of_a_matrix_leaves_out_the_diagonal():
    matrix = np.array([[1.0, 0.2, -0.1], [0.2, 1.0, 0.5], [-0.1, 0.5, 1.0]])
    assert mean_similarity(matrix) == pytest.approx((0.2 - 0.1 + 0.5) / 3)
    assert np.isnan(mean_similarity(np.ones((1, 1))))


def test_experts_that_are_equal_or_opposite_have_cosines_of_one_and_minus_one(finished, one_device):
    this, state, _ = loaded(finished.workdir)
    # Four experts with the matrices of the first; the outputs of the last two change their sign.
    sign = np.array([1, 1, -1, -1], np.float32)[None, :, None, None]

    def change(name, leaf):
        same = jnp.broadcast_to(leaf[:, :1], leaf.shape)
        return same * sign if name == "w_down" else same

    expected = np.outer(sign.ravel(), sign.ravel())
    similarity = expert_similarity(this, with_experts(state, change), batches=1)
    assert list(similarity) == ["layer_00", "layer_01"]
    for matrix in similarity.values():
        np.testing.assert_allclose(matrix, expected, atol=1e-5)
        # Two pairs agree and four are opposite.
        assert mean_similarity(matrix) == pytest.approx((2 - 4) / 6, abs=1e-5)


def test_similarity_equals_a_plain_computation(finished, one_device):
    this, state, _ = loaded(finished.workdir)
    model = this.model.bind(state["params"], state["router"])
    cosines, count = np.zeros((4, 4)), 0
    for batch in list(this.data.heldout_batches(this.eval_batch))[:2]:
        # The first block by hand: what goes into its experts is the norm of what attention leaves.
        block = jax.tree.map(lambda leaf: leaf[0], model.blocks.groups[0])
        x = model._embed(batch["tokens"])
        x = x + block.attention(block.norm_attention(x), batch["positions"], batch["segments"])
        tokens = np.asarray(block.norm_mlp(x))[batch["segments"] > 0]
        assert tokens.shape[0] <= diversity.SAMPLE
        weights = {k: np.asarray(v) for k, v in block.moe.experts.weights().items()}
        up = np.einsum("td,edf->etf", tokens, weights["w_up"])
        gate = np.einsum("td,edf->etf", tokens, weights["w_gate"])
        hidden = gate / (1 + np.exp(-gate)) * up
        out = np.einsum("etf,efd->etd", hidden, weights["w_down"])
        out /= np.linalg.norm(out, axis=-1, keepdims=True)
        cosines += np.einsum("etd,ftd->ef", out, out)
        count += tokens.shape[0]
    similarity = expert_similarity(this, state, batches=2)
    np.testing.assert_allclose(similarity["layer_00"], cosines / count, atol=1e-5)
    assert np.all(np.abs(similarity["layer_01"]) <= 1 + 1e-6)


def test_a_rolled_expert_stands_one_place_on():
    leaf = jnp.arange(6.0).reshape(1, 3, 2)
    kernel = jnp.ones((1, 3, 2))
    tree = {"moe": {"experts": {"w_up": leaf}, "router": {"kernel": kernel}}}
    rolled = diversity.roll_experts(tree)["moe"]
    assert rolled["experts"]["w_up"].tolist() == [[[4, 5], [0, 1], [2, 3]]]
    assert rolled["router"]["kernel"] is kernel


def test_swapping_costs_the_difference_of_two_losses_on_the_same_batches(monkeypatch):
    # Batches of 1, 3 and 5 targets; a target costs 1 nat, or 1.5 where the first expert has gone.
    monkeypatch.setattr(diversity, "heldout", lambda run: iter([1.0, 3.0, 5.0]))
    scored = []

    def step(params, router, batch, key):
        scored.append(batch)
        each = 1.0 if params["experts"]["w_up"][0, 0] == 0 else 1.5
        return {"sums": {"loss": each * batch, "count": batch}}

    this = types.SimpleNamespace(to_devices=lambda batch, _: batch, eval_batch=1, key=lambda: None)
    state = {"params": {"experts": {"w_up": jnp.arange(3.0)[None]}}, "router": {}}
    evaluator = evaluate.Evaluator(step, None)
    assert swap_cost(this, evaluator, state, batches=2) == 0.5
    assert scored == [1.0, 3.0] * 2
    with pytest.raises(ValueError, match="batches=0 must be at least 1"):
        swap_cost(this, evaluator, state, batches=0)


def test_swapping_costs_nothing_before_training_and_much_after_it(tmp_path, one_device, finished):
    # Routed by their byte, the experts can only become specialists.
    tree = lm_tree(
        finished.source,
        steps=60,
        eval_every=60,
        log_every=60,
        model={"depth": 1},
        moe={"router": "hash", "top_k": 1},
        checkpoint={"every": 60},
    )
    train(tree, tmp_path)
    this, state, _ = run.load_trained(tmp_path, {})
    evaluator = evaluate.compile_evaluate(this)
    before = swap_cost(this, evaluator, this.init())
    after = swap_cost(this, evaluator, state)
    assert abs(before) < 0.2
    assert after > 1


@pytest.mark.parametrize("router", ["expert_choice", "random"])
def test_images_that_pad_a_batch_are_left_out_whatever_the_router(router, one_device, tmp_path):
    dispatch = "capacity" if router == "expert_choice" else "dense"
    tree = vit_tree(batch=128, moe={"router": router, "dispatch": dispatch})
    this = run.build(freeze(tree), tmp_path)
    seen, compiled = [], diversity.compile_similarity(this)

    def program(*given):
        sums = compiled(*given)
        seen.append(float(sums["0"]["tokens"][0]))
        return sums

    # 360 images of 4 patches: the third batch has 104 of them, which is 416 tokens.
    expert_similarity(this, this.init(), batches=3, program=program)
    assert seen == [512, 512, 416]


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="batches=0 must be at least 1"):
        expert_similarity(types.SimpleNamespace(), {}, batches=0)
