"""What is told of a step that does not end, and that nothing is told of one that does."""

import ctypes
import re
import threading
import time

import pytest

from train.config import GuardConfig
from train.watchdog import Watchdog

LIMIT_S = 0.2


class Result:
    """What a step on the devices returns."""

    def __init__(self):
        self.done = threading.Event()

    def is_ready(self):
        return self.done.is_set()


def ended():
    result = Result()
    result.done.set()
    return result


def report(folder):
    file = folder / "stalls/process_0.txt"
    return file.read_text() if file.is_file() else ""


def wait_for(folder, words):
    """Returns when the report holds the words; the test's own limit ends it otherwise."""
    deadline = time.monotonic() + 60
    while not re.search(words, report(folder)):
        assert time.monotonic() < deadline, report(folder)
        time.sleep(0.01)


def hang_in_a_step(folder):
    wait_for(folder, "Thread|File")


def test_a_step_that_hangs_is_told_once_with_all_stacks_and_again_when_it_goes_on(tmp_path, capfd):
    result = Result()
    with Watchdog(GuardConfig(stall_s=LIMIT_S), tmp_path) as dog:
        dog.see(1, ended())
        dog.see(2, result)
        hang_in_a_step(tmp_path)
        time.sleep(2 * LIMIT_S)
        result.done.set()
        wait_for(tmp_path, "it goes on; the last step that has ended is 2")
    text = report(tmp_path)
    assert capfd.readouterr().err.count("more than guard.stall_s=0.2") == 1
    assert re.search(
        r"process 0 of 1: no training step has ended for 0\.\d s by now, more than"
        r" guard\.stall_s=0\.2; step 1 was the last; step 2 is on the devices",
        text,
    )
    assert text.count("more than guard.stall_s=0.2") == 1
    assert "in hang_in_a_step" in text
    assert text.count("hread 0x") >= 2  # the main thread and the watchdog's own


def test_a_call_into_c_that_keeps_pythons_lock_is_told_too(tmp_path):
    usleep = ctypes.PyDLL(None).usleep  # does not release the lock
    with Watchdog(GuardConfig(stall_s=LIMIT_S), tmp_path) as dog:
        dog.see(1, ended())
        time.sleep(LIMIT_S)
        usleep(900_000)
    text = report(tmp_path)
    assert "Timeout (0:00:00.200000)!" in text
    assert "in test_a_call_into_c_that_keeps_pythons_lock_is_told_too" in text


def test_what_is_no_step_has_a_limit_of_its_own(tmp_path):
    with Watchdog(GuardConfig(stall_s=LIMIT_S, pause_s=100), tmp_path) as dog:
        time.sleep(3 * LIMIT_S)  # compiling
        dog.see(1, ended())
        time.sleep(LIMIT_S)
        with dog.during("the evaluation"):
            time.sleep(3 * LIMIT_S)
    # No file, and no folder, of a run that was well.
    assert list(tmp_path.iterdir()) == []
    with Watchdog(GuardConfig(stall_s=100, pause_s=LIMIT_S), tmp_path) as dog:
        with dog.during("the checkpoint"):
            wait_for(tmp_path, "process 0 of 1: the checkpoint takes 0.* guard.pause_s=0.2; no st")
        wait_for(tmp_path, "it goes on")


def test_steps_that_end_one_after_another_are_no_stall(tmp_path):
    with Watchdog(GuardConfig(stall_s=5 * LIMIT_S), tmp_path) as dog:
        results = [Result() for _ in range(10)]
        for step, result in enumerate(results):
            dog.see(step, result)
        for result in results:  # the loop waits for the last of them, twice the limit in all
            time.sleep(LIMIT_S)
            result.done.set()
    assert list(tmp_path.iterdir()) == []


def test_zero_switches_it_off(tmp_path):
    before = threading.active_count()
    with Watchdog(GuardConfig(stall_s=0), tmp_path) as dog:
        dog.see(1, Result())
        assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["skips", "rollbacks", "stall_s", "pause_s"])
def test_limits_below_zero_are_refused(name):
    with pytest.raises(ValueError, match=f"guard.{name}=-1 is below zero"):
        GuardConfig(**{name: -1})
