"""Comparing: what is trained when, what is skipped, refused, chosen, told."""

import json
import math
import sys
import types

import numpy as np
import pytest

from tests.train.tiny import lm_tree
from train import compare, outcome
from train.compare import check_jobs, check_same_start, run_jobs, study_jobs, tune, tuning_jobs
from train.config import to_json
from train.logs import RunLog
from train.variants import Variant, choose

EIGEN, SWITCH = Variant("eigen", "eigen"), Variant("switch", "switch")


@pytest.fixture
def trained(monkeypatch):
    """Puts results that follow from the configuration in the place of training; lists the runs."""
    runs = []

    def train(tree, workdir):
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(to_json(tree))
        runs.append((tree.moe.router, tree.seed))
        print("a table of the run")
        weight = tree.moe.routing.balance_weight or 0.01
        # Least at 0.01; the difference between the routers is 0.5 in every seed.
        loss = 2 + tree.seed % 10 + (tree.moe.router == "eigen") / 2 + abs(math.log(weight / 0.01))
        with RunLog(workdir, total_steps=2, unit="tokens") as log:
            log.write(1, {"router/layer_00/max_vio": loss})
            log.write(2, {"router/layer_00/max_vio": 0.0})
        return {"eval/loss": loss}, []

    def measure(workdir, variant, tree, scalars, rows, seconds):
        metrics = {"loss": scalars["eval/loss"], "max_vio": 0.1, "batch_max_vio_floor": 0.05}
        return {
            "variant": variant.name,
            "seed": tree.seed,
            "causal": variant.causal,
            "initial_weights": f"of seed {tree.seed}",
            "metrics": metrics | {"seconds": seconds},
            "load": {"layer_00": [0.25, 0.75]},
        }

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(outcome, "measure", measure)
    return runs


def test_all_variants_of_a_seed_come_before_the_next_seed(tmp_path, trained):
    jobs = study_jobs(lm_tree(), tmp_path, [EIGEN, SWITCH], range(2))
    results = run_jobs(jobs)
    assert trained == [("eigen", 0), ("switch", 0), ("eigen", 1), ("switch", 1)]
    assert [(r["variant"], r["seed"]) for r in results] == trained
    assert outcome.read_result(tmp_path / "switch/seed_1/result.json") == results[3]
    assert "a table of the run" in (tmp_path / "eigen/seed_0/train.txt").read_text()


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path, trained, monkeypatch):
    jobs = study_jobs(lm_tree(), tmp_path, [EIGEN, SWITCH], range(2))
    train = compare.train

    def stopped(tree, workdir):
        result = train(tree, workdir)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(compare, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs)
    assert not (tmp_path / "eigen/seed_1/result.json").exists()
    check_jobs(jobs)
    results = run_jobs(jobs)
    assert trained[3:] == [("eigen", 1), ("switch", 1)]
    # How long a run took that was stopped on its way is not known.
    assert results[2]["metrics"]["seconds"] is None
    assert results[3]["metrics"]["seconds"] > 0
    assert run_jobs(jobs) == results
    assert len(trained) == 5


def test_a_changed_study_is_refused_before_anything_is_trained(tmp_path, trained):
    run_jobs(study_jobs(lm_tree(), tmp_path, [EIGEN], range(2)))
    jobs = study_jobs(lm_tree(steps=30), tmp_path, [SWITCH, EIGEN], range(2))
    with pytest.raises(ValueError, match=r"eigen/seed_0 holds a run of another .*steps: 24 -> 30"):
        check_jobs(jobs)
    check_jobs(study_jobs(lm_tree(), tmp_path, [SWITCH, EIGEN], range(3)))


def test_an_impossible_variant_is_named(tmp_path):
    odd = Variant("odd", "random", {"moe.routing.z_weight": 1.0})
    with pytest.raises(ValueError, match=r"variant 'odd': routing\.z_weight=1\.0 is set, but"):
        check_jobs(study_jobs(lm_tree(), tmp_path, [EIGEN, odd], range(2)))


