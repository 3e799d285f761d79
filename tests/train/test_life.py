"""Life and death of a run: killed, asked to end, out of disk, failed; it goes on, to the bit."""

import os
import pathlib
import random
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from emoe_jax import sharding
from emoe_jax.checkpoint import Checkpoints
from tests.train import lives
from tests.train.tiny import lm_tree, mesh_of_one, write_corpus
from train.config import freeze
from train.logs import read_metrics
from train.notice import EXIT_CODE
from train.run import build

STEPS = 16
WAIT_S = 300


class Whole(NamedTuple):
    """A run that nothing has stopped.

    Attributes:
        folder: of all runs of this file.
        abstract: the training state.
        state: the state at the end, on the host.
        losses: by step.
        life_s: seconds of such a life, its executables in the cache.
    """

    folder: pathlib.Path
    abstract: Any
    state: Any
    losses: dict[int, float]
    life_s: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("lives")
    source = write_corpus(folder / "text")
    keys = {"steps": STEPS, "eval_every": STEPS, "model": {"depth": 1}, "checkpoint": {"every": 1}}
    (folder / "experiment.py").write_text(
        "from tests.train.tiny import lm_tree\n"
        f"def get_config():\n    return lm_tree({source!r}, **{keys!r})\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", mesh_of_one)
        abstract = build(freeze(lm_tree(source, **keys)), folder / "built").abstract
    compiled = lives.begin(folder / "compiled")
    end(compiled)
    began = time.monotonic()
    cached = lives.begin(folder / "cached")
    end(cached)
    life_s = time.monotonic() - began
    for process, name in ((compiled, "compiled"), (cached, "cached")):
        assert process.exitcode == 0, lives.told(folder / name)
    first = Whole(folder, abstract, last_state(folder / "compiled", abstract), {}, life_s)
    first = first._replace(losses=losses(folder / "compiled"))
    check_same(first, folder / "cached")
    return first


def end(process: ForkServerProcess) -> None:
    """Waits for the end of a life."""
    process.join(WAIT_S)
    assert process.exitcode is not None, process.kill()


def losses(workdir: pathlib.Path) -> dict[int, float]:
    rows = read_metrics(workdir)
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def check_whole(workdir: pathlib.Path, abstract: Any) -> list[int]:
    """Every checkpoint that is listed can be read, and holds the bits that were saved."""
    folder = workdir / "checkpoints"
    if not folder.exists():
        return []
    with Checkpoints(folder, every=1, read_only=True) as checkpoints:
        steps = checkpoints.all_steps()
        for step in steps:
            assert checkpoints.restore(step, abstract).train_state["step"] == step
    return steps


def last_state(workdir: pathlib.Path, abstract: Any) -> Any:
    with Checkpoints(workdir / "checkpoints", every=1, read_only=True) as checkpoints:
        return jax.device_get(checkpoints.restore(STEPS, abstract).train_state)


def check_same(whole: Whole, workdir: pathlib.Path) -> None:
    """A finished run has the bits of one that nothing has stopped, and left nothing half done."""
    assert losses(workdir) == whole.losses
    jax.tree.map(np.testing.assert_array_equal, last_state(workdir, whole.abstract), whole.state)
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert sorted(names) == sorted(map(str, (STEPS - 1, STEPS)))


