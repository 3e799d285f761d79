"""Processes meet before JAX starts: all go on together, or all learn who is missing or wrong."""

import socket
import threading

import pytest

from tests.train.ports import free_port
from train.rollcall import Place, judge, meet


def gather(*places: Place, timeout_s: float = 20.0) -> dict[int, str]:
    """Meets in a thread a place; what each ended with, empty where all was well."""
    ended: dict[int, str] = {}

    def call(number: int, place: Place) -> None:
        try:
            meet(place, timeout_s)
            ended[number] = ""
        except (ValueError, OSError) as error:
            ended[number] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def places(count: int, *indices: int) -> list[Place]:
    port = free_port()
    return [Place("127.0.0.1", port, count, index) for index in indices]


def test_all_go_on_whatever_the_order_in_which_they_come():
    assert set(gather(*places(4, 3, 1, 0, 2)).values()) == {""}


def test_the_port_is_free_again_afterwards():
    two = places(2, 0, 1)
    for _ in range(3):
        assert set(gather(*two).values()) == {""}


def test_those_that_came_learn_who_is_missing():
    ended = gather(*places(5, 0, 2, 4), timeout_s=0.5)
    host = socket.gethostname()
    words = (
        f"TimeoutError: 3 of 5 processes came within 0.5 s: missing 1, 3; there are 0 ({host}),"
        f" 2 ({host}), 4 ({host}). Look at the logs of the missing ones, or give them more time"
        " with --cluster_timeout=SECONDS"
    )
    assert set(ended.values()) == {words}


def test_a_missing_first_process_is_named_with_its_address():
    (place,) = places(3, 2)
    words = rf"process 2 of 3 found no process 0 at 127\.0\.0\.1:{place.port} within 0\.5 s \("
    with pytest.raises(TimeoutError, match=words):
        meet(place, 0.5)


def test_a_name_that_nobody_knows_yet_is_asked_for_again(monkeypatch):
    first, second = places(2, 0, 1)
    connect, tried = socket.create_connection, []

    def slow(address, timeout):
        tried.append(address)
        if len(tried) == 1:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", slow)
    assert set(gather(first, second).values()) == {""}
    assert len(tried) > 1


def test_two_processes_with_one_id_are_told_so():
    words = "ValueError: several processes have the same --process_id: 1 on "
    ended = gather(*places(3, 0, 1, 1))
    assert all(text.startswith(words) for text in ended.values())
    assert all(text.endswith("give each its own, 0 to 2") for text in ended.values())


def test_processes_that_count_differently_are_told_so():
    first, second = places(2, 0, 1)
    ended = gather(first, Place(second.host, second.port, 3, 1))
    assert all("disagree on how many they are: process 0 (" in text for text in ended.values())
    assert all("says 2; process 1 (" in text and "says 3" in text for text in ended.values())


def test_a_stranger_at_the_door_is_let_pass():
    first, second = places(2, 0, 1)

    def knock() -> None:
        while True:
            try:
                connection = socket.create_connection((first.host, first.port), timeout=5)
                break
            except ConnectionRefusedError:
                continue
        with connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        meet(second, 20)

    thread = threading.Thread(target=knock)
    thread.start()
    meet(first, 20)
    thread.join()


def test_a_port_that_another_program_has_is_refused():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            OSError, match=f"process 0 cannot listen on port {port} .* another port"
        ):
            meet(Place("127.0.0.1", port, 2, 0), 1)

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"\x00\x00\x12\x04\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConnectionError, match=f"no answer from process 0 at .*:{port} "):
            meet(Place("127.0.0.1", port, 2, 1), 5)
        thread.join()


def test_a_process_that_comes_twice_does_not_stand_for_the_missing_one():
    greetings = [{"index": i, "count": 3, "host": f"host{i}"} for i in (0, 1, 1)]
    verdict = judge(greetings, Place("", 1, 3, 0), 1.0)
    assert "1 on host1 and host1" in verdict["error"]
