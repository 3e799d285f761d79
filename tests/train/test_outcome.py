"""What is gathered of a run: arithmetic on lines that could have been logged, files, refusals."""

import json
import math

import jax.numpy as jnp
import pytest

from tests.train.tiny import lm_tree, vit_tree
from train import outcome, run
from train.comparison import FAMILIES, noise_floor
from train.config import experiment, freeze, to_json


def line(step, *layers, evaluated=()):
    """A logged step: values of each layer, and of its evaluation."""
    named = {"step": step, "train/tokens_per_second": 100.0 + step}
    for prefix, rows in (("router", layers), ("eval/router", evaluated)):
        for number, row in enumerate(rows):
            named |= {f"{prefix}/layer_{number:02d}/{k}": v for k, v in row.items()}
    return named


def test_the_beginning_and_the_rest_of_a_run_are_told_apart():
    history = [
        line(1, {"max_vio": 3.0, "dead": 2.0}, {"max_vio": 5.0, "dead": 0.0}),
        line(50, {"max_vio": 1.0, "dead": 1.0}, {"max_vio": 2.0, "dead": 1.0}),
        line(51, {"max_vio": 0.5, "dead": 0.0}, {"max_vio": 0.1, "dead": 1.0}),
    ]
    found = outcome.from_history(history)
    assert found["early_max_vio"] == pytest.approx((3 + 5 + 1 + 2) / 4)
    assert found["batch_max_vio"] == pytest.approx((1 + 2 + 0.5 + 0.1) / 4)  # both have step 50
    assert found["batch_dead"] == 2.0  # step 50, both layers together
    assert found["dead"] is None  # nothing was evaluated
    assert found["batch_drop_at_capacity"] is None  # nor was this logged
    assert outcome.violations(history) == pytest.approx({1: 4.0, 50: 1.5, 51: 0.3})
    assert outcome.rate(history, "tokens") == 150.0
    assert outcome.rate(history, "images") is None


def test_dead_experts_of_any_evaluation_count_from_step_50_on():
    dead = [(40, 4.0), (60, 1.0), (80, 0.0)]
    history = [line(step, evaluated=[{"dead": n}, {"dead": n}]) for step, n in dead]
    assert outcome.from_history(history)["dead"] == 2.0
    assert outcome.from_history(history[:1])["dead"] is None


def test_the_last_evaluation_gives_means_and_the_worst_layer():
    scalars = line(9, evaluated=[{"max_vio": 0.1}, {"max_vio": 0.3}])
    found = outcome.from_scalars(scalars)
    assert found["max_vio"] == pytest.approx(0.2)
    assert found["max_vio_worst"] == 0.3
    assert found["drop_at_capacity"] is None
    scalars |= line(9, evaluated=[{"drop_at_capacity": 0.02}, {"drop_at_capacity": 0.04}])
    assert outcome.from_scalars(scalars)["drop_at_capacity"] == pytest.approx(0.03)


def test_floors_count_the_tokens_that_are_routed(tmp_path, one_device):
    tree = vit_tree(model={"pooling": "class"}, moe={"experts": 4, "top_k": 2})
    # 8×8 digits in patches of 4: four patches and the class token; batches of 8.
    floors = outcome.floors(run.build(freeze(tree), tmp_path))
    assert floors["batch_max_vio_floor"] == noise_floor(4, 2, 40)
    assert floors["max_vio_floor"] == noise_floor(4, 2, 360 * 5)


def test_the_fingerprint_is_that_of_all_weights_but_the_routers(finished, one_device):
    this, _, _ = run.load_trained(finished.workdir, {})
    params = {"router": {"kernel": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}
    mine = outcome.fingerprint(this, params)
    assert mine == outcome.fingerprint(this, params | {"router": {"kernel": jnp.zeros(3)}})
    assert mine == outcome.fingerprint(this, params | {"router": {"other": jnp.zeros(5)}})
    assert mine != outcome.fingerprint(this, params | {"norm": {"scale": jnp.arange(3.0)}})


def test_a_result_reads_back_whatever_its_numbers(tmp_path):
    file = tmp_path / outcome.RESULT
    result = {"variant": "a", "metrics": {"loss": math.nan, "dead": None, "max_vio": 0.125}}
    outcome.write_result(file, result)
    json.loads(file.read_text(), parse_constant=pytest.fail)  # strict JSON
    metrics = outcome.read_result(file, measured=False)["metrics"]
    assert math.isnan(metrics["loss"])
    assert (metrics["dead"], metrics["max_vio"]) == (None, 0.125)
    assert outcome.strict([math.inf, (-math.inf,)]) == ["Infinity", ["-Infinity"]]
    for damaged in ("{", "[]", '{"metrics": 3}', '{"metrics": {}}'):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=r"result\.json is damaged or of .* delete it"):
            outcome.read_result(file, measured=False)


