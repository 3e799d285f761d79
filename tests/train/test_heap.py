"""Memory that is freed and asked for again, in processes of their own."""

import os
import subprocess
import sys

import pytest

# Touches 64 MiB, frees it, touches it again, and prints the page faults of the second time.
PROGRAM = """
import ctypes, glob, resource
if {attached}:
    glob.glob = lambda pattern: [pattern] if "nvidia" in pattern else []
else:
    glob.glob = lambda pattern: []
from train.heap import keep_memory
keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pointer = libc.malloc(1 << 26)
    ctypes.memset(pointer, 1, 1 << 26)
    libc.free(pointer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (1 << 26) // 4096


def faults(attached=False, **variables):
    environment = {k: v for k, v in os.environ.items() if "MALLOC" not in k}
    environment.pop("GLIBC_TUNABLES", None)
    # The package itself keeps memory when it is imported: the program comes before that.
    program = PROGRAM.format(attached=attached)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_memory_is_touched_once():
    assert faults() < PAGES // 10


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"MALLOC_ARENA_MAX": "4"}, id="variable"),
        pytest.param({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, id="tunable"),
        pytest.param({"attached": True}, id="accelerator"),
    ],
)
def test_left_alone(given):
    assert faults(**given) > PAGES // 2
