"""Several processes that run one program: whether there are any, how they meet, what they agree on.

A process knows its place from, in this order: the flags --coordinator, --num_processes and
--process_id; a SLURM step of several tasks; a TPU slice of several hosts. Otherwise it is alone and
nothing of this does anything. JAX's own multi-controller runtime does the rest: every process runs
the same program on its part of the devices.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import json
import os
import pathlib
import secrets
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import flags

from emoe_jax.checkpoint import CheckpointError
from emoe_jax.config import require
from emoe_jax.multihost import gather_texts
from train.config import changed_keys, digest, to_json
from train.rollcall import Place, meet

T = TypeVar("T")

INPUT_ERRORS = (ValueError, OSError, ModuleNotFoundError, CheckpointError)
"""What tells of bad input, in words that a user can act on."""

TIMEOUT_S = 300
"""Seconds that processes wait for each other at the start, by default."""

SHARED_S = 60.0
"""Seconds until a file that process 0 wrote must be seen by all; NFS may cache as long."""

HEARTBEAT_S = 100
"""Seconds without a sign of life after which a process counts as dead, by default: JAX's."""

FAILED_MS = 5000
"""Milliseconds that a process which has failed waits for others to fail alike."""

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


# ------------------------------------------------------------------------------------ who is there


def define_flags() -> None:
    """Flags of the programs that run on several processes."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; see --num_processes.")
    flags.DEFINE_integer(
        "num_processes",
        None,
        "Processes of this run, each started with --coordinator and its own --process_id; each"
        " takes all accelerators that it sees. A SLURM step and a TPU slice need no such flags.",
    )
    flags.DEFINE_integer("process_id", None, "This process, 0 to num_processes - 1.")
    flags.DEFINE_float(
        "cluster_timeout", TIMEOUT_S, "Seconds to wait for all processes.", lower_bound=1.0
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        HEARTBEAT_S,
        "Seconds without a sign of life of a process until the others end.",
        lower_bound=1,
    )


def join(environ: Mapping[str, str]) -> None:
    """Joins the other processes if the flags or the environment tell of any.

    Call it before anything touches a device.

    Args:
        environ: the environment.

    Raises:
        ValueError: flags are missing or contradict each other, or the processes do.
        OSError: a process did not come in time, or cannot be reached.
    """
    args = flags.FLAGS
    place = place_of_flags(args.coordinator, args.num_processes, args.process_id)
    devices = None
    if place is None and (kind := managed(environ)):
        place, devices = _ask_jax(kind, args.cluster_timeout)
    if place is None or place.count == 1:
        return
    meet(place, args.cluster_timeout)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=devices,
        cluster_detection_method="deactivate",  # all is known
        initialization_timeout=int(args.cluster_timeout),
        heartbeat_timeout_seconds=args.heartbeat_timeout,
    )


def place_of_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Place | None:
    """The place that flags give, None where there are none.

    Raises:
        ValueError: some are missing, or a value is impossible.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if coordinator is None or num_processes is None or process_id is None:
        told = [f"--{name}={value}" for name, value in given.items() if value is not None]
        require(not told, f"{' '.join(told)} needs {' and '.join(missing)} too")
        return None
    require(num_processes >= 1, f"--num_processes={num_processes} must be at least 1")
    require(
        0 <= process_id < num_processes,
        f"--process_id={process_id} must lie between 0 and num_processes - 1 = {num_processes - 1}",
    )
    host, colon, port = coordinator.rpartition(":")
    require(
        bool(colon and host) and port.isdigit() and 0 < int(port) < 65536,
        f"--coordinator={coordinator} is not of the form HOST:PORT, such as 10.0.0.2:8476",
    )
    return Place(host.strip("[]"), int(port), num_processes, process_id)


def managed(environ: Mapping[str, str]) -> str:
    """What has started several processes: "slurm", "tpu", or "" if nothing has."""
    # Both are there in a step, which srun starts; a batch script itself is in none.
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
        return "slurm"
    return "tpu" if tpu_hosts(environ) > 1 else ""


