"""Waits until all processes of a run are there, and names those that are not.

`jax.distributed.initialize` waits too, but where a process is missing it aborts the others from
C++ and names nobody. So before it is called, the processes meet on plain sockets at the same
address: each sends one line of JSON to process 0, which answers all of them with one line when the
last has come, or when the time is up. Nothing of this is left open afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

RETRY_S = 0.2
"""Seconds between attempts to reach process 0."""

LINE_S = 5.0
"""Seconds in which a line must arrive from who has connected."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process belongs.

    Attributes:
        host: name or address of process 0.
        port: where process 0 listens.
        count: processes of the run.
        index: this process, from 0.
    """

    host: str
    port: int
    count: int
    index: int

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def meet(place: Place, timeout_s: float) -> None:
    """Returns once all processes have called this.

    Args:
        place: this process's place.
        timeout_s: how long process 0 waits for the others, and each of them for process 0.

    Raises:
        TimeoutError: some did not come, all of which process 0 names; or process 0 did not.
        ValueError: two processes have the same index, or they disagree on their number.
        OSError: the address cannot be used.
    """
    verdict = _receive(place, timeout_s) if place.index == 0 else _report(place, timeout_s)
    if verdict["error"]:
        raise (TimeoutError if verdict["late"] else ValueError)(verdict["error"])


def _receive(place: Place, timeout_s: float) -> Mapping[str, Any]:
    """Process 0: hears the others and answers them."""
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(place))
        connections, greetings = [], [_greeting(place)]
        while len(greetings) < place.count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection = stack.enter_context(server.accept()[0])
                greeting = _read(connection, LINE_S)
                if greeting.keys() != greetings[0].keys():
                    continue  # not one of ours
            except (OSError, ValueError):  # nobody came, or somebody who says nothing
                continue
            connections.append(connection)
            greetings.append(greeting)
        verdict = judge(greetings, place, timeout_s)
        for connection in connections:
            with contextlib.suppress(OSError):
                _write(connection, verdict)
                # Who closes first keeps the port busy for a while; let it be the other side.
                connection.settimeout(LINE_S)
                connection.recv(1)
        return verdict


def judge(greetings: list[dict[str, Any]], place: Place, timeout_s: float) -> dict[str, str | bool]:
    """What process 0 tells all: an error, empty where everyone is there once; and whether late."""
    hosts: dict[int, list[str]] = {}
    for greeting in greetings:
        hosts.setdefault(greeting["index"], []).append(greeting["host"])
    counts = Counter(greeting["count"] for greeting in greetings)
    if len(counts) > 1:
        told = (f"process {g['index']} ({g['host']}) says {g['count']}" for g in greetings)
        error = f"the processes disagree on how many they are: {'; '.join(sorted(told))}"
        return {"error": f"{error}; start all with the same --num_processes", "late": False}
    twice = [f"{i} on {' and '.join(names)}" for i, names in hosts.items() if len(names) > 1]
    if twice:
        error = f"several processes have the same --process_id: {'; '.join(sorted(twice))}"
        return {"error": f"{error}; give each its own, 0 to {place.count - 1}", "late": False}
    missing = [i for i in range(place.count) if i not in hosts]
    if not missing:
        return {"error": "", "late": False}
    there = ", ".join(f"{i} ({hosts[i][0]})" for i in sorted(hosts))
    error = (
        f"{len(hosts)} of {place.count} processes came within {timeout_s:g} s: missing"
        f" {', '.join(map(str, missing))}; there are {there}. Look at the logs of the missing ones,"
        " or give them more time with --cluster_timeout=SECONDS"
    )
    return {"error": error, "late": True}


def _report(place: Place, timeout_s: float) -> Mapping[str, Any]:
    """The other processes: find process 0, report, and wait for what it says."""
    deadline = time.monotonic() + timeout_s
    where = f"process 0 at {place.address}"
    while True:
        left = deadline - time.monotonic()
        try:
            connection = socket.create_connection((place.host, place.port), timeout=max(left, 0.1))
            break
        except OSError as error:  # not there yet; its name may not be known yet either
            if left <= RETRY_S:
                raise TimeoutError(
                    f"process {place.index} of {place.count} found no {where} within"
                    f" {timeout_s:g} s ({error}); look at the logs of process 0, at the address and"
                    " at firewalls, or give it more time with --cluster_timeout=SECONDS"
                ) from error
            time.sleep(RETRY_S)
    with connection:
        try:
            _write(connection, _greeting(place))
            # It may have begun to wait as late as now.
            verdict = _read(connection, timeout_s + 2 * LINE_S)
            if verdict.keys() != {"error", "late"}:
                raise ValueError("another program answers")
            return verdict
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"process {place.index} of {place.count} got no answer from {where} ({error}); look"
                " at its logs, or choose another port if another program has this one"
            ) from error


def _listen(place: Place) -> socket.socket:
    """A socket on all addresses of this machine."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(
            ("", place.port), family=family, backlog=place.count, dualstack_ipv6=dual
        )
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen on port {place.port} ({error}); choose another port"
        ) from error


def _greeting(place: Place) -> dict[str, Any]:
    return {"index": place.index, "count": place.count, "host": socket.gethostname()}


def _write(connection: socket.socket, line: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(line).encode() + b"\n")


def _read(connection: socket.socket, timeout_s: float) -> dict[str, Any]:
    """One line as a dict; `OSError` or `ValueError` where none comes in time."""
    connection.settimeout(timeout_s)
    with connection.makefile("rb") as file:
        line = json.loads(file.readline(65536))
    if not isinstance(line, dict):
        raise ValueError("no JSON object")
    return line
