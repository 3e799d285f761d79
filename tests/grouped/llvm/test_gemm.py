"""The block product with the tiles of other processors, compiled for this one."""

import ctypes
import functools
import platform

import numpy as np
import pytest
from llvmlite import binding, ir

from emoe_jax.grouped.llvm.build import compile_module
from emoe_jax.grouped.llvm.gemm import Tile, tile_for, write_block

SMALL = {"depth": 32, "height": 16, "width": 64}
TILES = [
    pytest.param(Tile(lanes=16, rows=8, vectors=2, **SMALL), id="avx512"),
    pytest.param(Tile(lanes=8, rows=4, vectors=2, **SMALL), id="avx2"),
    pytest.param(Tile(lanes=4, rows=8, vectors=2, **SMALL), id="neon"),
    pytest.param(Tile(lanes=4, rows=4, vectors=2, **SMALL), id="sse"),
]
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
SIGNATURE = [INTEGER] * 3 + [POINTER, INTEGER, INTEGER] * 2 + [POINTER, INTEGER, POINTER, POINTER]


@functools.cache
def compiled(tile):
    module = ir.Module("block")
    write_block(module, tile)
    engine = compile_module(module)
    function = ctypes.CFUNCTYPE(None, *SIGNATURE)(engine.get_function_address("block"))
    return engine, function


def strided(array):
    """Pointer and strides, in numbers."""
    return array.ctypes.data, *(stride // 4 for stride in array.strides)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("M", "N", "K"), [(16, 64, 32), (13, 37, 71), (1, 1, 1), (16, 33, 0)])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("columns", [True, False])
def test_equals_numpy_and_writes_nothing_else(tile, M, N, K, rows, columns):
    random = np.random.default_rng(0)
    a = random.standard_normal((M, K) if rows else (K, M), np.float32)
    b = random.standard_normal((K, N) if columns else (N, K), np.float32)
    a, b = a if rows else a.T, b if columns else b.T
    c = np.full((M + 1, N + 3), np.nan, np.float32)
    scratch = np.zeros(tile.scratch + 16, np.float32)
    first = scratch.ctypes.data + -scratch.ctypes.data % 64
    a_data, a_outer, a_inner = strided(a)
    b_data, b_inner, b_outer = strided(b)
    _, block = compiled(tile)
    left, right = (a_data, a_outer, a_inner), (b_data, b_outer, b_inner)
    block(M, N, K, *left, *right, c.ctypes.data, N + 3, first, b_data)
    np.testing.assert_allclose(c[:M, :N], a @ b, rtol=0, atol=1e-4)
    assert np.isnan(c[M:]).all()
    assert np.isnan(c[:, N:]).all()


def test_tiles_follow_the_processor():
    assert tile_for({"avx512f": True, "avx2": True}, "x86_64").lanes == 16
    assert tile_for({"avx2": True}, "x86_64").lanes == 8
    assert tile_for({}, "x86_64").lanes == 4
    assert tile_for({"neon": True}, "aarch64").rows == 8
    here = tile_for(dict(binding.get_host_cpu_features()), platform.machine())
    # Accumulators, a row of B and a number of A in 32 or 16 registers.
    registers = 32 if here.lanes == 16 or platform.machine() in ("aarch64", "arm64") else 16
    assert here.rows * here.vectors + here.vectors + 1 <= registers
