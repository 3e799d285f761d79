"""Optimizers: schedule, masks, the retraction, and bases over thousands of steps."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emoe_jax import basis as bases
from emoe_jax.config import BASIS_METHODS
from emoe_jax.optim import (
    OptimConfig,
    decay_mask,
    global_norm,
    make_optimizer,
    merge,
    partition,
    retract_bases,
    router_mask,
    schedule,
)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize("method", BASIS_METHODS)
def test_two_thousand_random_steps_keep_every_basis_orthonormal(method):
    steps, layers, D, R = 2000, 2, 8, 3
    config = OptimConfig(learning_rate=1e-2, warmup=0, final=1.0)
    optimizer = make_optimizer(config, steps, method)
    params = {"router": {"basis": bases.qr(draw((layers, D, R)))}}

    def step(carry, key):
        params, state = carry
        _, pull = jax.vjp(lambda p: bases.prepare_bases(p, method), params)
        cotangent = {"router": {"basis": jax.random.normal(key, (layers, D, R))}}
        updates, state = optimizer.update(pull(cotangent)[0], state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.max(bases.orthonormality_error(params["router"]["basis"]))

    keys = jax.random.split(jax.random.key(1), steps)
    (end, _), errors = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
        (params, optimizer.init(params))
    )
    assert jnp.max(errors) < 1e-5
    moved = bases.drift(params["router"]["basis"], end["router"]["basis"])
    assert jnp.min(moved) > 0.1


def test_schedule_rises_to_the_peak_and_falls_to_the_final_share():
    rate = schedule(OptimConfig(learning_rate=2.0, warmup=4, final=0.5), 12)
    np.testing.assert_allclose([rate(i) for i in (0, 1, 2, 4)], [0.0, 0.5, 1.0, 2.0], atol=1e-6)
    # Half of the cosine: midway between peak and end.
    assert float(rate(8)) == pytest.approx(1.5)
    assert float(rate(12)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(1.0)


def test_schedule_without_warmup_starts_at_the_peak():
    assert float(schedule(OptimConfig(learning_rate=0.25, warmup=0), 5)(0)) == 0.25


@pytest.mark.parametrize("steps", [3, 5])
def test_a_warmup_as_long_as_the_training_is_refused(steps):
    words = f"optim.warmup=5 is not below steps={steps}"
    with pytest.raises(ValueError, match=words):
        schedule(OptimConfig(warmup=5), steps)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above zero"),
        ({"eps": 0.0}, "eps=0.0 must be above zero"),
        ({"clip": -1.0}, "clip=-1.0 must be above zero"),
        ({"router_scale": 0.0}, "router_scale=0.0 must be above zero"),
        ({"warmup": -1}, "optim.warmup=-1 is below zero"),
        ({"final": 1.5}, "optim.final=1.5 must lie between 0 and 1"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1 is below zero"),
        ({"b1": 1.0}, "optim.b1=1.0 must lie in [0, 1)"),
        ({"b2": -0.1}, "optim.b2=-0.1 must lie in [0, 1)"),
        ({"trainable": "moe"}, "got the string 'moe'; write ('moe',)"),
    ],
)
def test_bad_options_are_refused(values, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        OptimConfig(**values)


def params_of_all_kinds():
    return {
        "embedding": draw((5, 4)),
        "head": draw((5, 4), 1),
        "position": draw((3, 4), 2),
        "norm": {"scale": jnp.ones((4,))},
        "moe": {
            "router": {
                "basis": bases.qr(draw((4, 2), 3)),
                "masks": draw((3, 2), 4),
                "gamma": jnp.ones((2,)),
                "bias": jnp.ones((3,)),
            },
            "experts": {"w_gate": draw((3, 4, 2), 5), "w_down": draw((3, 2, 4), 6)},
        },
        "linear": {"router": {"kernel": draw((4, 3), 7)}, "query": {"kernel": draw((4, 4), 8)}},
    }


def test_masks_name_the_right_leaves():
    params = params_of_all_kinds()
    yes, no = True, False
    chex.assert_trees_all_equal(
        decay_mask(params),
        {
            "embedding": yes,
            "head": yes,
            "position": no,
            "norm": {"scale": no},
            "moe": {
                "router": {"basis": no, "masks": no, "gamma": no, "bias": no},
                "experts": {"w_gate": yes, "w_down": yes},
            },
            "linear": {"router": {"kernel": yes}, "query": {"kernel": yes}},
        },
    )
    in_router = router_mask(params)
    assert all(in_router["moe"]["router"].values())
    assert in_router["linear"] == {"router": {"kernel": yes}, "query": {"kernel": no}}
    assert not in_router["embedding"]
    assert not any(in_router["moe"]["experts"].values())


def one_update(config, params, gradients, method="qr"):
    optimizer = make_optimizer(config, 10, method)
    state = optimizer.init(params)
    return jax.jit(optimizer.update)(gradients, state, params)[0]


def test_zero_gradients_decay_matrices_and_leave_the_rest():
    params = params_of_all_kinds()
    config = OptimConfig(learning_rate=0.5, warmup=0, weight_decay=0.2, router_scale=0.5)
    updates = one_update(config, params, jax.tree.map(jnp.zeros_like, params))
    # lr · decay = 0.1, half of it for a router's kernel.
    chex.assert_trees_all_close(updates["embedding"], -0.1 * params["embedding"], rtol=1e-6)
    kernels = params["linear"]
    chex.assert_trees_all_close(
        updates["linear"]["query"]["kernel"], -0.1 * kernels["query"]["kernel"], rtol=1e-6
    )
    chex.assert_trees_all_close(
        updates["linear"]["router"]["kernel"], -0.05 * kernels["router"]["kernel"], rtol=1e-6
    )
    for name in ("masks", "gamma", "bias"):
        assert not jnp.any(updates["moe"]["router"][name])
    assert jnp.max(jnp.abs(updates["moe"]["router"]["basis"])) < 1e-6
    assert not jnp.any(updates["position"])


def test_first_step_moves_each_weight_by_the_learning_rate():
    # Adam's first step is lr · g / (|g| + eps) = lr · sign g, whatever the clipping's scale.
    params = {"w": jnp.zeros((2,)), "router": {"kernel": jnp.zeros((2,))}}
    gradients = {"w": jnp.array([30.0, -40.0]), "router": {"kernel": jnp.array([1.0, -1.0])}}
    config = OptimConfig(learning_rate=0.1, warmup=0, router_scale=0.25)
    updates = one_update(config, params, gradients)
    chex.assert_trees_all_close(updates["w"], jnp.array([-0.1, 0.1]), rtol=1e-4)
    chex.assert_trees_all_close(updates["router"]["kernel"], jnp.array([-0.025, 0.025]), rtol=1e-4)


def test_gradients_are_clipped_to_the_global_norm():
    # Two steps, gradient (3,4) then (0.3,0.4), clipped to norm 0.5: (0.3,0.4) both times.
    config = OptimConfig(learning_rate=0.1, warmup=0, final=1.0, clip=0.5, weight_decay=0.0)
    optimizer = make_optimizer(config, 10)
    update = jax.jit(optimizer.update)
    params = {"w": jnp.zeros((2,))}
    ends = []
    for first in ([3.0, 4.0], [0.3, 0.4]):
        state = optimizer.init(params)
        _, state = update({"w": jnp.array(first)}, state, params)
        updates, _ = update({"w": jnp.array([0.3, 0.4])}, state, params)
        ends.append(updates["w"])
    chex.assert_trees_all_close(*ends, rtol=1e-5)


@pytest.mark.parametrize("method", BASIS_METHODS)
def test_retraction_replaces_the_step_by_its_factor(method):
    weight, step = bases.qr(draw((6, 3))), 0.02 * draw((6, 3), 1)
    params, updates = {"basis": weight, "other": weight}, {"basis": step, "other": step}
    transform = retract_bases(method)
    new, _ = transform.update(updates, transform.init(params), params)
    chex.assert_trees_all_close(new["basis"] + weight, bases.qr(weight + step), atol=1e-6)
    chex.assert_trees_all_equal(new["other"], step)


def test_retraction_needs_the_parameters():
    transform = retract_bases()
    with pytest.raises(ValueError, match="retract_bases needs the parameters; pass params"):
        transform.update({}, optax.EmptyState())


def test_global_norm():
    tree = {"a": jnp.array([3.0]), "b": jnp.array([4.0], jnp.bfloat16)}
    assert float(global_norm(tree)) == 5.0
    assert global_norm(tree).dtype == jnp.float32
    assert float(global_norm({})) == 0.0


# ------------------------------------------------------------------------------------ frozen parts

NESTED = {"head": {"kernel": 1, "bias": 2}, "blocks": {"0": {"moe": {"bias": 3}, "mlp": 4}}}


@pytest.mark.parametrize(
    ("trainable", "trained", "frozen"),
    [
        ((), NESTED, {}),
        (("blocks", "head"), NESTED, {}),
        (("moe",), {"blocks": {"0": {"moe": {"bias": 3}}}}, None),
        (("bias",), {"head": {"bias": 2}, "blocks": {"0": {"moe": {"bias": 3}}}}, None),
        (("head", "mlp"), None, {"blocks": {"0": {"moe": {"bias": 3}}}}),
    ],
)
def test_partition_takes_what_a_part_of_its_path_names(trainable, trained, frozen):
    ours, others = partition(NESTED, trainable)
    assert trained is None or ours == trained
    assert frozen is None or others == frozen
    assert merge(ours, others) == NESTED
    assert merge(others, ours) == NESTED


def test_every_leaf_is_in_one_part_and_no_dict_is_empty():
    params = params_of_all_kinds()
    trained, frozen = partition(params, ("moe", "head"))
    assert trained.keys() == {"moe", "head"}
    assert frozen.keys() == {"embedding", "position", "norm", "linear"}
    _, rest = partition(params, ("basis", "masks", "gamma", "bias"))
    assert rest["moe"].keys() == {"experts"}
    chex.assert_trees_all_equal(merge(trained, frozen), params)


def test_names_that_no_path_has_are_refused():
    words = "optim.trainable names 'hed', which is no part of any parameter's path"
    with pytest.raises(ValueError, match=words + r".* 4 levels are 0, bias, blocks, head, kernel,"):
        partition(NESTED, ("moe", "hed"))


def test_the_optimizer_keeps_moments_of_the_trained_part_alone():
    trained, _ = partition(params_of_all_kinds(), ("moe",))
    state = jax.eval_shape(make_optimizer(OptimConfig(warmup=0), 10).init, trained)
    # Two counts of steps, and two moments of each leaf.
    assert len(jax.tree.leaves(state)) == 2 + 2 * len(jax.tree.leaves(trained))
    chex.assert_trees_all_equal_shapes(state[1][0].mu, trained)


def test_a_trained_subtree_is_updated_as_it_is_in_the_whole():
    params = {"head": draw((2, 2)), "moe": {"router": {"basis": bases.qr(draw((4, 2), 1))}}}
    config = OptimConfig(learning_rate=0.5, warmup=0, clip=1e6, router_scale=0.5)
    gradients = jax.tree.map(jnp.ones_like, params)
    whole = one_update(config, params, gradients)
    for name in params:
        part = one_update(config, *(partition(tree, (name,))[0] for tree in (params, gradients)))
        chex.assert_trees_all_close(part[name], whole[name], rtol=1e-6)