def tpu_hosts(environ: Mapping[str, str]) -> int:
    """Hosts of the TPU slices that this machine is one of; 0 where it has no TPU.

    Sources: JAX's `cloud_tpu_cluster.py`; GKE gives TPU_WORKER_HOSTNAMES, and a TPU VM's metadata
    hold worker-network-endpoints, one for each host.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms) or importlib.util.find_spec("libtpu") is None:
        return 0
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    # JAX's own sign of a libtpu on a machine without metadata, such as one that only compiles.
    if not hosts and "TPU_SKIP_MDS_QUERY" not in environ:
        hosts = _metadata("worker-network-endpoints")
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    return len(hosts.split(",")) * slices if hosts else 0


def _metadata(name: str) -> str:
    """An attribute of this machine in Google's cloud, empty elsewhere."""
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def _ask_jax(kind: str, timeout_s: float) -> tuple[Place, list[int] | None]:
    """The place and the local devices that `jax.distributed.initialize` would find by itself.

    It tells nobody of them, and `rollcall` must know them before it is called; this is the one use
    of what is private in JAX.

    Raises:
        ValueError: JAX finds no place.
        TimeoutError: the first host's name stays unknown.
    """
    from jax._src.clusters import ClusterEnv

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, kind if kind == "slurm" else None, int(timeout_s)
        )
    except RuntimeError as error:
        raise TimeoutError(
            f"{error} within {timeout_s:g} s; give it more time with --cluster_timeout=SECONDS"
        ) from error
    if address is None or count is None or index is None:
        raise ValueError(
            f"this looks like a process of several under {kind}, but its place among them is"
            " unknown; give --coordinator, --num_processes and --process_id"
        )
    host, _, port = address.rpartition(":")
    place = Place(host.strip("[]"), int(port), count, index)
    return place, None if devices is None else list(devices)


def failed_alike(text: str) -> str | None:
    """What all processes ended with, if they all ended; it waits a few seconds for them.

    Args:
        text: what this process ended with.

    Returns:
        What each process or group of them tells; None if some have not failed.
    """
    texts = _stopped_texts("failed", text)
    return None if texts is None else _joined(texts)


def stopped_alike(text: str) -> bool:
    """Whether all processes have stopped and give the same text; waits a few seconds for them."""
    texts = [text] if jax.process_count() == 1 else _stopped_texts("stopped", text)
    return texts is not None and len(set(texts)) == 1


def _stopped_texts(key: str, text: str) -> list[str] | None:
    """Every process's text once all have come; None if some have not."""
    try:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=FAILED_MS)
        return gather_texts(text)
    except Exception:  # the others are in the middle of a step, or gone
        return None


def leave(code: int) -> NoReturn:
    """Ends this process at once: JAX then ends those that are left.

    An ordinary exit waits minutes for processes that wait for this one in the middle of a step.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------------------------ what they agree on


def is_first() -> bool:
    """Whether this process is the one that writes logs and prints."""
    return jax.process_index() == 0


def compile_together(
    lowered: jax.stages.Lowered, options: dict[str, str | bool] | None = None
) -> jax.stages.Compiled:
    """Compiles, and returns when all processes have.

    One that runs a program first waits for the others in its collectives, and on CPU gives up after
    30 seconds if they still compile.

    Args:
        lowered: the program.
        options: of the compiler.
    """
    with Compiler() as compiler:
        return compiler.begin(lowered, options)()


class Compiler:
    """Compiles programs one after another while this thread goes on; a context manager.

    A program that has not begun by its end is not compiled.
    """

    def __init__(self) -> None:
        # One thread: then all processes compile in the same order.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "compiler")
        self._begun: list[concurrent.futures.Future[jax.stages.Compiled]] = []

    def __enter__(self) -> Compiler:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for a program that is being compiled; not after an error, which is told first."""
        self._thread.shutdown(wait=kind is None, cancel_futures=True)

    def begin(
        self, lowered: jax.stages.Lowered, options: dict[str, str | bool] | None = None
    ) -> Callable[[], jax.stages.Compiled]:
        """Begins to compile; arguments as those of `compile_together`.

        Returns:
            What waits until all processes have compiled it, and returns the program.
        """
        future = self._thread.submit(lowered.compile, compiler_options=options)
        self._begun.append(future)

        @functools.cache  # so that processes wait for each other once
        def wait() -> jax.stages.Compiled:
            compiled = future.result()
            gather_texts("")
            return compiled

        return wait

    def finish(self) -> None:
        """Waits until all programs are compiled here; raises what the first that failed has."""
        while self._begun:
            self._begun.pop(0).result()


