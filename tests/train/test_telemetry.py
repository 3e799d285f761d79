"""What a run tells while it trains: rates, running loads, drift, alarms."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax import sharding
from tests.train.tiny import lm_tree, mesh_of_one, write_corpus
from train import telemetry
from train.config import AlarmConfig, freeze
from train.run import build
from train.telemetry import Alarms, Meter, Spikes

HALF = 2**-0.5
NONE = {"params": {}, "router": {}}


class Log:
    """Keeps what is written."""

    def __init__(self):
        self.scalars, self.values = {}, {}

    def write(self, step, scalars):
        self.scalars = scalars

    def arrays(self, step, arrays):
        self.values = arrays

    def histograms(self, step, arrays):
        self.histogram = arrays

    def progress(self, step, **words):
        self.words = words


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("telemetry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", mesh_of_one)
        return build(freeze(lm_tree(write_corpus(folder))), folder)


def metrics(load):
    layer = {"max_vio": np.zeros(2, np.float32), "load": np.asarray(load, np.float32)}
    scalars = {"loss": 1.0, "penalty": 0.0, "grad_norm": 1.0, "learning_rate": 0.1}
    return scalars | {"router": {"0": layer}}


EVEN = [[0.25] * 4] * 2


def test_time_of_evaluations_is_left_out_of_the_rate(monkeypatch, run):
    now = [100.0]
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: now[0])
    meter, log = Meter(run, 0, NONE), Log()
    now[0] += 3.0  # three steps of a second, an evaluation of ten, one more second
    with meter.left_out():
        now[0] += 10.0
    now[0] += 1.0
    meter.see(1, metrics(EVEN))
    meter.log(4, metrics(EVEN), NONE, log)
    assert log.scalars["train/tokens_per_second"] == pytest.approx(4 * 8 * 32 / 4.0)


def test_the_window_takes_the_mean_of_loads(run):
    meter, log = Meter(run, 0, NONE), Log()
    # Each step sends all to one expert, another each time; layer 1 always to the first.
    for expert in range(4):
        load = np.zeros((2, 4), np.float32)
        load[0, expert] = load[1, 0] = 1.0
        meter.see(expert + 1, metrics(load))
    meter.log(4, metrics(load), NONE, log)
    assert log.scalars["router/layer_00/max_vio_window"] == 0.0
    assert log.scalars["router/layer_01/max_vio_window"] == 3.0
    assert log.scalars["router/layer_00/dead_window"] == 0.0
    assert log.scalars["router/layer_01/dead_window"] == 3.0
    np.testing.assert_array_equal(log.values["layer_01/load"], [1.0, 0.0, 0.0, 0.0])
    assert log.words["max_vio"] == 0.0


def test_the_window_forgets(run):
    meter, log = Meter(run, 0, NONE), Log()
    meter.see(1, metrics([[1.0, 0.0, 0.0, 0.0]] * 2))
    for _ in range(telemetry.WINDOW):
        meter.see(1, metrics(EVEN))
    meter.log(101, metrics(EVEN), NONE, log)
    assert log.scalars["router/layer_00/max_vio_window"] == 0.0


def state_with(basis, spectrum):
    router = {"basis": basis, "spectrum": spectrum}
    return {"params": {}, "router": {"blocks": {"groups": {"0": {"moe": {"router": router}}}}}}


def test_drift_is_counted_from_the_last_checkpoint(run):
    # One direction of the plane, first along x, then at 45 degrees: sqrt(1/2) of the way.
    along, turned = jnp.array([[[1.0], [0.0]]] * 2), jnp.array([[[HALF], [HALF]]] * 2)
    spectrum = jnp.array([[3.0], [5.0]])
    meter, log = Meter(run, 0, state_with(along, spectrum)), Log()
    meter.see(1, metrics(EVEN))
    meter.log(1, metrics(EVEN), state_with(turned, spectrum), log)
    assert log.scalars["router/layer_01/drift"] == pytest.approx(HALF, rel=1e-6)
    np.testing.assert_array_equal(log.values["layer_01/spectrum"], [5.0])
    meter.saved(state_with(turned, spectrum))
    meter.log(2, metrics(EVEN), state_with(turned, spectrum), log)
    assert log.scalars["router/layer_01/drift"] == pytest.approx(0.0, abs=1e-6)


def test_the_orthonormality_of_a_tracked_basis_is_that_of_the_state(run):
    # QᵀQ - 1 of one direction is its squared length less 1: 0, and 4 - 1 = 3.
    basis, spectrum = jnp.array([[[1.0], [0.0]], [[0.0], [2.0]]]), jnp.ones((2, 1))
    meter, log = Meter(run, 0, state_with(basis, spectrum)), Log()
    meter.see(1, metrics(EVEN))
    meter.log(1, metrics(EVEN), state_with(basis, spectrum), log)
    assert log.scalars["router/layer_00/orthonormality_error"] == pytest.approx(0.0, abs=1e-6)
    assert log.scalars["router/layer_01/orthonormality_error"] == pytest.approx(3.0)
    assert log.scalars["alarm/orthonormality_error"] == 1.0


def test_a_donated_state_leaves_the_reference_whole(run):
    basis = jnp.array([[[1.0], [0.0]]] * 2)
    meter = Meter(run, 0, state_with(basis, jnp.ones((2, 1))))
    jax.jit(lambda x: x + 1.0, donate_argnums=0)(basis)
    assert float(meter.reference["0"][0, 0, 0]) == 1.0


def test_alarms_tell_each_crossing_once(caplog):
    alarms = Alarms(AlarmConfig(max_vio=0.5))
    calm = {"layer": "layer_00", "max_vio_window": 0.4, "dead_window": 0.0}
    high = calm | {"max_vio_window": 0.6}
    with caplog.at_level(logging.WARNING, "train.telemetry"):
        counts = [alarms.check(step, [row]) for step, row in enumerate((calm, high, high, calm))]
    assert [count["alarm/max_vio_window"] for count in counts] == [0.0, 1.0, 1.0, 0.0]
    assert [record.getMessage() for record in caplog.records] == [
        "alarm at step 1: max_vio_window of layer_00 is 0.6, above 0.5",
        "alarm over at step 3: max_vio_window of layer_00 is no longer above 0.5",
    ]


def test_tokens_that_statistics_leave_out_are_an_alarm():
    rows = [{"layer": "layer_00", "left_out": share} for share in (0.0, 1e-6)]
    assert [Alarms(AlarmConfig()).check(1, [row])["alarm/left_out"] for row in rows] == [0.0, 1.0]


def test_what_is_not_a_number_is_an_alarm():
    row = {"layer": "layer_00", "orthonormality_error": float("nan")}
    assert Alarms(AlarmConfig()).check(1, [row])["alarm/orthonormality_error"] == 1.0
    assert Alarms(AlarmConfig()).check(1, []) == {}


def test_alarms_over_the_window_wait_until_it_is_full():
    row = {"layer": "layer_00", "dead_window": 3.0, "drop_fraction": 0.5}
    early = Alarms(AlarmConfig()).check(1, [row], settled=False)
    others = {"alarm/orthonormality_error": 0.0, "alarm/left_out": 0.0}
    assert early == others | {"alarm/drop_fraction": 1.0}


def spiky(losses, factor=4.0):
    """Spikes among numbered losses, told one by one."""
    spikes = Spikes(factor)
    return [int(spikes.check([pair])["alarm/loss_spike"]) for pair in enumerate(losses)]


def test_a_loss_far_above_those_before_is_a_spike(caplog):
    # Half of them 1 and half 1.2: median 1.1, spread 1.4826 · 0.1; 4 times that is 0.593.
    usual = [1.0, 1.2] * 10
    assert spiky([*usual, 1.69]) == [0] * 21
    assert spiky([*usual, 1.70]) == [0] * 20 + [1]
    # With an odd one more the median is 1.2 and the distances' median 0.2.
    caplog.clear()
    with caplog.at_level(logging.WARNING, "train.telemetry"):
        assert spiky([*usual, 9.0, 9.0, 1.0, 9.0]) == [0] * 20 + [1, 1, 0, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "alarm at step 20: loss is 9, above 1.693",
        "alarm at step 23: loss is 9, above 2.386",
    ]


def test_what_is_no_spike():
    assert sum(spiky([1.0, 1.2] * 9 + [5.0])) == 0  # too few losses to know what is usual
    assert sum(spiky([1.0] * 30 + [1.003, 1.0, 1.0])) == 0  # rounding
    assert sum(spiky([4.0 * 0.97**step for step in range(60)] + [1.0])) == 0  # a steep start
    assert sum(spiky([1.0, 1.2] * 10 + [np.nan, np.inf])) == 0  # skipped


def test_spikes_between_two_lines_are_counted(run):
    meter, log = Meter(run, 0, NONE), Log()
    for step in range(1, 41):
        loss = jnp.float32(9.0 if step in (35, 37) else 1.0 + 0.1 * (step % 2))
        meter.see(step, metrics(EVEN) | {"loss": loss})
        if step % 20 == 0:
            meter.log(step, metrics(EVEN), NONE, log)
            assert log.scalars["alarm/loss_spike"] == (0.0 if step == 20 else 2.0)


@pytest.mark.parametrize("name", ["dead", "max_vio", "orthonormality", "drops", "loss_spike"])
def test_thresholds_below_zero_are_refused(name):
    with pytest.raises(ValueError, match=f"alarm.{name}=-1 is below zero"):
        AlarmConfig(**{name: -1})
