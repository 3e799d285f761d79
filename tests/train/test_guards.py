"""Steps that are not finite: skipped and counted, gone back from and passed over, or too many."""

import functools
import json
import logging
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax import sharding
from emoe_jax.checkpoint import Checkpoints
from tests.train.tiny import mesh_of_one, vit_tree
from train import guards, loop, study
from train.config import freeze
from train.data.vision import VisionData
from train.guards import Diverged, Fault, Guard, Rollback, merged, position
from train.logs import read_metrics

STEPS = 12
KEYS: dict[str, Any] = {
    "steps": STEPS,
    "eval_every": STEPS,
    "log_every": 3,
    "calibrate": 2,
    "settle": 0,
    "moe": {"experts": 4, "hidden": 8, "dispatch": "dense", "router": "whitened"},
    "checkpoint": {"every": 4},
    "guard": {"skips": 2, "rollbacks": 1},
}


# ------------------------------------------------------------------------------ counting, deciding


def guard_of(folder, **changes):
    return Guard(freeze(vit_tree(**(KEYS | changes))), folder, "run")


def told(guard, flags, state=None):
    """Looks after steps whose flags are given, from step 1 on."""
    for step, flag in enumerate(flags, start=1):
        guard.see(step, {"skipped": float(flag), "loss": 1.0, "grad_norm": 2.0})
    return guard.look(len(flags), {"w": jnp.zeros(1)} if state is None else state)


def test_a_row_of_skipped_steps_is_a_fault_whenever_it_is_looked_at(tmp_path, caplog):
    guard = guard_of(tmp_path)
    with caplog.at_level(logging.WARNING, "train.guards"):
        assert told(guard, [0, 1, 0]) is None
    assert guard.counts() == {"skipped": 1.0, "rollbacks": 0.0}
    (words,) = [record.getMessage() for record in caplog.records]
    assert words == (
        "step 2 is skipped: its loss is 1 and its gradient's norm 2; 1 in a row, 1 in all"
    )
    # What follows the row, good or bad, does not change what is found.
    rows = [told(guard_of(tmp_path), [0, 1, 1, *rest]) for rest in ([], [0], [1, 1, 0])]
    assert rows == [Fault(3, ())] * 3


def test_a_state_that_is_lost_is_a_fault_at_once(tmp_path):
    state = {"router": {"covariance": jnp.array([jnp.nan])}, "step": jnp.array(3)}
    assert told(guard_of(tmp_path), [0, 1], state) == Fault(2, ("router/covariance",))
    # Before a step is skipped the state is not looked at, and with skips=0 nothing is a fault.
    assert told(guard_of(tmp_path), [0, 0], state) is None
    assert told(guard_of(tmp_path, guard={"skips": 0}), [1, 1, 1], state) is None


def test_no_checkpoint_is_written_in_a_row_and_it_is_owed(tmp_path):
    guard = guard_of(tmp_path, guard={"skips": 9})
    told(guard, [0, 0, 0, 1])
    assert [guard.may_save(4), guard.owes, guard.looks(5)] == [False, True, True]
    told(guard, [0])
    assert [guard.may_save(5), guard.owes, guard.looks(5)] == [True, True, False]
    told(guard, [1])
    assert guard.may_save(STEPS)


def test_it_ends_when_it_has_gone_back_often_enough(tmp_path):
    guard = guard_of(tmp_path)
    told(guard, [0, 1, 1])
    guard.go_back(Fault(3, ()), None)
    assert guard.rollbacks == [Rollback(3, 0, 0, 3, 2)]
    words = (
        r"after step 9: router/mean hold numbers that are not finite, and the run has gone back 1"
        r" times already \(guard\.rollbacks=1\)\. It would go back to step 8\. Raise guard"
    )
    with pytest.raises(Diverged, match=words):
        guard.go_back(Fault(9, ("router/mean",)), 8)


def test_the_record_survives_in_the_folder_and_in_checkpoints(tmp_path):
    first = guard_of(tmp_path, guard={"rollbacks": 9})
    told(first, [0, 1])
    before = json.loads(json.dumps(first.meta()))
    told(first, [0, 1, 1])
    first.go_back(Fault(7, ()), 4)
    # The checkpoint that it goes back to knows nothing of it; the folder does.
    resumed = guard_of(tmp_path)
    resumed.restore(before, 4)
    assert resumed.rollbacks == [Rollback(7, 4, 4, 7, 3)]
    assert resumed.counts() == {"skipped": 3.0, "rollbacks": 1.0}
    # A copy of the checkpoints alone.
    copied = guard_of(tmp_path / "elsewhere")
    copied.restore(json.loads(json.dumps(first.meta())), 5)
    assert copied.passed() == [(4, 7)]
    # Another run in the folder, in which batch 4 is another.
    assert Guard(freeze(vit_tree(**KEYS)), tmp_path, "other").passed() == []
    # A checkpoint that is older than all this.
    old = guard_of(tmp_path / "elsewhere")
    old.restore({}, 0)
    assert old.counts() == {"skipped": 0.0, "rollbacks": 0.0}


