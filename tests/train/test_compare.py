"""Comparing: what is trained when, what is skipped, refused, chosen, told."""

import json
import math
import sys
import types

import numpy as np
import pytest

from tests.train.tiny import lm_tree
from train import compare, outcome, study
from train.compare import check_same_start, tune, tuning_jobs
from train.variants import Variant, choose

EIGEN, SWITCH = Variant("eigen", "eigen"), Variant("switch", "switch")


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
    monkeypatch.setattr(study, "train", lambda *_: ({"eval/loss": next(losses)}, []))
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
    results = [{"variant": name, "router": name} for name in ("eigen", "expert_choice")]
    assert compare.notes(results, "lm") == {"expert_choice": "not causal"}
    assert compare.notes(results, "vit") == {}


def test_runs_that_began_differently_are_told(caplog):
    here, there = ({"made_by": {"device": name}} for name in ("1 x cpu", "1 x gpu"))
    results = [
        {"variant": "a", "seed": 3, "initial_weights": "x"} | here,
        {"variant": "b", "seed": 3, "initial_weights": "x"} | here,
        {"variant": "a", "seed": 4, "initial_weights": "y"} | here,
    ]
    check_same_start(results)
    assert not caplog.records
    check_same_start([*results, {"variant": "b", "seed": 4, "initial_weights": "z"} | there])
    assert "seed 4: the variants began with different weights" in caplog.text
    assert "runs differ in device, and their cost is not to be compared" in caplog.text


class Flags:
    """The flags of a study of two routers."""

    def __init__(self, workdir, **changes):
        self.config, self.workdir = lm_tree(), str(workdir)
        self.routers, self.seeds, self.baseline = ["switch", "eigen"], 2, ""
        self.options: list[str] = []
        self.json = self.results = ""
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


def test_a_study_grows_by_the_table_of_its_runs(tmp_path, trained, program, capsys):
    table = tmp_path / "study.json"
    program(Flags(tmp_path / "first", json=str(table)))
    capsys.readouterr()
    flags = {"routers": ["eigen", "softmax"], "results": str(table), "json": str(table)}
    program(Flags(tmp_path / "second", baseline="switch", **flags))
    assert trained[4:] == [("softmax", 0), ("softmax", 1)]
    rows = json.loads(table.read_text())["rows"]
    runs = [(row["variant"], row["seed"]) for row in rows if row["table"] == "runs"]
    assert sorted(runs) == [(name, n) for name in ("eigen", "softmax", "switch") for n in (0, 1)]
    # What is known and not asked for is compared too.
    summary = {row["variant"] for row in rows if row["table"] != "runs"}
    assert summary == {"eigen", "softmax", "switch"}
    assert "minus switch, paired" in capsys.readouterr().out


def test_every_run_that_is_made_is_in_the_table_at_once(tmp_path, trained, program, monkeypatch):
    table = tmp_path / "study.json"
    train = study.train

    def stopped(tree, workdir):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(tree, workdir)

    monkeypatch.setattr(study, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        program(Flags(tmp_path / "first", json=str(table)))
    assert len(outcome.read_results(str(table))) == 3
    monkeypatch.setattr(study, "train", train)
    program(Flags(tmp_path / "second", results=str(table), json=str(table)))
    assert trained[3:] == [("eigen", 1)]
    assert len(outcome.read_results(str(table))) == 4


def test_the_program_tunes(tmp_path, trained, program, capsys):
    program(Flags(tmp_path, tune=True, routers=["switch"], json=str(tmp_path / "tuned_rows.json")))
    assert "chosen options, for --options:" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "tuned_rows.json").read_text())["rows"]) == 3
    tuned = str(tmp_path / "tuned.json")
    program(Flags(tmp_path, options=[tuned], routers=["switch"]))
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
    flags = {"config": base, "routers": ["switch", "loss_free"], "json": str(tmp_path / "all.json")}
    program(Flags(tmp_path, **flags))
    assert "similarity of outputs" in (told := capsys.readouterr().out)
    # The table has all that the same study needs, however often that evaluates on the way.
    base = lm_tree(finished.source, steps=4, eval_every=4, model={"depth": 1}, log_every=2)
    again = Flags(tmp_path / "again", **flags | {"config": base}, results=flags["json"])
    program(again)
    assert capsys.readouterr().out.replace("again/", "") == told
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["figures"]
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
