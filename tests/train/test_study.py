"""The runs of a study: what is trained when, what is skipped, what is refused."""

import json

import pytest

from tests.train.tiny import lm_tree
from train import outcome, study
from train.study import check_jobs, check_known, run_jobs, study_jobs
from train.variants import Variant

EIGEN, SWITCH = Variant("eigen", "eigen"), Variant("switch", "switch")


def test_all_variants_of_a_seed_come_before_the_next_seed(tmp_path, trained):
    jobs = study_jobs(lm_tree(), tmp_path, [EIGEN, SWITCH], range(2))
    results = run_jobs(jobs)
    assert trained == [("eigen", 0), ("switch", 0), ("eigen", 1), ("switch", 1)]
    assert [(r["variant"], r["seed"]) for r in results] == trained
    assert outcome.read_result(tmp_path / "switch/seed_1/result.json") == results[3]
    assert "a table of the run" in (tmp_path / "eigen/seed_0/train.txt").read_text()


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path, trained, monkeypatch):
    jobs = study_jobs(lm_tree(), tmp_path, [EIGEN, SWITCH], range(2))
    train = study.train

    def stopped(tree, workdir):
        result = train(tree, workdir)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(study, "train", stopped)
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


def test_what_was_made_elsewhere_is_not_repeated(tmp_path, trained):
    jobs = study_jobs(lm_tree(), tmp_path / "here", [EIGEN, SWITCH], range(2))
    made = run_jobs(jobs[:3])
    base = lm_tree(data={"cache_dir": "elsewhere"})
    moved = study_jobs(base, tmp_path / "there", [SWITCH], range(2))
    known = check_known(base, moved, made)
    assert list(known) == [("eigen", 0), ("switch", 0), ("eigen", 1)]
    told = []
    results = run_jobs(moved, known, made=lambda so_far: told.append(len(so_far)))
    assert trained == [("eigen", 0), ("switch", 0), ("eigen", 1), ("switch", 1)]
    assert results[0] == made[1]
    assert [path.name for path in (tmp_path / "there/switch").iterdir()] == ["seed_1"]
    assert told == [2]


@pytest.mark.parametrize("asked", [[EIGEN], [SWITCH]])
def test_what_was_made_elsewhere_and_differs_is_refused(tmp_path, trained, asked):
    made = run_jobs(study_jobs(lm_tree(), tmp_path, [EIGEN], [0]))
    base = lm_tree(steps=30)
    jobs = study_jobs(base, tmp_path / "there", asked, range(2))
    said = r"--results has eigen, seed 0, of another configuration \(steps: 24 -> 30\).* leave --r"
    with pytest.raises(ValueError, match=said):
        check_known(base, jobs, made)


def test_a_result_of_an_earlier_version_is_refused_before_any_training(tmp_path, trained):
    jobs = study_jobs(lm_tree(), tmp_path, [EIGEN], range(2))
    run_jobs(jobs[:1])
    file = tmp_path / "eigen/seed_0/result.json"
    result = json.loads(file.read_text())
    del result["batch_max_vio"]
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"version \(there is no 'batch_max_vio'\); delete it"):
        run_jobs(jobs)
    assert len(trained) == 1
