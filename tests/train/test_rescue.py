"""What of a run is saved when an error stops it, and what is not."""

import logging
import pathlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from emoe_jax.checkpoint import CheckpointError, Checkpoints
from tests.train.tiny import vit_tree
from train import cluster, rescue
from train.config import freeze
from train.guards import Guard, Record
from train.rescue import Rescue

POSITION = {"0": {"next": 3}}


def state(value: float = 1.0) -> dict[str, Any]:
    return {"params": {"w": jnp.full(4, value)}, "step": jnp.int32(3)}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    with Checkpoints(tmp_path, every=100) as opened:
        yield opened


def stop(
    checkpoints: Checkpoints,
    held: Any,
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
    skipped: bool = False,
) -> str:
    """Raises an error where a state of step 3 is held; the last that was logged."""

    def steps() -> None:
        guard = Guard(freeze(vit_tree()), pathlib.Path(str(checkpoints.directory)), "run")
        guard.see(3, {"skipped": float(skipped), "loss": 1.0, "grad_norm": 1.0})
        with Rescue(checkpoints, Record(guard, {"a": 1})) as saving:
            if held is not None:
                saving.hold(3, held, POSITION)
            raise error

    with caplog.at_level(logging.ERROR, "train.rescue"), pytest.raises(type(error)) as caught:
        steps()
    assert caught.value is error
    return caplog.records[-1].getMessage() if caplog.records else ""


@pytest.mark.parametrize("error", [RuntimeError("bug"), OSError("gone"), KeyboardInterrupt()])
def test_the_last_whole_state_is_saved_with_its_position(checkpoints, error, caplog):
    told = stop(checkpoints, state(), error, caplog)
    assert told == f"training stops with {type(error).__name__}; step 3 is saved"
    assert checkpoints.all_steps() == [3]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state())
    restored = checkpoints.restore(3, wanted)
    assert restored.train_state["params"]["w"].tolist() == [1.0] * 4
    counts = {"skipped": 0, "row": 0, "rollbacks": []}
    assert (restored.data_state, restored.meta) == (POSITION, {"a": 1, "guard": counts})


def test_in_a_row_of_skipped_steps_nothing_is_saved(checkpoints, caplog):
    told = stop(checkpoints, state(), RuntimeError(), caplog, skipped=True)
    assert told.endswith("step 3 is not saved: it is one of a row of skipped steps")
    assert checkpoints.all_steps() == []


def test_a_state_that_was_saved_already_is_not_saved_again(checkpoints, caplog):
    checkpoints.save(3, state(), data_state=POSITION, meta={}, force=True)
    told = stop(checkpoints, state(2.0), RuntimeError(), caplog)
    assert told == "training stops with RuntimeError; step 3 was saved already"
    assert checkpoints.restore_meta(3) == {}


def donated() -> dict[str, Any]:
    held = state()
    jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(held)
    return held


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (donated, "step 3 is not saved: step 4 had taken its memory"),
        (lambda: state(float("nan")), "step 3 is not saved: params/w hold NaN or infinity"),
        (lambda: state(float("inf")), "step 3 is not saved: params/w hold NaN or infinity"),
        (lambda: {"w": 1}, "step 3 could not be saved: "),
    ],
)
def test_what_nobody_could_go_on_from_is_not_saved(checkpoints, held, words, caplog):
    told = stop(checkpoints, held(), RuntimeError(), caplog)
    assert told.startswith(f"training stops with RuntimeError; {words}")
    assert checkpoints.all_steps() == []


@pytest.mark.parametrize(
    ("held", "error"),
    [(None, RuntimeError()), (state, SystemExit(75)), (state, CheckpointError("disk is full"))],
)
def test_nothing_is_tried_before_a_step_at_an_exit_and_after_a_failed_save(
    checkpoints, held, error, caplog
):
    assert stop(checkpoints, held and held(), error, caplog) == ""
    assert checkpoints.all_steps() == []


def test_one_of_several_processes_saves_nothing_alone(checkpoints, caplog, monkeypatch):
    monkeypatch.setattr(rescue.cluster, "stopped_alike", lambda text: text != "3 False")
    told = stop(checkpoints, state(), RuntimeError(), caplog)
    assert "nothing is saved, as other processes have not stopped at the same point" in told
    assert checkpoints.all_steps() == []


def test_processes_that_stop_after_the_same_step_stop_alike(monkeypatch):
    assert cluster.stopped_alike("3")  # alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    said: list[list[str] | None] = [["3", "3"], ["3", "4"], None]
    monkeypatch.setattr(cluster, "_stopped_texts", lambda *_: said.pop(0))
    assert [cluster.stopped_alike("3") for _ in range(3)] == [True, False, False]