def test_a_curve_has_few_points_each_the_mean_over_a_part_of_the_steps():
    values = {1: 1.0, 2: 3.0, 4: 5.0, 5: 7.0, 7: 9.0}
    assert outcome.curve(values, 7, 9) == [[1, 2, 4, 5, 7], [1, 3, 5, 7, 9]]
    # Steps 1 to 4 and 5 to 8.
    assert outcome.curve(values, 8, 2) == [[2.5, 6.5], [3, 8]]
    # A step that was not logged moves no point.
    assert outcome.curve({2: 3.0, 7: 9.0}, 8, 2) == [[2.5, 6.5], [3, 9]]
    assert outcome.curve({7: 9.0}, 8, 2) == [[6.5], [9]]
    assert outcome.curve({}, 8) == [[], []]


ROW = {
    "table": "runs",
    "variant": "a",
    "router": "eigen",
    "options": {},
    "seed": 3,
    "config": {"task": "lm", "steps": 7},
    "initial_weights": "b0",
    "metrics": {"loss": "NaN", "dead": None, "max_vio": 1, "batch_max_vio_floor": 0.1},
    "load": {"layer_00": [0.5, 0.5]},
    "batch_max_vio": [[1, 2], [0.5, 0.25]],
    "made_by": {"device": "cpu"},
}


def test_results_read_back_from_the_tables_of_a_study(tmp_path):
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"rows": [{"table": "Cost", "variant": "a"}, ROW]}))
    (result,) = outcome.read_results(str(file))
    assert (result["variant"], result["seed"]) == ("a", 3)
    assert math.isnan(result["metrics"]["loss"])
    assert result["batch_max_vio"] == [[1, 2], [0.5, 0.25]]
    # Keys that are younger than the file have their defaults.
    assert (result["config"]["steps"], result["config"]["batch"]) == (7, experiment("lm").batch)
    assert outcome.read_results("") == []
    with pytest.raises(FileNotFoundError, match="--results=absent is no file; give the one"):
        outcome.read_results("absent")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"seed": "3"}, "its seed is '3'"),
        ({"seed": True}, "its seed is True"),
        ({"load": 3}, "'int' object has no attribute 'items'"),
        ({"batch_max_vio": [[1], []]}, "1 steps with 0 values"),
        ({"metrics": {"loss": 1, "max_vio": 1}}, "there is no 'batch_max_vio_floor'"),
        ({"metrics": {"loss": None}}, "its loss is null"),
        ({"metrics": {"loss": 10**400}}, "int too large to convert to float"),
        ({"config": {}}, "task="),
    ],
)
def test_damaged_tables_of_a_study_are_refused(damage, said, tmp_path):
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"rows": [ROW | damage]}))
    with pytest.raises(ValueError, match=r"study\.json holds no results of this version") as error:
        outcome.read_results(str(file))
    assert said in str(error.value)


def test_a_run_is_no_two_in_the_tables_of_a_study(tmp_path):
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"rows": [ROW, ROW]}))
    with pytest.raises(ValueError, match="a run is there twice"):
        outcome.read_results(str(file))


def test_a_run_of_another_configuration_is_refused(tmp_path):
    tree = lm_tree(steps=30)
    outcome.check_unchanged(tmp_path, tree)  # nothing is there yet
    (tmp_path / "config.json").write_text(to_json(tree))
    outcome.check_unchanged(tmp_path, tree)
    elsewhere = lm_tree(steps=30, data={"tfds_dir": "elsewhere"})
    outcome.check_unchanged(tmp_path, elsewhere)
    with pytest.raises(ValueError, match=r"another configuration \(steps: 30 -> 40\).*set these"):
        outcome.check_unchanged(tmp_path, lm_tree(steps=40))
    with pytest.raises(ValueError, match=r"\(.*; and \d+ more\), and a study compares"):
        outcome.check_unchanged(tmp_path, vit_tree())


def test_all_that_is_gathered_is_shown_somewhere(finished, one_device):
    this, _, _ = run.load_trained(finished.workdir, {})
    gathered = {
        *outcome.from_history([]),
        *outcome.from_scalars(finished.scalars),
        *outcome.floors(this),
    }
    assert gathered <= {name for metrics in FAMILIES.values() for name in metrics}
