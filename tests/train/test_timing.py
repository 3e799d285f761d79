"""Timing: who runs when. No time is asserted."""

from train import timing


def test_interleave_runs_in_turn():
    calls = []
    programs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = timing.interleave(programs, {"a": 3, "b": 1})
    # One untimed run of each, then rounds; b takes part in the first alone.
    assert "".join(calls) == "ab" + "ab" + "a" + "a"
    assert [len(times[name]) for name in "ab"] == [3, 1]


def test_milliseconds_of_three_runs():
    row = timing.milliseconds("step", [0.003, 0.001, 0.002])
    assert row == {"step_ms": 2.0, "step_ms_min": 1.0, "step_ms_max": 3.0}
    assert timing.shown(row, "step") == "2 (1-3)"
