"""The benchmark of whole steps: its row, its table, what it refuses. No time is asserted."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from emoe_jax.sharding import AXES
from tests.train.tiny import lm_tree, vit_tree, write_corpus
from train import bench, bench_step
from train.config import freeze
from train.planning.memory import predict, weigh
from train.timing import milliseconds


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A configuration's file."""
    folder = tmp_path_factory.mktemp("bench")
    tree = lm_tree(write_corpus(folder / "text"), model={"depth": 1})
    file = folder / "tiny.py"
    file.write_text(
        "from train.config import experiment\n\n\n"
        f"def get_config():\n    return experiment(**{tree.to_dict()!r})\n"
    )
    return file


def config_of(file):
    bench.FLAGS.unparse_flags()
    bench.FLAGS(["bench", f"--config={file}", "--override=batch=2"])
    return bench._experiment()


def test_a_row_for_the_step_and_what_stands_beside_it(file, one_device, tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = [f"--config={file}", "--override=batch=2", "--repeats=2", f"--json={path}"]
    assert bench.main(["bench", "step", *words]) == 0
    assert "memory / counted" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    assert row["rounds"] == 2
    for part in bench_step.PARTS:
        assert 0 < row[f"{part}_ms_min"] <= row[f"{part}_ms"] <= row[f"{part}_ms_max"]
    tokens = 2 * config_of(file).data.sequence_length
    assert row["per_second"] == pytest.approx(tokens / (row["step_ms"] / 1e3))
    config = config_of(file)
    memory = predict(config, weigh(config), dict.fromkeys(AXES, 1))
    assert row["counted_bytes"] == memory.parameters + memory.optimizer + memory.activations
    assert row["peak_bytes"] > memory.parameters + memory.optimizer


def test_batches_that_were_ready_are_not_timed(file):
    # 256 rows are packed at a time: 128 batches of two, which are left out, and as many after them.
    config = config_of(file)
    assert bench_step.cycle(config) == 128
    assert bench_step.cycle(freeze(vit_tree())) == bench_step.AHEAD
    taken = []

    class Run:
        def to_devices(self, batch, size):
            taken.append(batch)
            return jnp.zeros(size)

    trial = object.__new__(bench_step._Trial)
    trial.run, trial.batches = Run(), iter(range(1000))
    trial.run.config = config
    trial._read()
    assert taken == [*range(128, 256)]


def test_shares_are_of_the_median_step(file):
    class Run:
        unit, units_per_step = "tokens", 100
        config = dataclasses.replace(config_of(file), log_every=10)

    class Meter:
        flops, peak = 6.0, 1e3

    times = {"step": [2.0, 4.0], "bare": [1.0, 2.0], "log": [3.0, 3.0], "data": [0.5, 1.0]}
    row = bench_step._times(Run(), times, Meter())
    assert row["telemetry_in_step"] == pytest.approx(1 / 2)
    assert row["telemetry_logs"] == pytest.approx(3 / 10 / 3)
    assert row["telemetry"] == pytest.approx(0.6)
    assert row["data_factor"] == pytest.approx(4)
    assert row["mfu"] == pytest.approx(100 / 3 * 6 / 1e3)
    assert row | milliseconds("bare", times["bare"]) == row


def test_without_routing_metrics_a_step_trains_the_same(file, one_device, tmp_path):
    run = bench_step.build(config_of(file), tmp_path)
    trial = bench_step._Trial(run, tmp_path / "log", total=2)
    for _ in range(2):
        trial.round()
    trial.close()
    shapes = {name: compiled.out_info[1] for name, compiled in trial.compiled.items()}
    assert shapes["step"].keys() - shapes["bare"].keys() == {"router"}
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *trial.states.values())
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("batch", "--override=batch is not of the form KEY=VALUE"),
        ("btach=2", "'batch'"),
        ("batch=two", "config key 'batch' cannot be 'two'"),
    ],
)
@pytest.mark.parametrize("name", ["step", "start", "checkpoints"])
def test_bad_overrides_are_refused(file, name, word, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "nothing is started")
    assert bench.main(["bench", name, f"--config={file}", f"--override={word}"]) == 2
    assert message in capsys.readouterr().err
