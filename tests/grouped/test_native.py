"""Products compiled for the processor, across the edges of their blocks, against numpy."""

import functools
import importlib.metadata
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.grouped import grouped_matmul, native, prepare, resolve_backend
from emoe_jax.grouped.llvm import build
from emoe_jax.grouped.products import Product

# Blocks are of 256 rows, 512 columns and 256 k, tiles of 8 or 4 rows and 8 to 32 columns.
ACROSS = [
    pytest.param(1030, 300, 530, (513, 0, 257, 256, 4), id="whole blocks and more"),
    pytest.param(263, 257, 33, (7, 256), id="one past a block"),
    pytest.param(40, 512, 1024, (9, 0, 31), id="whole tiles of columns"),
    pytest.param(700, 5, 3, (0, 700), id="narrower than a tile"),
]


def operands(M, E, D, F):
    random = np.random.default_rng(0)
    shapes = (M, D), (E, D, F), (M, F)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def expected(product, rows, weights, cotangent, sizes):
    """The product in float64, one expert after another."""
    rows, weights, cotangent = (x.astype(np.float64) for x in (rows, weights, cotangent))
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    if product is Product.COLUMNS:
        return np.stack([rows[part].T @ cotangent[part] for part in parts])
    left = rows if product is Product.MATRIX else cotangent
    matrices = weights if product is Product.MATRIX else weights.transpose(0, 2, 1)
    out = np.zeros((left.shape[0], matrices.shape[2]))
    for part, matrix in zip(parts, matrices, strict=True):
        out[part] = left[part] @ matrix
    return out


def multiply(product, rows, weights, cotangent, sizes):
    left, right = {
        Product.MATRIX: (rows, weights),
        Product.TRANSPOSE: (cotangent, weights),
        Product.COLUMNS: (rows, cotangent),
    }[product]
    return jitted(product)(left, right, jnp.asarray(sizes, jnp.int32))


@functools.cache
def jitted(product):
    return jax.jit(partial(native.multiply, product, dtype=jnp.float32))


@pytest.mark.parametrize("product", Product, ids=lambda product: product.value)
@pytest.mark.parametrize(("M", "D", "F", "sizes"), ACROSS)
def test_equals_numpy_across_blocks(product, M, D, F, sizes):
    given = operands(M, len(sizes), D, F)
    exact = expected(product, *given, sizes)
    got = multiply(product, *given, sizes)
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_sizes_that_cannot_be_are_cut_off():
    # They are not checked, but nothing outside the arrays is read or written: -5 counts as none,
    # and of 100 rows only the 7 that are left are the third expert's.
    given = operands(10, 3, 4, 6)
    for product in Product:
        got = multiply(product, *given, (3, -5, 100))
        exact = expected(product, *given, (3, 0, 7))
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)


def test_many_threads_at_once():
    given = operands(600, 3, 64, 128)
    sizes = (100, 300, 200)
    exact = {product: expected(product, *given, sizes) for product in Product}

    def many(product):
        return [np.asarray(multiply(product, *given, sizes)) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for product, results in zip([*Product] * 8, pool.map(many, [*Product] * 8), strict=True):
            for got in results:
                np.testing.assert_allclose(got, exact[product], rtol=0, atol=1e-3)


def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("version", [absent, lambda name: "0.43.0"], ids=["absent", "old"])
def test_without_llvmlite_auto_takes_the_loops(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", version)
    native.missing.cache_clear()
    try:
        assert resolve_backend("auto", "cpu") == "loops"
        with pytest.raises(ValueError, match=r"llvmlite.*pip install 'emoe_jax\[cpu\]'"):
            resolve_backend("native")
        rows, weights, _ = operands(4, 2, 3, 5)
        out = grouped_matmul(jnp.asarray(rows), jnp.asarray(weights), jnp.array([1, 3], jnp.int32))
        np.testing.assert_allclose(out[:1], rows[:1] @ weights[0], rtol=1e-5)
        np.testing.assert_allclose(out[1:], rows[1:] @ weights[1], rtol=1e-5)
    finally:
        native.missing.cache_clear()


def test_prepare_compiles_in_the_background_and_products_wait_for_it(monkeypatch):
    begun, go, calls = threading.Event(), threading.Event(), []

    def compile_all():
        calls.append(threading.current_thread())
        begun.set()
        assert go.wait(timeout=60)

    monkeypatch.setattr(build, "_register_all", functools.cache(compile_all))
    prepare("loops")
    assert calls == []
    prepare()
    assert begun.wait(timeout=60)
    with ThreadPoolExecutor(1) as pool:
        name = pool.submit(build.register, Product.MATRIX)
        with pytest.raises(TimeoutError):
            name.result(timeout=0.2)
        go.set()
        assert name.result(timeout=60) == "emoe_grouped_matrix"
    assert len(calls) == 1


def test_under_vmap():
    rows, weights, _ = operands(6, 2, 3, 5)
    sizes = jnp.array([[2, 4], [6, 0]], jnp.int32)
    product = partial(grouped_matmul, jnp.asarray(rows), jnp.asarray(weights), backend="native")
    got = jax.vmap(product)(sizes)
    for out, size in zip(got, sizes, strict=True):
        np.testing.assert_allclose(out, product(size), rtol=1e-6)


def test_float64_is_refused_and_auto_takes_the_loops():
    with jax.enable_x64(True):
        rows, weights, sizes = jnp.ones((2, 3)), jnp.ones((1, 3, 4)), jnp.array([2], jnp.int32)
        with pytest.raises(ValueError, match="no float64"):
            grouped_matmul(rows, weights, sizes, backend="native")
        out = grouped_matmul(rows, weights, sizes)
    assert out.dtype == jnp.float64
    assert out.tolist() == [[3.0] * 4] * 2
