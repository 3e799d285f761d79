"""Routing metrics: definitions by hand, bounds, stacked layers."""

import math

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.metrics import (
    beyond_capacity,
    coefficient_of_variation,
    dead_experts,
    energy_captured,
    load_shares,
    max_violation,
    normalized_entropy,
    routing_metrics,
)

pytestmark = pytest.mark.usefixtures("strict")

# Shares 1/2, 1/4, 1/4, 0.
LOAD = jnp.array([4.0, 2.0, 2.0, 0.0])


def test_definitions_by_hand():
    chex.assert_trees_all_close(load_shares(LOAD), jnp.array([0.5, 0.25, 0.25, 0.0]))
    # 4 · 1/2 - 1.
    assert float(max_violation(LOAD)) == pytest.approx(1.0)
    # Deviations from 1/4: 1/4, 0, 0, -1/4; their root mean square is 1/sqrt(32).
    assert float(coefficient_of_variation(LOAD)) == pytest.approx(4 / math.sqrt(32))
    # (1/2 ln 2 + 2 · 1/4 ln 4) / ln 4 = 3/4.
    assert float(normalized_entropy(LOAD)) == pytest.approx(0.75)
    assert float(dead_experts(LOAD)) == 1.0


def test_balance_and_collapse():
    balanced, collapsed = jnp.full((8,), 5.0), jnp.zeros((8,)).at[3].set(40.0)
    assert float(max_violation(balanced)) == pytest.approx(0.0, abs=1e-6)
    assert float(coefficient_of_variation(balanced)) == pytest.approx(0.0, abs=1e-6)
    assert float(normalized_entropy(balanced)) == pytest.approx(1.0)
    assert float(dead_experts(balanced)) == 0.0
    assert float(max_violation(collapsed)) == pytest.approx(7.0)
    assert float(normalized_entropy(collapsed)) == pytest.approx(0.0, abs=1e-6)
    assert float(dead_experts(collapsed)) == 7.0


def test_dead_means_below_a_hundredth_of_the_fair_share():
    # E = 2: the fair share is 1/2, the limit 0.005 of all assignments.
    assert float(dead_experts(jnp.array([996.0, 4.0]))) == 1.0
    assert float(dead_experts(jnp.array([994.0, 6.0]))) == 0.0


def test_one_expert_and_no_tokens_stay_finite():
    assert float(normalized_entropy(jnp.array([5.0]))) == 0.0
    for function in (load_shares, coefficient_of_variation, normalized_entropy, max_violation):
        chex.assert_tree_all_finite(function(jnp.zeros((4,))))


@given(loads=st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any))
def test_bounds(loads):
    load = jnp.asarray(loads, jnp.float32)
    E = len(loads)
    assert -1e-5 <= float(max_violation(load)) <= E - 1 + 1e-5
    assert -1e-5 <= float(normalized_entropy(load)) <= 1 + 1e-5
    assert 0 <= float(dead_experts(load)) <= E - 1
    expected = np.std(loads) / np.mean(loads)
    assert float(coefficient_of_variation(load)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_energy_captured_by_hand():
    # Tokens (0,0), (2,0), (0,4), (2,4): variances 1 and 4. The first direction holds 1/5.
    tokens = jnp.array([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])

    def stats(z):
        return {
            "tokens": jnp.float32(4),
            "token_sum": jnp.sum(tokens, axis=0),
            "token_square": jnp.sum(jnp.square(tokens)),
            "z_sum": jnp.sum(z, axis=0),
            "z_square": jnp.sum(jnp.square(z)),
        }

    assert float(energy_captured(stats(tokens[:, :1]))) == pytest.approx(0.2)
    assert float(energy_captured(stats(tokens[:, 1:]))) == pytest.approx(0.8)
    assert float(energy_captured(stats(tokens))) == pytest.approx(1.0)


def test_routing_metrics_of_stacked_layers():
    stats = {
        "tokens": jnp.array([4.0, 4.0]),
        "load": jnp.stack([LOAD, jnp.full((4,), 2.0)]),
        "gate": jnp.array([2.0, 3.0]),
        "dropped": jnp.array([0.0, 2.0]),
        "overflows": jnp.array([0.0, 3.0]),
        "exchanges": jnp.array([0.0, 4.0]),
        "beyond_capacity": jnp.array([1.0, 0.0]),
    }
    metrics = routing_metrics(stats)
    assert set(metrics) == {
        "load", "max_vio", "cv", "entropy", "dead", "drop_fraction", "overflow_fraction", "gate",
        "drop_at_capacity"
    }  # fmt: skip
    chex.assert_trees_all_close(metrics["max_vio"], jnp.array([1.0, 0.0]), atol=1e-6)
    chex.assert_trees_all_close(metrics["entropy"], jnp.array([0.75, 1.0]), atol=1e-6)
    # Two of the eight assignments.
    chex.assert_trees_all_close(metrics["drop_fraction"], jnp.array([0.0, 0.25]))
    chex.assert_trees_all_close(metrics["drop_at_capacity"], jnp.array([0.125, 0.0]))
    chex.assert_trees_all_close(metrics["overflow_fraction"], jnp.array([0.0, 0.75]))
    chex.assert_trees_all_close(metrics["gate"], jnp.array([0.5, 0.75]))
    chex.assert_shape(metrics["load"], (2, 4))
    for layer in range(2):
        alone = routing_metrics({name: value[layer] for name, value in stats.items()})
        stacked = {name: value[layer] for name, value in metrics.items()}
        chex.assert_trees_all_close(alone, stacked, rtol=1e-6)


def test_tokens_that_statistics_leave_out_are_told():
    common = dict.fromkeys(("gate", "dropped", "overflows", "exchanges", "beyond_capacity"), 0.0)
    common["load"] = jnp.ones((2,))
    told = [
        routing_metrics(common | {"tokens": jnp.float32(tokens), "counted": jnp.float32(counted)})
        for tokens, counted in ((8, 6), (8, 8), (0, 0))
    ]
    assert [float(metrics["left_out"]) for metrics in told] == [0.25, 0.0, 0.0]
    assert "left_out" not in routing_metrics(common | {"tokens": jnp.float32(8)})


def test_drops_of_a_batch_by_hand():
    # Twelve assignments to four experts, room for ceil(1.25 * 3) = 4 each: 2 of 6 and 1 of 5 drop.
    load = jnp.array([[6.0, 5.0, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    chex.assert_trees_all_close(beyond_capacity(load, 1.25), jnp.array([3.0, 0.0]))
    assert float(beyond_capacity(jnp.zeros((4,)), 1.25)) == 0.0


def test_energy_appears_where_the_router_measures_it():
    stats = {
        "tokens": jnp.float32(2),
        "load": jnp.array([1.0, 1.0]),
        "gate": jnp.float32(1),
        "dropped": jnp.float32(0),
        "overflows": jnp.float32(0),
        "exchanges": jnp.float32(0),
        "beyond_capacity": jnp.float32(0),
        "token_sum": jnp.zeros((3,)),
        "token_square": jnp.float32(4),
        "z_sum": jnp.zeros((2,)),
        "z_square": jnp.float32(3),
    }
    assert float(routing_metrics(stats)["energy"]) == pytest.approx(0.75)