def together(function: Callable[[], T]) -> T:
    """Calls a function on every process; bad input that one of them finds ends all of them.

    Args:
        function: does nothing that waits for other processes.

    Raises:
        ValueError: on all processes, with the words of those in which it failed.
    """
    if jax.process_count() == 1:
        return function()
    error, value = None, None
    try:
        value = function()
    except INPUT_ERRORS as caught:
        error = caught
    _raise_together(error)
    return value  # type: ignore[return-value]


def first_then_others(function: Callable[[], T]) -> T:
    """As `together`, but process 0 goes first: the others find the files that it writes."""
    if jax.process_count() == 1:
        return function()
    if is_first():
        value = together(function)
        together(lambda: None)
        return value
    together(lambda: None)
    return together(function)


def _raise_together(error: Exception | None) -> None:
    texts = gather_texts("" if error is None else str(error) or repr(error))
    if any(texts):
        raise ValueError(_joined(texts)) from error


def _joined(texts: list[str]) -> str:
    """What processes tell, each text once, with the processes that tell it if not all do."""
    told: dict[str, list[int]] = {}
    for process, text in enumerate(texts):
        told.setdefault(text, []).append(process)
    told.pop("", None)
    lines = []
    for text, processes in told.items():
        where = f" (in {_named(processes)} of {len(texts)})" if len(processes) < len(texts) else ""
        lines.append(text + where)
    return "; ".join(lines)


def _named(processes: list[int]) -> str:
    """Such as "processes 1, 2 and 40 more"."""
    shown = ", ".join(map(str, processes[:8]))
    more = f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    return f"process{'es' if len(processes) > 1 else ''} {shown}{more}"


def check_same(tree: Mapping[str, Any]) -> None:
    """Refuses configurations that differ between processes.

    Raises:
        ValueError: on all processes; says which has which hash, and the keys that differ.
    """
    if jax.process_count() == 1:
        return
    trees = [json.loads(text) for text in gather_texts(to_json(tree))]
    held: dict[str, list[int]] = {}
    for process, other in enumerate(trees):
        held.setdefault(digest(other), []).append(process)
    if len(held) == 1:
        return
    hashes = "; ".join(f"{name} in {_named(processes)}" for name, processes in held.items())
    lines = {line for other in trees for line in changed_keys(trees[0], other)}
    raise ValueError(
        f"the processes have different configurations: {hashes}; they differ in"
        f" {', '.join(sorted(lines))} (process 0 -> another); start all of them with the same files"
        " and flags"
    )


def share_folder(folder: pathlib.Path) -> None:
    """Makes a folder and checks that all processes see it.

    Raises:
        ValueError: a process does not see what process 0 writes there.
        OSError: it cannot be made (`ValueError` where there are several processes).
    """
    if jax.process_count() == 1:
        folder.mkdir(parents=True, exist_ok=True)
        return
    # Chosen by process 0, so that no file of an earlier run is taken for this one's.
    sign = folder / f".shared-{gather_texts(secrets.token_hex(8))[0]}"

    def put() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sign.touch()

    def find() -> None:
        deadline = time.monotonic() + SHARED_S
        while not sign.exists():
            if time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"{socket.gethostname()} does not see within {SHARED_S:g} s what process 0"
                    f" wrote into --workdir={folder}; give a folder that all processes share, such"
                    " as one on a mounted network file system"
                )
            time.sleep(0.05)

    together(put if is_first() else lambda: None)
    try:
        together(find)
    finally:
        if is_first():
            sign.unlink(missing_ok=True)