def saves_now(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((workdir / "checkpoints").glob("*tmp*"))


def live_until(process: ForkServerProcess, condition: Callable[[], bool]) -> bool:
    """Waits for a condition; whether it has come before the end of the life."""
    deadline = time.monotonic() + WAIT_S
    while process.is_alive() and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    assert process.exitcode is not None
    return False


# -------------------------------------------------------------------------------- killed


def kill_often(whole: Whole, name: str, moments: int) -> list[str]:
    """Kills lives at moments drawn from all of a life, every second one where a save goes on.

    A run that has come to its end is compared with the whole one, and the next begins. Returns
    what the kills found, for each "save" or "other".
    """
    draw, found, run = random.Random(name), [], 0
    while len(found) < moments:
        workdir = whole.folder / f"{name}_{run}"
        process, began = lives.begin(workdir), time.monotonic()
        moment, in_save = draw.uniform(0, whole.life_s), len(found) % 2 == 1
        pause = draw.uniform(0, 0.02) if in_save else 0.0

        def due() -> bool:
            late = time.monotonic() - began > moment  # noqa: B023
            return late and (not in_save or saves_now(workdir))  # noqa: B023

        if live_until(process, due):
            time.sleep(pause)
            half = saves_now(workdir)
            process.kill()
        end(process)
        if process.exitcode == 0:
            check_same(whole, workdir)
            run += 1
            continue
        assert process.exitcode == -signal.SIGKILL, lives.told(workdir)
        found.append("save" if half else "other")
        check_whole(workdir, whole.abstract)
    finish(whole, workdir)
    return found


def finish(whole: Whole, workdir: pathlib.Path) -> None:
    """A last life that nothing stops: the run is as if nothing ever had."""
    last = lives.begin(workdir)
    end(last)
    assert last.exitcode == 0, lives.told(workdir)
    check_same(whole, workdir)


@pytest.mark.parametrize("moments", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(whole, moments):
    found: list[str] = []
    failed: list[BaseException] = []

    def chain(name: str) -> None:
        try:
            found.extend(kill_often(whole, name, moments // 2))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=chain, args=(f"killed{i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    assert len(found) == moments
    assert found.count("save") >= moments // 4


# -------------------------------------------------------------------------------- asked to end


def has_saved(workdir: pathlib.Path, step: int) -> Callable[[], bool]:
    return (workdir / "checkpoints" / str(step)).exists


def test_signals_end_a_run_that_has_saved_with_a_code_of_their_own(whole):
    workdir = whole.folder / "asked"
    first = lives.begin(workdir, "--config.checkpoint.every=100")
    assert live_until(first, lambda: bool(losses_so_far(workdir)))
    first.terminate()
    time.sleep(0.02)  # again, in the middle of the save
    signal_to(first, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
    end(first)
    assert first.exitcode == EXIT_CODE == 75, lives.told(workdir)
    (step,) = check_whole(workdir, whole.abstract)
    assert step < STEPS
    assert max(losses(workdir)) == step
    assert lives.told(workdir).count("SIGTERM: saving after this step, within 25 s") == 1
    assert f"SIGTERM: step {step} is saved, " in lives.told(workdir)
    second = lives.begin(workdir)
    assert live_until(second, has_saved(workdir, step + 2))
    signal_to(second, signal.SIGINT)
    end(second)
    assert second.exitcode == EXIT_CODE, lives.told(workdir)
    assert "SIGINT: saving after this step" in lives.told(workdir)
    assert f"resuming {workdir} from step {step}\n" in lives.told(workdir)
    third = lives.begin(workdir)
    assert live_until(third, lambda: lives.told(workdir).count("active per token") == 3)
    signal_to(third, signal.SIGTERM)
    end(third)
    assert third.exitcode == EXIT_CODE, lives.told(workdir)
    assert lives.told(workdir).endswith("nothing to save; the same command begins again\n")
    finish(whole, workdir)


def losses_so_far(workdir: pathlib.Path) -> str:
    file = workdir / "metrics.jsonl"
    return file.read_text() if file.exists() else ""


def signal_to(process: ForkServerProcess, *numbers: int) -> None:
    for number in numbers:
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, number)


def test_a_save_that_the_time_left_is_too_short_for_harms_nothing(whole):
    workdir = whole.folder / "short"
    process = lives.begin(workdir, "--config.checkpoint.grace_s=0.01")
    assert live_until(process, has_saved(workdir, 3))
    process.terminate()
    end(process)
    assert process.exitcode == EXIT_CODE, lives.told(workdir)
    assert "error: SIGTERM came 0.01 s ago, and the run has not saved and ended" in lives.told(
        workdir
    )
    assert max(check_whole(workdir, whole.abstract)) >= 3
    finish(whole, workdir)


# -------------------------------------------------------------------------------- failed


def test_a_data_set_that_goes_away_costs_no_step(whole):
    workdir = whole.folder / "stale"
    # Ten batches calibrate the router before the first step.
    process = lives.begin(workdir, "--config.checkpoint.every=100", fail_at=16)
    end(process)
    assert process.exitcode == 2, lives.told(workdir)
    told = lives.told(workdir)
    assert "training stops with OSError; step 5 is saved\n" in told
    assert told.endswith("error: [Errno 116] Stale file handle\n")
    assert check_whole(workdir, whole.abstract) == [5]
    finish(whole, workdir)


def test_a_disk_that_fills_at_any_moment_stops_the_run_with_words(whole):
    workdir = whole.folder / "full"
    draw = random.Random(0)
    with lives.begin_apart(workdir) as process:
        while not has_saved(workdir, draw.randrange(2, 6))():
            assert process.poll() is None, process.communicate()
        time.sleep(draw.uniform(0, 0.1))
        # The kernel lets no file grow beyond this: those of arrays would, the logs do not.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
        _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2, err
    steps = check_whole(workdir, whole.abstract)
    assert max(steps) >= 2
    words = rf"error: The checkpoint of step \d+ could not be written to {workdir}/checkpoints \("
    words += r"[\d,]+ bytes free, at most [\d,]+ and a little more needed\): .*File too large.*"
    words += rf"earlier steps {re.escape(str(steps))} are intact\. Free space there, keep fewer"
    assert "Traceback" not in err
    # Threads of tensorstore may log behind it.
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert re.search(words, errors[0]), err
    finish(whole, workdir)
