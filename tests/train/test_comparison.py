"""Intervals against values worked out by hand and by scipy, pairing by seed, tables."""

import math

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies

from train.comparison import (
    FAMILIES,
    bootstrap_interval,
    compare,
    noise_floor,
    shown,
    t_interval,
)

floats = strategies.floats(-100, 100)


def result(variant, seed, **metrics):
    return {"variant": variant, "seed": seed, "metrics": metrics}


def test_the_t_interval_of_three_values():
    # Mean 2, deviation 1, standard error 1/sqrt(3); t(0.975, 2) = 4.30265.
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-6)


@hypothesis.given(values=strategies.lists(floats, min_size=2, max_size=8))
def test_the_t_interval_is_that_of_scipy(values):
    hypothesis.assume(np.std(values) > 1e-3)
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values)
    )
    assert t_interval(values) == pytest.approx((np.mean(values), low, high), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval])
def test_one_value_has_a_mean_and_no_interval(interval):
    mean, low, high = interval([3.0])
    assert mean == 3.0
    assert math.isnan(low)
    assert math.isnan(high)
    with pytest.raises(ValueError, match="at least one value"):
        interval([])


def test_the_bootstrap_of_two_values_has_their_own_range():
    # The mean of two draws is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0]) == (0.5, 0.0, 1.0)


@hypothesis.given(values=strategies.lists(floats, min_size=2, max_size=8))
@hypothesis.settings(max_examples=10)
def test_the_bootstrap_repeats_itself_and_stays_within_the_values(values):
    mean, low, high = bootstrap_interval(values, resamples=500)
    assert (mean, low, high) == bootstrap_interval(values, resamples=500)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_the_bootstrap_of_many_values_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400).tolist()
    mean, low, high = bootstrap_interval(values)
    half = 1.96 * np.std(values) / 20
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


@pytest.mark.parametrize(
    ("experts", "chosen", "tokens"), [(8, 1, 8192), (32, 2, 2048), (8, 4, 512)]
)
def test_the_noise_floor_is_what_a_fair_draw_shows(experts, chosen, tokens):
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(300):
        drawn = np.argpartition(rng.random((tokens, experts)), chosen, axis=1)[:, :chosen]
        load = np.bincount(drawn.ravel(), minlength=experts)
        seen.append(load.max() / load.mean() - 1)
    assert noise_floor(experts, chosen, tokens) == pytest.approx(np.mean(seen), rel=0.05)


def test_the_noise_floor_of_two_experts_is_half_the_distance_of_two_normals():
    # T=100 coins: the larger share has a mean excess of E|Z| / sqrt(T), and E|Z| = sqrt(2/pi).
    assert noise_floor(2, 1, 100) == pytest.approx(math.sqrt(2 / math.pi) / 10, rel=1e-6)
    assert noise_floor(4, 4, 100) == noise_floor(1, 1, 100) == 0.0


def test_differences_are_taken_seed_by_seed():
    # The seeds differ by 10, the variants by 1.0, 1.2 and 1.4.
    results = [
        *[result("plain", seed, loss=10.0 * seed + 5) for seed in (0, 1, 2)],
        *[result("new", seed, loss=10.0 * seed + 6 + 0.2 * seed) for seed in (2, 1, 0)],
    ]
    plain, new = compare(results, "plain")
    assert "difference" not in plain
    assert (plain["mean"], plain["runs"]) == (15.0, 3)
    assert new["mean"] == pytest.approx(16.2)
    assert new["pairs"] == 3
    assert new["difference"] == pytest.approx(1.2)
    assert 1.0 - 1e-9 <= new["difference_low"] < 1.2 < new["difference_high"] <= 1.4 + 1e-9
    half = 4.302653 * 0.2 / math.sqrt(3)
    assert new["difference_t_high"] == pytest.approx(1.2 + half, rel=1e-6)
    assert new["difference_share"] == pytest.approx(1.2 / 15)


def test_runs_without_a_partner_or_a_value_are_left_out_of_pairs():
    results = [
        result("plain", 0, loss=1.0, dead=None),
        result("new", 0, loss=2.0, dead=3.0),
        result("new", 1, loss=4.0, dead=None),
    ]
    rows = {(row["variant"], row["metric"]): row for row in compare(results, "plain")}
    new = rows["new", "loss"]
    assert (new["runs"], new["mean"], new["pairs"], new["difference"]) == (2, 3.0, 1, 1.0)
    assert math.isnan(new["difference_low"])
    assert ("plain", "dead") not in rows
    assert "difference" not in rows["new", "dead"]


def test_a_run_that_diverged_shows_in_the_mean():
    rows = compare([result("a", 0, loss=1.0), result("a", 1, loss=math.nan)], "a")
    assert math.isnan(rows[0]["mean"])
    (table,) = shown(rows, "a", {})
    assert table["rows"][0]["mean [95 % t]"] == "nan"


def test_tables_name_metric_baseline_and_note():
    results = [result(v, s, loss=2.0 + s + (v == "b") / 4) for v in "ab" for s in (0, 1)]
    results = [r | {"metrics": r["metrics"] | {"dead": 0.0}} for r in results]
    loss, dead = shown(compare(results, "a"), "a", {"b": "not causal"})
    assert loss["title"] == "Task, held-out data: loss (nats)"
    first, second = loss["rows"]
    assert first["variant"] == "a"
    # Mean 2.5, standard error 0.5, t(0.975, 1) = 12.706.
    assert first["mean [95 % t]"] == "2.5 [-3.853, 8.853]"
    assert second["variant"] == "b (not causal)"
    assert second["minus a, paired [95 % t]"] == "+0.25 [+0.25, +0.25]"
    assert second["[95 % bootstrap]"] == ""  # of two differences it says nothing
    assert second["in %"] == "+10.00"
    assert dead["rows"][1]["in %"] == ""  # no share of nothing


def test_a_bootstrap_of_five_differences_is_printed():
    results = [result(v, s, loss=2.0 + s + (v == "b") / 4) for v in "ab" for s in range(5)]
    (table,) = shown(compare(results, "a"), "a", {})
    assert table["rows"][1]["[95 % bootstrap]"] == "[+0.25, +0.25]"


def test_no_metric_stands_in_two_tables():
    names = [name for metrics in FAMILIES.values() for name in metrics]
    assert len(set(names)) == len(names)
