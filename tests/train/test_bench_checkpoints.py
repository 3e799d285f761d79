"""The benchmark of checkpoints: its row, its table, what it refuses. No time is asserted."""

import pytest

from tests.train.tiny import lm_tree, write_corpus
from train import bench, bench_checkpoints
from train.config import freeze


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    source = write_corpus(tmp_path_factory.mktemp("bench") / "text")
    return freeze(lm_tree(source, model={"depth": 1}))


def test_halves_of_equal_length_save_once_or_never(config, one_device, tmp_path, monkeypatch):
    halves, half = [], bench_checkpoints._Trial.half

    def watched(trial, *, saving):
        before = trial.step, len(trial.calls)
        time = half(trial, saving=saving)
        halves.append((saving, trial.step - before[0], len(trial.calls) - before[1]))
        return time

    monkeypatch.setattr(bench_checkpoints._Trial, "half", watched)
    monkeypatch.setattr(bench, "freeze", lambda _: config)
    path = tmp_path / "rows.json"
    words = ["checkpoints", "--every=3", "--repeats=2", f"--json={path}"]
    assert bench.main(["bench", *words]) == 0
    saves, plain = (True, 3, 1), (False, 3, 0)
    assert halves == [saves, plain, saves, saves, plain]  # the first is not timed


def test_a_row_gives_the_median_of_the_rounds_ratios(config, monkeypatch):
    class Done:
        every, bytes, calls = 50, 4, [0.001, 0.003, 0.002]

    rounds = [((1.0, 2.0), (1.02, 2.5)), ((2.0, 2.0), (2.2, 2.2)), ((1.0, 2.0), (0.99, 2.0))]
    row = bench_checkpoints._row(Done(), rounds)
    assert row["overhead"] == pytest.approx(0.02)
    assert row["overhead_min"] == pytest.approx(-0.01)
    assert row["overhead_max"] == pytest.approx(0.1)
    assert row["processor_overhead"] == pytest.approx(0.1)
    assert row["call_ms"] == pytest.approx(2)
    assert (row["plain_ms"], row["saving_ms"]) == (1000, pytest.approx(1020))
    assert bench._shown(row)["overhead %"] == "2.0 (-1.0 to 10.0)"


def test_a_configuration_that_is_not_there_is_refused(capsys):
    assert bench.main(["bench", "checkpoints", "--config=configs/lm_big.py"]) == 2
    assert "--config=configs/lm_big.py: there is no such file" in capsys.readouterr().err
