"""Ports on loopback that tests use."""

import random
import socket


def free_port(first: int = 20000, last: int = 32000) -> int:
    """A port that nobody listens on, drawn between two: outside those that the system hands out."""
    while True:
        port = random.randrange(first, last)
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                return port
