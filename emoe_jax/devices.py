"""The devices of this program, of all its processes: their platform, and what they can do."""

from __future__ import annotations

import jax

AMPERE = 8.0
"""Compute capability of NVIDIA GPUs that our Triton kernels and cuDNN's flash attention need."""


def all_devices() -> list[jax.Device]:
    """The devices of all processes, so that all choose the same kernels."""
    return jax.devices()


def platform() -> str:
    """Their platform, with AMD's GPUs by their own name: JAX calls both kinds "gpu"."""
    device = all_devices()[0]
    if device.platform == "gpu" and "rocm" in device.client.platform_version.lower():
        return "rocm"
    return device.platform


def are_ampere_or_later() -> bool:
    """Whether all are NVIDIA GPUs of compute capability `AMPERE` or more."""
    if platform() != "gpu":
        return False
    return all(float(device.compute_capability) >= AMPERE for device in all_devices())