def test_a_checkpoint_that_was_passed_by_at_a_rollback_passes_over_what_lies_behind_it(tmp_path):
    # Step 8 could not be read when the run went back to step 4; a copy was put in its place since.
    first = guard_of(tmp_path)
    told(first, [0] * 5 + [1] * 5)
    first.go_back(Fault(10, ()), 4)
    assert first.passed() == [(4, 10)]
    resumed = guard_of(tmp_path)
    resumed.restore({}, 8)
    assert resumed.passed() == [(8, 10)]
    assert position(8, resumed.passed()) == 8


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"run": "run"}',
        '{"run": "run", "rollbacks": [{"step": 1}]}',
        '{"run": "run", "rollbacks": [[1, 2]]}',
    ],
)
def test_a_damaged_record_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "rollbacks.json").write_text(text)
    with pytest.raises(ValueError, match=r"rollbacks\.json"):
        guard_of(tmp_path)


def test_intervals_are_joined():
    assert merged([(8, 9), (4, 7), (5, 6), (7, 7), (7, 8), (2, 2)]) == [(4, 9)]
    assert merged([(1, 2), (5, 6)]) == [(1, 2), (5, 6)]


def test_positions_count_what_was_passed_over_before():
    passed = [(4, 7), (9, 10)]
    # Step 5 takes batch 7, step 6 batch 8, step 7 batch 10.
    assert [position(step, passed) for step in range(9)] == [0, 1, 2, 3, 4, 8, 9, 11, 12]
    # A second row, from step 8 back to step 4, is passed over as a whole.
    assert merged([*passed, (4, position(8, passed))]) == [(4, 12)]


# ------------------------------------------------------------------------------------- whole runs


class Spoilt:
    """Batches of which some hold a NaN, are not there, or end the program."""

    def __init__(self, batches, edit):
        self.batches, self.edit = batches, edit
        self.number, self.places = 0, {json.dumps(batches.get_state()): 0}

    def __next__(self):
        batch = self.edit(self.number, next(self.batches))
        self.number += 1
        self.places[json.dumps(self.get_state())] = self.number
        return next(self) if batch is None else batch

    def get_state(self):
        return self.batches.get_state()

    def set_state(self, state):
        # In a new program it is read up to there, so that it is known which batch comes.
        while json.dumps(state) not in self.places:
            next(self.batches)
            self.number += 1
            self.places[json.dumps(self.get_state())] = self.number
        self.batches.set_state(state)
        self.number = self.places[json.dumps(state)]

    def close(self):
        self.batches.close()


def nan_pixel(batch):
    images = np.array(batch["images"])
    images[3, 2, 2, 0] = np.nan
    return batch | {"images": images}


class KilledError(BaseException):
    pass


Edit = Callable[[int, Any], Any]


@pytest.fixture(scope="module")
def trained():
    """Trains in a folder with edited batches; programs are compiled once for all of them."""
    original = VisionData.train_iterator

    def run(folder, edit: Edit, **changes):
        def spoil(self, batch, *, seed, rows):
            batches = original(self, batch, seed=seed, rows=rows)
            return Spoilt(batches, edit) if seed == 0 else batches  # calibration has its own

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "make_mesh", mesh_of_one)
            patch.setattr(VisionData, "train_iterator", spoil)
            loop.train(vit_tree(**(KEYS | changes)), folder)

    with study._compiled_once():
        yield run


def losses(folder):
    return {r["step"]: r["train/loss"] for r in read_metrics(folder) if "train/loss" in r}


@pytest.fixture(scope="module")
def without(trained, tmp_path_factory):
    """Losses of a run in whose data batches 4 to 6 do not exist, and batch 1 is bad."""
    folder = tmp_path_factory.mktemp("without")

    def edit(number, batch):
        return None if 4 <= number < 7 else nan_pixel(batch) if number == 1 else batch

    trained(folder, edit, log_every=1)
    return losses(folder)


def bad(number, batch):
    return nan_pixel(batch) if number in (1, 5, 6) else batch