def test_tuning_takes_the_point_of_least_loss(tmp_path, trained):
    points = tuning_jobs(lm_tree(), tmp_path, [SWITCH, Variant("random", "random")], 1000)
    chosen = tune(points)
    assert trained == [("switch", 1000)] * 3 + [("random", 1000)]
    assert chosen["switch"]["moe.routing.balance_weight"] == 0.01
    losses = [point["loss"] for point in chosen["switch"]["tried"]]
    assert losses == pytest.approx([2 + math.log(1 / 0.3), 2.0, 2 + math.log(3)])
    assert chosen["random"] == {"router": "random", "tried": [{"loss": 2.0}]}
    rows = compare.tuning_rows(chosen)
    assert [row["chosen"] for row in rows] == ["", "yes", "", "yes"]
    # What was chosen reads back as a variant.
    (again,) = choose(["switch"], json.loads(json.dumps(chosen)))
    assert again.options == {"moe.routing.balance_weight": 0.01}
    assert tune(points) == chosen
    assert len(trained) == 4


def test_tuning_passes_by_what_diverged(tmp_path, trained, monkeypatch):
    losses = iter([math.nan, 3.0, 2.5, math.nan, math.inf, math.nan])
    monkeypatch.setattr(compare, "train", lambda *_: ({"eval/loss": next(losses)}, []))
    monkeypatch.setattr(outcome, "write_result", lambda *_: None)
    points = tuning_jobs(lm_tree(), tmp_path, [SWITCH, EIGEN], 1000)
    chosen = tune({"switch": points["switch"]})
    assert chosen["switch"]["moe.routing.balance_weight"] == 0.03
    assert chosen["switch"]["tried"][0]["loss"] == "NaN"
    with pytest.raises(ValueError, match="variant 'eigen' diverged at every point"):
        tune({"eigen": points["eigen"]})


def test_the_baseline_is_one_of_the_variants():
    assert compare.choose_baseline("", ["eigen", "loss_free"]) == "loss_free"
    assert compare.choose_baseline("", ["eigen", "switch"]) == "eigen"
    assert compare.choose_baseline("switch", ["eigen", "switch"]) == "switch"
    with pytest.raises(ValueError, match=r"--baseline=soft is not among .* eigen, switch; add"):
        compare.choose_baseline("soft", ["eigen", "switch"])


def test_what_is_not_causal_is_said_of_text_alone():
    variants = [EIGEN, Variant("expert_choice", "expert_choice")]
    assert compare.notes(variants, "lm") == {"expert_choice": "not causal"}
    assert compare.notes(variants, "vit") == {}


def test_runs_that_began_differently_are_told(caplog):
    results = [
        {"variant": "a", "seed": 3, "initial_weights": "x"},
        {"variant": "b", "seed": 3, "initial_weights": "x"},
        {"variant": "a", "seed": 4, "initial_weights": "y"},
    ]
    check_same_start(results)
    assert not caplog.records
    check_same_start([*results, {"variant": "b", "seed": 4, "initial_weights": "z"}])
    assert "seed 4: the variants began with different weights" in caplog.text


class Flags:
    """The flags of a study of two routers."""

    def __init__(self, workdir, **changes):
        self.config, self.workdir = lm_tree(), str(workdir)
        self.routers, self.seeds, self.baseline = ["switch", "eigen"], 2, ""
        self.options = self.json = ""
        self.tune, self.tune_seed = False, 1000
        vars(self).update(changes)


