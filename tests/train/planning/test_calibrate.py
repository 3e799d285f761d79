"""Fitted rates, on steps that were made up from known ones."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from emoe_jax.checkpoint import Checkpoints
from tests.train.planning.shapes import small
from tests.train.tiny import lm_tree
from train.config import freeze, to_json
from train.planning import calibrate, modes
from train.planning.calibrate import Measured, fit, projected, spearman
from train.planning.cost import PEAK, Rates, predict
from train.planning.memory import weigh
from train.planning.search import meshes
from train.planning.topology import parse
from train.provenance import MADE
from train.run import CHECKPOINTS, CONFIG_FILE

CPU = parse("cpu:8")
TRUE = Rates(products=0.5, memory=0.25, links=0.1, latency=1e-3)


def made_up(rates):
    configs = [dataclasses.replace(small(), mesh=mesh) for mesh in meshes(weigh(small()), 8)]
    legal = [config for config in configs if config.batch % 8 == 0]
    costs = [predict(config, weigh(config), CPU) for config in legal[:8]]
    return [
        Measured(config, cost, projected(cost, rates))
        for config, cost in zip(legal, costs, strict=False)
    ]


def test_rates_that_made_the_times_give_them_back():
    steps = made_up(TRUE)
    fitted = fit(steps)
    for step in steps:
        assert projected(step.cost, fitted) == pytest.approx(step.seconds, rel=1e-3)
    rows = calibrate.compare(steps, fitted)
    assert spearman(rows) == pytest.approx(1.0)


def test_too_few_measurements_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        fit(made_up(TRUE)[:3])


def test_ranked_and_fitted_share_no_configuration():
    config = dataclasses.replace(small(), batch=64)
    ranked, fitted = calibrate.split(config, CPU)
    assert len(ranked) >= 8
    assert len(fitted) >= 4
    assert not set(map(repr, ranked)) & set(map(repr, fitted))


def test_too_few_meshes_are_refused():
    with pytest.raises(ValueError, match="8 are needed"):
        calibrate.split(small(), parse("cpu:1"))


def test_rates_are_kept_and_read(tmp_path):
    file = tmp_path / "rates.json"
    with pytest.raises(FileNotFoundError, match="--calibrate"):
        calibrate.read_rates(file)
    calibrate.write_rates(file, TRUE, "cpu:8")
    assert calibrate.read_rates(file) == TRUE
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no rates"):
        calibrate.read_rates(file)


def test_a_measured_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="train there first"):
        calibrate.measured_steps(tmp_path, "tokens")
    lines = [{"step": n, "train/tokens_per_second": 100.0 + n % 2} for n in range(20)]
    # The first two of twenty are left out, however slow.
    lines[0]["train/tokens_per_second"] = lines[1]["train/tokens_per_second"] = 1.0
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert calibrate.measured_steps(tmp_path, "tokens") == (100.5, 0.5)


def test_one_factor_scales_every_time():
    step = made_up(TRUE)[0]
    twice = calibrate.scaled(TRUE, 2.0)
    assert projected(step.cost, twice) == pytest.approx(2 * step.seconds)


def asked(name):
    place = parse(name)
    return modes.Asked(small(), place, PEAK, 0.0, None, model_only=True, whole=False)


@pytest.fixture
def run(tmp_path):
    """What a run on two devices leaves that `--calibrate` reads."""
    tree = lm_tree("files:*.txt", mesh={"data": -1})
    (tmp_path / CONFIG_FILE).write_text(to_json(tree), encoding="utf-8")
    line = json.dumps({"step": 1, "train/tokens_per_second": 1000.0})
    (tmp_path / "metrics.jsonl").write_text(line + "\n", encoding="utf-8")
    with Checkpoints(tmp_path / CHECKPOINTS, every=1) as checkpoints:
        meta = {MADE: {"devices": 2}}
        checkpoints.save(1, {"w": jnp.ones(2)}, data_state={}, meta=meta)
    return tmp_path


def test_one_run_scales_all_times(run):
    ((row,),) = modes.calibrate_plan(asked("cpu:2"), run, "").tables.values()
    assert row["measured_s"] == pytest.approx(row["projected_s"] * row["ratio"])
    config = freeze(lm_tree("files:*.txt"))
    tokens = config.batch * config.data.sequence_length
    assert row["measured_s"] == pytest.approx(tokens / 1000)
    rates = calibrate.read_rates(run / "rates.json")
    assert 1 / rates.products == pytest.approx(row["ratio"])


def test_a_topology_that_the_run_did_not_have_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"cpu:8 has 8 devices, and the run in .* had 2"):
        modes.calibrate_plan(asked("cpu:8"), run, "")
    assert not (run / "rates.json").exists()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        modes.calibrate_plan(asked("cpu:2"), tmp_path / "absent", "")
