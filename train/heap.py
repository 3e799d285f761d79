"""The C library's memory, kept by the process between steps.

XLA's CPU backend asks the C library for a step's buffers at every step. glibc maps large requests
anew each time and gives them back, and the system clears each page when it is first touched: with
the experts' gradients that was measured to take a quarter of a step (docs/benchmarks).
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys

# glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def keep_memory() -> None:
    """Makes glibc keep what is freed, in one heap: the process stays as large as it ever was.

    Left alone where an accelerator is attached, whose host has other uses for its memory, where
    the user has set one of glibc's own variables, and where there is no glibc.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    tuned = tuned or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    attached = any(glob.glob(pattern) for pattern in _ACCELERATORS)
    if sys.platform != "linux" or tuned or attached:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_MMAP_MAX, 0)  # no request is mapped
    mallopt(_TRIM_THRESHOLD, -1)  # what is free at the heap's end stays
    mallopt(_ARENA_MAX, 1)  # all threads use that heap
