"""Several processes: who they are, what they agree on, and that they train what one would train."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import traverse_util

from emoe_jax.checkpoint import Checkpoints
from tests.train.ports import free_port
from tests.train.tiny import write_corpus
from train import cluster
from train.cluster import managed, place_of_flags, tpu_hosts
from train.config import freeze
from train.logs import read_metrics
from train.rollcall import Place
from train.run import build

ROOT = pathlib.Path(__file__).parents[2]
WAIT_S = 300

# ------------------------------------------------------------------------------------ who is there


def test_without_flags_and_environment_a_process_is_alone():
    assert place_of_flags(None, None, None) is None
    assert managed({}) == ""


def test_flags_give_the_place():
    assert place_of_flags("10.0.0.2:8476", 4, 3) == Place("10.0.0.2", 8476, 4, 3)
    assert place_of_flags("[::1]:80", 1, 0) == Place("::1", 80, 1, 0)
    assert Place("::1", 80, 1, 0).address == "[::1]:80"
    assert Place("h", 80, 1, 0).address == "h:80"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("h:1", None, None), r"--coordinator=h:1 needs --num_processes and --process_id too"),
        ((None, 2, None), r"--num_processes=2 needs --coordinator and --process_id too"),
        ((None, 2, 0), r"--num_processes=2 --process_id=0 needs --coordinator too"),
        (("h:1", 2, 2), r"--process_id=2 must lie between 0 and num_processes - 1 = 1"),
        (("h:1", 2, -1), r"--process_id=-1 must lie between 0 and"),
        (("h:1", 0, 0), r"--num_processes=0 must be at least 1"),
        (("h", 2, 0), r"--coordinator=h is not of the form HOST:PORT"),
        ((":8476", 2, 0), r"--coordinator=:8476 is not"),
        (("h:port", 2, 0), r"--coordinator=h:port is not"),
        (("h:0", 2, 0), r"--coordinator=h:0 is not"),
        (("h:65536", 2, 0), r"--coordinator=h:65536 is not"),
    ],
)
def test_flags_that_are_incomplete_or_impossible_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        place_of_flags(*given)


SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "gpu[03-04,07]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_a_slurm_step_of_several_tasks_is_found(monkeypatch):
    assert managed(SLURM) == "slurm"
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    # JAX's port for a job: 61440 + 70001 % 4096.
    assert cluster._ask_jax("slurm", 1) == (Place("gpu03", 61440 + 369, 6, 5), [1])


def test_a_slurm_step_of_one_task_and_a_batch_script_are_alone():
    assert managed(SLURM | {"SLURM_NTASKS": "1"}) == ""
    script = {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")}
    assert managed(script) == ""


@pytest.fixture
def libtpu(monkeypatch):
    """A machine with libtpu and metadata that are given here."""
    metadata = {"worker-network-endpoints": ""}
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(cluster, "_metadata", metadata.__getitem__)
    return metadata


@pytest.mark.parametrize(
    ("environ", "endpoints", "hosts"),
    [
        ({}, "", 0),
        ({}, "10.0.0.2", 1),
        ({}, "10.0.0.2,10.0.0.3", 2),
        ({}, "unknown:x:10.0.0.2,unknown:y:10.0.0.3", 2),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "10.0.0.2,10.0.0.3", 0),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "", 4),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "10.0.0.2,10.0.0.3", 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, "", 4),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "", 2),
        ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"}, "10.0.0.2,10.0.0.3", 0),
        ({"JAX_PLATFORMS": "tpu,cpu", "TPU_WORKER_HOSTNAMES": "a,b"}, "", 2),
    ],
)
def test_hosts_of_a_tpu_slice_are_counted(libtpu, environ, endpoints, hosts):
    libtpu["worker-network-endpoints"] = endpoints
    assert tpu_hosts(environ) == hosts
    assert managed(environ) == ("tpu" if hosts > 1 else "")
    assert managed(environ | SLURM) == "slurm"


def test_without_libtpu_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(cluster, "_metadata", lambda _: pytest.fail("asked"))
    assert tpu_hosts({"TPU_WORKER_HOSTNAMES": "a,b"}) == 0


def test_a_machine_outside_the_cloud_has_no_metadata(monkeypatch):
    monkeypatch.setattr(cluster, "_METADATA", f"http://127.0.0.1:{free_port()}/")
    assert cluster._metadata("worker-network-endpoints") == ""


def test_a_place_that_jax_does_not_know_is_an_error(monkeypatch):
    monkeypatch.setattr("jax._src.clusters.ClusterEnv._cluster_types", [])
    with pytest.raises(ValueError, match=r"under tpu, but its place .* give --coordinator, --num"):
        cluster._ask_jax("tpu", 1)


# ------------------------------------------------------------------------------ what they agree on


@pytest.fixture
def three(monkeypatch):
    """Process 0 of three, the others of which say what the test lets them."""
    said: list[list[str]] = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(cluster, "gather_texts", lambda text: [text, *said.pop(0)])
    return said


def fail(text: str) -> None:
    raise FileNotFoundError(text)


def test_one_failure_is_told_by_all_with_its_process(three):
    three.append(["", "no data"])
    with pytest.raises(ValueError, match=r"^no data \(in process 2 of 3\)$"):
        cluster.together(lambda: 1)
    three.append(["no data", "no data"])
    with pytest.raises(ValueError, match=r"^no data$"):
        cluster.together(lambda: fail("no data"))
    three.append(["no disk", ""])
    with pytest.raises(ValueError, match=r"^no data \(in process 0 of 3\); no disk \(in process 1"):
        cluster.together(lambda: fail("no data"))
    three.append(["", ""])
    assert cluster.together(lambda: 1) == 1


def test_what_is_no_bad_input_is_not_held_back(three):
    with pytest.raises(ZeroDivisionError):
        cluster.together(lambda: 1 // 0)


class Lowered:
    """A program whose compilation waits for the test."""

    def __init__(self, result):
        self.result, self.begun, self.go = result, threading.Event(), threading.Event()

    def compile(self, compiler_options):
        self.begun.set()
        assert self.go.wait(timeout=60)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result, compiler_options


def test_programs_are_compiled_in_order_while_others_are_traced(three):
    first, second = Lowered("first"), Lowered("second")
    with cluster.Compiler() as compiler:
        waits = compiler.begin(first, {"a": 1}), compiler.begin(second)
        assert first.begun.wait(timeout=60)
        assert not second.begun.is_set()
        first.go.set()
        second.go.set()
        # Processes meet once for each program, not again when it is asked for again.
        three.extend([["", ""], ["", ""]])
        assert [wait() for wait in (*waits, *waits)] == [
            *[("first", {"a": 1}), ("second", None)] * 2
        ]
    assert three == []


def test_what_the_compiler_raises_is_raised_where_the_program_is_wanted():
    bad = Lowered(ValueError("too large"))
    bad.go.set()
    with cluster.Compiler() as compiler:
        wait = compiler.begin(bad)
        with pytest.raises(ValueError, match="too large"):
            wait()


def test_the_first_failure_is_raised_before_later_programs_are_compiled():
    programs = Lowered("first"), Lowered(ValueError("too large")), Lowered("third")
    for program in programs[:2]:
        program.go.set()
    compiler = cluster.Compiler()
    for program in programs:
        compiler.begin(program)
    with pytest.raises(ValueError, match="too large"):
        compiler.finish()
    programs[2].go.set()
    compiler.finish()


def test_a_compiler_that_is_left_begins_no_further_program():
    first, second = Lowered("first"), Lowered("second")
    with cluster.Compiler() as compiler:
        compiler.begin(first)
        compiler.begin(second)
        assert first.begun.wait(timeout=60)
        threading.Timer(2.0, first.go.set).start()
    assert not second.begun.is_set()


def test_many_processes_are_counted_not_listed():
    texts = ["", *["lost"] * 20]
    words = "lost (in processes 1, 2, 3, 4, 5, 6, 7, 8 and 12 more of 21)"
    assert cluster._joined(texts) == words


def test_different_configurations_are_refused_with_their_hashes(three):
    mine, other = {"steps": 1, "moe": {"experts": 4}}, {"steps": 1, "moe": {"experts": 8}}
    three.append([json.dumps(mine), json.dumps(other)])
    words = (
        rf"{cluster.digest(mine)} in processes 0, 1; {cluster.digest(other)} in process 2; they"
        r" differ in moe\.experts: 4 -> 8 \(process 0 -> another\); start all"
    )
    with pytest.raises(ValueError, match=words):
        cluster.check_same(mine)
    three.append([json.dumps(mine), json.dumps(mine)])
    cluster.check_same(mine)


# ------------------------------------------------------------------------ two processes on loopback


class Runs(NamedTuple):
    """A run of one process, its experts on eight devices, and the same of two with four each.

    The latter was begun by launch/slurm.sbatch, where one process was asked to end; then one of two
    was killed; then cluster_worker.py came to the end.
    """

    one: pathlib.Path
    two: pathlib.Path
    asked: tuple[int, str, str]
    saved: list[int]
    requeued: str
    killed: list[tuple[int, str, str]]
    saved_later: list[int]
    absent: tuple[int, str, str]
    ended: list[tuple[int, str, str]]
    seen: list[dict[str, Any]]
    state: dict[str, np.ndarray]


ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


@contextmanager
def started(
    commands: list[list[str]], folder: pathlib.Path, devices: int = 4, **environment: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts commands, each in a session of its own, and kills what is left of them."""
    flags = re.sub("device_count=[0-9]+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    processes = []
    try:
        for command in commands:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=ENVIRONMENT | {"XLA_FLAGS": flags, **cache} | environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, "\n".join(x for x in out.splitlines() if "[Gloo]" not in x), err


def members(command: list[str]) -> list[list[str]]:
    """The command of each of two processes."""
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    return [[*command, *flags, f"--process_id={i}"] for i in range(2)]


def saved_steps(workdir: pathlib.Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


STUBS = {
    "srun": """#!/bin/bash
# Stands for SLURM's srun: two tasks on this machine, and the higher of their codes.
[[ $1 == --kill-on-bad-exit=1 ]] && shift
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  echo $! > "$TASKS/$i"
done
highest=0
for i in 0 1; do
  wait "$(cat "$TASKS/$i")"
  code=$?
  ((code > highest)) && highest=$code
done
exit $highest
""",
    "squeue": """#!/bin/bash
echo RUNNING
""",
    "scontrol": """#!/bin/bash
echo "$@" > "$TASKS/scontrol"
""",
}
"""What stands for SLURM's programs; the tasks' numbers come to lie in the folder TASKS."""


def slurm_command(folder: pathlib.Path) -> tuple[list[str], dict[str, str]]:
    """launch/slurm.sbatch as a batch job runs it, and its environment."""
    (folder / "bin").mkdir()
    for name, text in STUBS.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(free_port(61440, 65536) - 61440),
        "TASKS": str(folder / "bin"),
        "PYTHON": sys.executable,
        "CONFIG": str(folder / "experiment.py"),
        "WORKDIR": str(folder / "two"),
    }
    return [str(ROOT / "launch/slurm.sbatch"), *SPREAD], environment


SPREAD = ["--config.mesh.fsdp=2", "--config.mesh.expert=4"]


def wait_for_step(workdir: pathlib.Path, above: int, process: subprocess.Popen[str]) -> None:
    """Returns when a step above a number is logged."""
    file = workdir / "metrics.jsonl"
    while not (file.exists() and any(r["step"] > above for r in read_metrics(workdir))):
        assert process.poll() is None, finish(process)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two processes are asked to end, two lose one; two more, on another mesh, look around."""
    folder = tmp_path_factory.mktemp("cluster")
    source = write_corpus(folder / "text")
    keys: dict[str, Any] = {"steps": 26, "eval_every": 13, "checkpoint": {"every": 2}}
    keys |= {"model": {"depth": 1}, "moe": {"experts": 8}, "data": {"shards": 2}}
    config = folder / "experiment.py"
    config.write_text(
        "from tests.train.tiny import lm_tree\n"
        f"def get_config():\n    return lm_tree({source!r}, **{keys!r})\n"
    )
    one, two = folder / "one", folder / "two"
    alone = [sys.executable, "-m", "train", f"--config={config}"]
    command, environment = slurm_command(folder)
    with (
        started([[*alone, f"--workdir={one}", "--config.mesh.expert=8"]], folder, 8) as (single,),
        started([command], folder, **environment) as (batch,),
    ):
        wait_for_step(two, 0, batch)
        os.kill(int((folder / "bin/1").read_text()), signal.SIGTERM)
        asked = finish(batch)
        code, _, err = finish(single)
        assert code == 0, err
    saved = saved_steps(two)
    requeued = (folder / "bin/scontrol").read_text()
    assert requeued == f"requeue {environment['SLURM_JOB_ID']}\n"
    again = [*alone, f"--workdir={two}", "--heartbeat_timeout=10", *SPREAD]
    with started(members(again), folder) as processes:
        wait_for_step(two, max(saved), processes[0])
        processes[1].kill()
        killed = [finish(process) for process in processes]
    later = saved_steps(two)
    worker = [sys.executable, "-m", "tests.train.cluster_worker", f"--folder={folder}"]
    lonely = members([*alone, f"--workdir={folder / 'never'}", "--cluster_timeout=1"])[0]
    with (
        started(members(worker), folder) as processes,
        started([lonely], folder) as (waiting,),
    ):
        absent = finish(waiting)
        ended = [finish(process) for process in processes]
    assert not (folder / "never").exists()
    files = [folder / f"seen_{i}.json" for i in range(2)]
    assert all(file.is_file() for file in files), ended
    seen = [json.loads(file.read_text()) for file in files]
    state = dict(np.load(folder / "state.npz"))
    return Runs(one, two, asked, saved, requeued, killed, later, absent, ended, seen, state)


def losses(workdir: pathlib.Path) -> dict[int, list[float]]:
    names = ("train/loss", "train/grad_norm", "eval/loss", "router/layer_00/max_vio")
    return {r["step"]: [r[name] for name in names if name in r] for r in read_metrics(workdir)}


def test_one_process_that_is_asked_to_end_lets_both_save_the_same_step(runs):
    code, _, err = runs.asked  # of the batch script
    assert code == 75, err
    assert "SIGTERM: saving after this step, within 25 s\n" in err  # process 1
    told = f"a signal to another process: step {max(runs.saved)} is saved"
    assert err.count(told) == 1  # process 0; the other does not print
    assert max(runs.saved) < 26
    assert runs.requeued.startswith("requeue ")


def test_one_process_that_is_killed_ends_the_other_with_words(runs):
    (code, _, err), (second, _, _) = runs.killed
    assert (code, second) == (1, -signal.SIGKILL), err
    assert "nothing is saved, as other processes have not stopped at the same point" in err
    assert "process 0 of 2 ends. If another one was lost, all end; the same command on all" in err
    assert f"resuming {runs.two} from step {max(runs.saved)}\n" in err
    assert max(runs.saved_later) < 26


def test_the_time_until_a_silent_process_counts_as_dead_is_a_flag(monkeypatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(cluster, "meet", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **kwargs: given.update(kwargs))
    flags = SimpleNamespace(coordinator="h:1", num_processes=2, process_id=0, cluster_timeout=300)
    flags.heartbeat_timeout = 7
    monkeypatch.setattr(cluster, "flags", SimpleNamespace(FLAGS=flags))
    cluster.join({})
    assert given["heartbeat_timeout_seconds"] == 7


def test_two_processes_train_what_one_trains_over_two_ends_and_two_meshes(runs):
    one, two = losses(runs.one), losses(runs.two)
    assert list(one) == list(two) == list(range(1, 27))
    assert len(one[13]) == len(one[26]) == 4
    for step, expected in one.items():
        np.testing.assert_allclose(two[step], expected, rtol=1e-5)


def test_only_the_first_process_prints_and_writes_logs(runs):
    _, _, err = runs.asked  # of both processes
    assert err.count("/two/config.json") == 1
    assert "mesh {'data': 1, 'fsdp': 2, 'expert': 4, 'tensor': 1} of cpu in 2 processes" in err
    assert "some parts of the data are read by several" not in err
    (_, out, err), (_, silent, quiet) = runs.ended
    assert out.count("step 26: held out") == out.count("run folder:") == 1
    assert err.count("resuming") == 2  # once at the start, once after the rollback
    assert "step 26: held out" not in silent
    assert "resuming" not in quiet
    # One for each launch, and one for the rollback.
    assert len(list(runs.two.glob("events.out.tfevents.*"))) == 4
    assert not list(runs.two.glob(".shared*"))
    lines = (runs.two / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
    assert steps.count(26) == 2  # one line of training and one of evaluation


def test_each_process_tells_where_it_hangs(runs):
    texts = [(runs.two / f"stalls/process_{i}.txt").read_text() for i in range(2)]
    for process, text in enumerate(texts):
        _, _, err = runs.ended[process]
        words = f"process {process} of 2: no training step has ended for"
        assert words in text
        assert words in err
        assert "in _steps" in text
    assert re.search(r"cluster_worker.py\", line \d+ in step", texts[1])


def test_a_missing_process_ends_the_others_with_its_number(runs):
    code, out, err = runs.absent
    assert code == 2
    assert err.startswith("error: 1 of 2 processes came within 1 s: missing 1; there are 0 (")
    assert out == ""


def read(workdir: pathlib.Path) -> tuple[Any, Any]:
    """The run in a folder and its last checkpoint, in this one process."""
    run = build(freeze(json.loads((workdir / "config.json").read_text())), workdir)
    with Checkpoints(workdir / "checkpoints", every=1, read_only=True) as checkpoints:
        return run, checkpoints.restore(26, run.abstract)


def test_checkpoints_of_one_process_are_read_by_two_to_the_bit(runs):
    run, found = read(runs.one)
    expected = traverse_util.flatten_dict(found.train_state, sep="|")
    assert runs.state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(runs.state[name], array)
    batches = run.data.train_iterator(8, seed=0)
    batches.set_state(found.data_state)
    tokens = next(batches)["tokens"].tolist()
    batches.close()
    assert [each["tokens"] for each in runs.seen] == [tokens[:4], tokens[4:]]
    assert [each["shards"] for each in runs.seen] == [["0"], ["1"]]


def test_a_checkpoint_that_one_process_cannot_read_is_left_by_all(runs):
    first, second = [each["fallback"] for each in runs.seen]
    assert first == second
    assert first == [24, {"26": "OSError: the disk of process 1 is gone"}, ["26.damaged"], 24]


def test_checkpoints_of_two_processes_are_read_by_one(runs):
    """Bits are checked by the digests, which two processes took; the position is one's."""
    _, of_one = read(runs.one)
    _, of_two = read(runs.two)
    assert of_two.data_state == of_one.data_state
    one, two = ({k: v for k, v in each.meta.items() if k != "made"} for each in (of_one, of_two))
    guards = [meta.pop("guard") for meta in (one, two)]
    assert one == two
    assert of_two.meta["made"]["config"]["mesh"]["tensor"] == 2
    assert guards[0] == {"skipped": 0, "row": 0, "rollbacks": []}
    # Two processes lost their routers' state once, and went back to their last checkpoint.
    ((step, to, first, end, skipped),) = guards[1].pop("rollbacks")
    assert guards[1] == {"skipped": 1, "row": 0}
    resumed = max(runs.saved_later)
    assert (to, first, end, skipped) == (resumed + resumed % 2, to, to, 1)  # every=2
    assert step == resumed + 2
    leaves = zip(*map(jax.tree.leaves, (of_one.train_state, of_two.train_state)), strict=True)
    for one, two in leaves:
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=1e-3, atol=1e-5)