@pytest.fixture
def program(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train.compare"])

    def start(flags):
        monkeypatch.setattr(compare, "flags", types.SimpleNamespace(FLAGS=flags))
        compare.main([])

    return start


def test_the_program_prints_tables_and_writes_numbers_and_figures(
    tmp_path, trained, program, capsys
):
    program(Flags(tmp_path, json=str(tmp_path / "study.json")))
    printed = capsys.readouterr().out
    assert "Task, held-out data: loss (nats)" in printed
    assert "minus switch, paired [95 % t]" in printed
    assert "+0.5 [+0.5, +0.5]" in printed
    assert "a table of the run" not in printed
    table = json.loads((tmp_path / "study.json").read_text(), parse_constant=pytest.fail)
    assert table["run"]["command"] == "python -m train.compare"
    by_name = {(r["variant"], r.get("metric")): r for r in table["rows"]}
    assert by_name["eigen", "loss"]["difference"] == 0.5
    assert by_name["eigen", "loss"]["baseline"] == "switch"
    runs = [row for row in table["rows"] if row["table"] == "runs"]
    assert [run["metrics"]["loss"] for run in runs] == [2.0, 2.5, 3.0, 3.5]
    for name in ("loss_against_balance", "balance_over_training", "load_per_expert"):
        assert (tmp_path / f"figures/{name}.png").stat().st_size > 5000


def test_the_program_tunes(tmp_path, trained, program, capsys):
    program(Flags(tmp_path, tune=True, routers=["switch"], json=str(tmp_path / "tuned_rows.json")))
    assert "chosen options, for --options:" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "tuned_rows.json").read_text())["rows"]) == 3
    tuned = str(tmp_path / "tuned.json")
    program(Flags(tmp_path, options=tuned, routers=["switch"]))
    config = json.loads((tmp_path / "switch/seed_0/config.json").read_text())
    assert config["moe"]["routing"]["balance_weight"] == 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": 1}, "--seeds=1 leaves no interval: it takes 2 seeds or more"),
        ({"tune": True, "tune_seed": 1}, "--tune_seed=1 is one of the study's seeds, 0 to 1"),
        ({"baseline": "soft"}, "--baseline=soft is not among"),
        ({"routers": ["switch", "swap"]}, "'swap' is neither a variant nor a router"),
    ],
)
def test_bad_input_is_refused_before_any_training(changes, said, tmp_path, trained, program):
    with pytest.raises(ValueError, match=said):
        program(Flags(tmp_path, **changes))
    assert not trained
    assert not list(tmp_path.iterdir())


def test_two_routers_are_trained_and_measured(tmp_path, finished, one_device, program, capsys):
    base = lm_tree(finished.source, steps=4, eval_every=2, model={"depth": 1}, log_every=2)
    program(Flags(tmp_path, config=base, routers=["switch", "loss_free"]))
    assert "similarity of outputs" in capsys.readouterr().out
    results = {
        (name, seed): outcome.read_result(tmp_path / name / f"seed_{seed}" / "result.json")
        for name in ("switch", "loss_free")
        for seed in (0, 1)
    }
    for (name, seed), result in results.items():
        metrics = result["metrics"]
        # Four steps have nothing to tell of step 50 on.
        missing = {name for name, value in metrics.items() if value is None}
        assert missing >= {"accuracy", "dead", "batch_dead", "batch_max_vio"}
        rest = {"loss", "bits_per_byte", "max_vio", "early_max_vio", "similarity", "swap_cost"}
        assert all(math.isfinite(metrics[key]) for key in rest)
        assert sum(result["load"]["layer_00"]) == pytest.approx(1.0, rel=1e-5)
        with np.load(tmp_path / name / f"seed_{seed}" / "similarity.npz") as matrices:
            np.testing.assert_allclose(np.diag(matrices["layer_00"]), 1.0, atol=1e-5)
        # One seed begins with the same weights whatever the router, and another with others.
        assert result["initial_weights"] == results["switch", seed]["initial_weights"]
    assert results["switch", 0]["initial_weights"] != results["switch", 1]["initial_weights"]
    assert results["switch", 0]["metrics"]["similarity_untrained"] == pytest.approx(
        results["loss_free", 0]["metrics"]["similarity_untrained"], abs=1e-6
    )
