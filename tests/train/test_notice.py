"""A request to end: what the loop is told of it, and that signals are as before afterwards."""

import os
import signal
import time

import jax
import pytest

from tests.train.tiny import lm_tree
from train import evaluate, loop, notice
from train.config import freeze

LONG_S = 1e6  # the process that runs the tests is not to end


def ask(number: int) -> None:
    """Sends this process a signal and waits until it is heard."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 30
    while not notice._notice.name:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_loop_is_told_and_ends_with_the_code(number, capfd):
    before = [signal.getsignal(each) for each in notice.SIGNALS]
    with notice.heeded(LONG_S):
        assert not notice.reached(1)
        notice.check()
        ask(number)
        assert notice.reached(2)
        with pytest.raises(notice.Interrupted):
            notice.check()
        with pytest.raises(SystemExit) as caught:
            notice.end(2, 2)
    assert caught.value.code == 75
    assert [signal.getsignal(each) for each in notice.SIGNALS] == before
    told = f"{signal.Signals(number).name}: saving after this step, within 1e+06 s\n"
    assert capfd.readouterr().err.count(told) == 1
    assert not notice.reached(3)  # nobody heeds


def test_several_processes_end_after_the_step_that_jax_agrees_on(monkeypatch, capfd):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    agreed = {4}.__contains__
    monkeypatch.setattr(notice.multihost_utils, "reached_preemption_sync_point", agreed)
    with notice.heeded(LONG_S):
        assert [notice.reached(step) for step in (1, 2)] == [False, False]
        ask(signal.SIGTERM)
        notice.check()  # only after steps do they agree
        assert [notice.reached(step) for step in (3, 4)] == [False, True]
    with notice.heeded(LONG_S):
        assert notice.reached(4)  # the signal came to another one
        assert notice._notice.name == "a signal to another process"
    assert capfd.readouterr().err.count("saving after this step") == 2


def test_an_evaluation_is_left_in_its_middle(monkeypatch):
    batches = iter(range(9))
    monkeypatch.setattr(evaluate, "heldout", lambda run: batches)

    class Parts:
        class run:  # noqa: N801
            key = staticmethod(lambda: None)

        passes = loop._Passes(None, None, evaluate.Evaluator(None, None))

    with notice.heeded(LONG_S):
        assert not notice.reached(1)
        ask(signal.SIGTERM)
        assert loop._evaluate(Parts, {}) == (None, True)
    assert next(batches) == 1


def test_no_time_at_all_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint\.grace_s=0\.0 is not above zero"):
        freeze(lm_tree(checkpoint={"grace_s": 0.0}))
    for keys in ({"checkpoint": {"grace_s": 1e12}}, {"guard": {"stall_s": float(2**40)}}):
        with pytest.raises(ValueError, match="which timers take at most; set it lower"):
            freeze(lm_tree(**keys))