def killed_at_9(number, batch):
    if number == 9:
        raise KilledError
    return bad(number, batch)


@pytest.fixture(scope="module")
def interrupted(trained, tmp_path_factory):
    """Goes back after step 7, is killed at step 7 of the second try, and resumed on good data.

    Returns what it had logged at first, and its folder.
    """
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KilledError):
        trained(folder, killed_at_9, log_every=1)
    first = losses(folder)
    trained(folder, lambda number, batch: batch, log_every=1)
    return first, folder


def test_after_a_rollback_the_losses_are_those_of_data_without_the_batches(interrupted, without):
    first, folder = interrupted
    assert list(first) == [1, 2, 3, 4, 5, 6]
    assert np.isnan(without[2])
    assert np.isfinite([loss for step, loss in without.items() if step != 2]).all()
    np.testing.assert_equal(first, {step: without[step] for step in first})
    np.testing.assert_equal(losses(folder), without)


def test_the_rollback_is_told_in_the_logs_the_folder_and_the_checkpoints(interrupted):
    _, folder = interrupted
    rows = {row["step"]: row for row in read_metrics(folder)}
    assert [rows[step]["train/skipped"] for step in (1, 2, 4, 5, 12)] == [0, 1, 1, 3, 3]
    assert [rows[step]["train/rollbacks"] for step in (4, 5, 12)] == [0, 1, 1]
    entry = {"step": 7, "to": 4, "first": 4, "end": 7, "skipped": 3}
    assert json.loads((folder / "rollbacks.json").read_text())["rollbacks"] == [entry]
    with Checkpoints(folder / "checkpoints", every=1, read_only=True) as checkpoints:
        meta = checkpoints.restore_meta(STEPS)[guards.META]
    assert meta == {"skipped": 3, "row": 0, "rollbacks": [[7, 4, 4, 7, 3]]}
    events = b"".join(file.read_bytes() for file in folder.glob("events.out.tfevents.*"))
    assert all(name in events for name in (b"train/skipped", b"train/rollbacks"))
    assert all(b"alarm/" + name in events for name in (b"loss_spike", b"drop_fraction"))
    discarded = (folder / "metrics.discarded.jsonl").read_text().splitlines()
    # Steps 5 and 6 twice: undone by the rollback, and by the kill. The row was found before 7's.
    assert [json.loads(line)["step"] for line in discarded] == [5, 6, 5, 6]


@pytest.mark.parametrize(
    "name", ["router/blocks/groups/0/moe/router/covariance", "params/position"]
)
def test_what_is_lost_of_the_state_is_restored_and_no_batch_passed_over(
    name, trained, without, tmp_path, monkeypatch, caplog
):
    begin_train = loop.begin_train
    calls = []

    def poisoned(*given):
        wait = begin_train(*given)

        def step(state, batch, key):
            calls.append(int(state["step"]))
            if len(calls) == 6:
                *path, last = name.split("/")
                tree = functools.reduce(operator.getitem, path, state)
                tree[last] = tree[last].at[..., 0, 0].set(jnp.nan)
            return wait()(state, batch, key)

        return lambda: step

    def edit(number, batch):
        return None if 4 <= number < 7 else nan_pixel(batch) if number == 1 else batch

    monkeypatch.setattr(loop, "begin_train", poisoned)
    with caplog.at_level(logging.WARNING, "train.guards"):
        trained(tmp_path, edit)
    # Lines are logged, and flags read, every third step: after step 6.
    assert calls == [*range(6), *range(4, STEPS)]
    expected = {step: without[step] for step in (1, 3, 5, 6, 9, 12)}
    np.testing.assert_equal(losses(tmp_path), expected)
    assert (
        f"after step 6: {name} hold numbers that are not finite; the run goes back to step 4 and"
        " passes over 0 batches from there; rollback 1 of at most 1"
    ) in [record.getMessage() for record in caplog.records]


def test_without_a_checkpoint_it_goes_back_to_the_start_and_in_the_end_gives_up(trained, tmp_path):
    words = "after step 6: 2 steps in a row .* gone back 1 times already .* back to step 4"
    with pytest.raises(Diverged, match=words):
        trained(
            tmp_path, lambda n, batch: nan_pixel(batch) if n in (0, 1, 6, 7) else batch, log_every=1
        )
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5]
    assert np.isnan(list(losses(tmp_path).values())).tolist() == [False] * 4 + [True]
    record = json.loads((tmp_path / "rollbacks.json").read_text())["rollbacks"]
    assert [(each["to"], each["first"], each["end"]) for each in record] == [(0, 0, 2)]
