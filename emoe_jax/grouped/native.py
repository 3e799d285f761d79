"""Grouped products compiled for the processor at hand, by LLVM, as calls that XLA makes on CPU.

XLA's own products on CPU cannot read a group whose size is known only at run time without a copy,
and take up to 1.5 times a dense product's time even where equal groups are in place. These read
rows and matrices where they are. They need the package llvmlite (the extra `cpu`) and POSIX.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import struct
import sys
import threading

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from emoe_jax.grouped.products import Product

Array = jax.Array


LLVMLITE = (0, 46)
"""The oldest version that will do."""


@functools.cache
def missing() -> str:
    """Why there are no native products on this machine; "" where there are."""
    try:
        version = importlib.metadata.version("llvmlite")
    except importlib.metadata.PackageNotFoundError:
        return "the package llvmlite is missing; pip install 'emoe_jax[cpu]'"
    if tuple(map(int, version.split(".")[:2])) < LLVMLITE:
        return f"llvmlite {version} is too old; pip install 'emoe_jax[cpu]'"
    if os.name != "posix":
        return f"they need a POSIX system, not {os.name!r}"
    if struct.calcsize("P") != 8 or sys.byteorder != "little":
        return f"they need a 64-bit little-endian machine, not {platform.machine()}"
    return ""


def prepare() -> None:
    """Compiles in a thread of its own: LLVM takes a second and leaves Python free meanwhile."""
    from emoe_jax.grouped.llvm.build import register

    def compile_all() -> None:
        with contextlib.suppress(Exception):  # `multiply` meets it again, and raises it
            register(Product.MATRIX)

    threading.Thread(target=compile_all, name="native products").start()


def multiply(product: Product, left: Array, right: Array, sizes: Array, dtype: jnp.dtype) -> Array:
    """A grouped product; arguments and result as those of `loops.multiply`.

    It is computed in float32, to which operands of lower precision are converted whole, [E,D,F]
    too; float64 is no operand's. Only where `missing()` is "", and in programs that are compiled
    for CPU.
    """
    from emoe_jax.grouped.llvm.build import register

    name = register(product)
    if product is Product.MATRIX:
        shape: tuple[int, ...] = left.shape[0], right.shape[2]
    elif product is Product.TRANSPOSE:
        shape = left.shape[0], right.shape[1]
    else:
        shape = sizes.shape[0], left.shape[1], right.shape[1]
    # Inside shard_map the result varies over the mesh axes over which the operands do.
    kind = jax.typeof(left)
    sharding = NamedSharding(kind.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    result = kind.update(shape=shape, dtype=jnp.dtype(jnp.float32), sharding=sharding)
    call = jax.ffi.ffi_call(name, result, vmap_method="sequential")
    operands = left.astype(jnp.float32), right.astype(jnp.float32)
    return call(*operands, sizes).astype(dtype)