def test_two_processes_score_and_continue_as_one(runs):
    (last,) = [row for row in read_metrics(runs.one) if row["step"] == 26]
    first, second = (each["scalars"] for each in runs.seen)
    assert first == second
    for name in ("eval/loss", "eval/bits_per_byte", "eval/router/layer_00/max_vio"):
        assert first[name] == pytest.approx(last[name], rel=1e-5)
    assert runs.seen[0]["text"] == runs.seen[1]["text"] != ""


def test_damage_that_one_process_reads_is_an_error_on_both(runs):
    words = "step 26 could not be read: other bits than were saved are in step"
    assert all(words in each["damage"] for each in runs.seen)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("batch", "batch=12 is not a multiple of 8 (8 shards of the mesh over 2 processes times"),
        ("folder", "does not see within 0.3 s what process 0 wrote into --workdir="),
        ("folder", "a mounted network file system (in process 1 of 2)"),
        ("data", "text/*.txt"),
        ("data", "(in process 1 of 2)"),
    ],
)
def test_bad_input_of_one_process_is_an_error_on_both(runs, case, words):
    assert words in runs.seen[0][case]
    assert words in runs.seen[1][case] or case == "folder"
    assert "in process 1 of 2" in runs.seen[1][case] or case == "batch"


def test_different_configurations_end_all_and_one_tells(runs):
    (_, _, told), (_, _, silent) = runs.ended
    assert told.count("error: the processes have different configurations: ") == 1
    assert "they differ in steps: 24 -> 25 (process 0 -> another); start all of them" in told
    assert "different configurations" not in silent


def test_a_process_that_fails_alone_says_so_and_ends_the_other(runs):
    (first, _, lost), (second, _, told) = runs.ended
    assert "process 1 of 2: error: the disk of process 1 is gone\n" in told
    assert "Traceback" not in told
    assert (first != 0, second) == (True, 2), lost


def test_each_process_feeds_the_rows_that_its_devices_hold(runs):
    low, high, whole = [0, 1, 2, 3], [4, 5, 6, 7], list(range(8))
    assert [each["rows"] for each in runs.seen] == [
        [low, low, low, whole],
        [high, high, high, whole],
    ]
