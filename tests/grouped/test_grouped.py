"""The grouped product against a loop over experts, in float64, with both gradients."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from emoe_jax.grouped import grouped_matmul, is_dense, resolve_backend

# (M, E, D, F): one row; fewer rows than experts; blocks smaller than a group and odd ends.
SHAPES = [(1, 1, 1, 1), (5, 9, 2, 3), (50, 1, 3, 2), (301, 5, 4, 3)]


@partial(jax.jit, static_argnames="backend")
def product_and_gradients(rows, weights, sizes, cotangent, backend):
    out, pull_back = jax.vjp(
        lambda rows, weights: grouped_matmul(rows, weights, sizes, backend=backend), rows, weights
    )
    return out, *pull_back(cotangent)


def oracle(rows, weights, sizes, cotangent):
    rows, weights, cotangent = (np.asarray(x, np.float64) for x in (rows, weights, cotangent))
    out, d_rows, d_weights = np.zeros_like(cotangent), np.zeros_like(rows), np.zeros_like(weights)
    start = 0
    for e, size in enumerate(np.asarray(sizes)):
        block = slice(start, start + size)
        out[block] = rows[block] @ weights[e]
        d_rows[block] = cotangent[block] @ weights[e].T
        d_weights[e] = rows[block].T @ cotangent[block]
        start += size
    return out, d_rows, d_weights


def operands(M, E, D, F, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    shapes = (M, D), (E, D, F), (M, F)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


@st.composite
def shape_and_sizes(draw):
    M, E, D, F = draw(st.sampled_from(SHAPES))
    # Cut points of [0, M]: repeated ones make empty experts; the last may fall short of M.
    cuts = sorted(draw(st.lists(st.integers(0, M), min_size=E, max_size=E)))
    return (M, E, D, F), tuple(int(size) for size in np.diff([0, *cuts]))


@pytest.mark.parametrize("backend", ["native", "loops", "ragged_dot", "triton"])
@given(case=shape_and_sizes())
@example(case=((301, 5, 4, 3), (0, 0, 301, 0, 0)))
@example(case=((301, 5, 4, 3), (301, 0, 0, 0, 0)))
@example(case=((301, 5, 4, 3), (0, 0, 0, 0, 301)))
@example(case=((301, 5, 4, 3), (0, 0, 0, 0, 0)))
@example(case=((301, 5, 4, 3), (60, 61, 60, 60, 60)))
@example(case=((301, 5, 4, 3), (297, 1, 1, 1, 1)))
@example(case=((5, 9, 2, 3), (0, 1, 0, 1, 0, 1, 1, 1, 0)))
def test_equals_loop_over_experts(backend, case):
    (M, E, D, F), sizes = case
    rows, weights, cotangent = operands(M, E, D, F)
    # Rows past the last group hold garbage, and so may their cotangents: none of it may show.
    rows = rows.at[sum(sizes) :].set(np.nan)
    cotangent = cotangent.at[sum(sizes) :].set(np.nan)
    got = product_and_gradients(rows, weights, jnp.asarray(sizes, jnp.int32), cotangent, backend)
    want = oracle(rows, weights, sizes, cotangent)
    for mine, exact in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=5e-5)
    out, d_rows, d_weights = got
    assert not out[sum(sizes) :].any()
    assert not d_rows[sum(sizes) :].any()
    assert not d_weights[np.asarray(sizes) == 0].any()


def test_arithmetic_written_out(strict):
    rows = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weights = jnp.array([[[1.0], [10.0]], [[7.0], [7.0]], [[100.0], [1000.0]]])
    sizes = jnp.array([1, 0, 1], jnp.int32)
    out, d_rows, d_weights = product_and_gradients(rows, weights, sizes, jnp.ones((3, 1)), "auto")
    # 1*1 + 2*10; expert 1 is empty; 3*100 + 4*1000; row 2 belongs to nobody.
    chex.assert_trees_all_equal(out, jnp.array([[21.0], [4300.0], [0.0]]))
    chex.assert_trees_all_equal(d_rows, jnp.array([[1.0, 10.0], [100.0, 1000.0], [0.0, 0.0]]))
    expected = jnp.array([[[1.0], [2.0]], [[0.0], [0.0]], [[3.0], [4.0]]])
    chex.assert_trees_all_equal(d_weights, expected)


@pytest.mark.parametrize("backend", ["native", "loops", "ragged_dot", "triton"])
def test_bfloat16_accumulates_in_float32(strict, backend):
    rows, weights, cotangent = operands(301, 5, 4, 3, dtype=jnp.bfloat16)
    sizes = jnp.array([200, 0, 60, 41, 0], jnp.int32)
    got = product_and_gradients(rows, weights, sizes, cotangent, backend)
    for mine, exact in zip(got, oracle(rows, weights, sizes, cotangent), strict=True):
        assert mine.dtype == jnp.bfloat16
        # One rounding to 8 significant bits: half a unit of 2**-8.
        np.testing.assert_allclose(mine.astype(np.float32), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("backend", ["native", "loops", "ragged_dot", "triton"])
def test_under_scan_checkpoint_and_jit(backend):
    rows, weights, _ = operands(24, 3, 4, 4)
    stacked = jnp.stack([weights, 0.5 * weights])
    sizes = jnp.array([[5, 9, 8], [0, 24, 0]], jnp.int32)

    def loss(product, rows, stacked):
        layer = jax.checkpoint(lambda x, layer: (jnp.tanh(product(x, *layer)), None))
        return jnp.sum(jax.lax.scan(layer, rows, (stacked, sizes))[0] ** 2)

    def masked(x, w, size):
        ends = jnp.cumsum(size)
        row = jnp.arange(24)[:, None]
        inside = ((row >= ends - size) & (row < ends)).astype(x.dtype)
        return jnp.einsum("me,md,edf->mf", inside, x, w)

    grouped = partial(grouped_matmul, backend=backend)
    gradients = [
        jax.jit(jax.value_and_grad(partial(loss, product), (0, 1)))(rows, stacked)
        for product in (grouped, masked)
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-6)


# Pallas cannot interpret kernels where check_vma is on; see test_triton.py for that.
@pytest.mark.parametrize(
    ("backend", "check_vma"), [("auto", True), ("auto", False), ("triton", False)]
)
def test_under_shard_map_with_replicated_weights(backend, check_vma):
    rows, weights, _ = operands(16, 3, 4, 2)
    sizes = jnp.array([[3, 0, 4], [1, 7, 0]], jnp.int32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    def sharded(rows, weights, sizes):
        return grouped_matmul(rows, weights, sizes[0], backend=backend)

    def whole(rows, weights, sizes):
        halves = zip(rows.reshape(2, 8, 4), sizes, strict=True)
        return jnp.concatenate([grouped_matmul(half, weights, size) for half, size in halves])

    def value_and_gradients(product):
        def loss(rows, weights):
            return jnp.sum(jnp.sin(product(rows, weights, sizes)))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(rows, weights)

    chex.assert_trees_all_close(
        value_and_gradients(sharded), value_and_gradients(whole), rtol=1e-5, atol=1e-6
    )


def test_no_rows():
    out = grouped_matmul(jnp.zeros((0, 2)), jnp.ones((3, 2, 4)), jnp.zeros(3, jnp.int32))
    chex.assert_shape(out, (0, 4))


def test_auto_follows_the_platform_compiled_for():
    assert resolve_backend("auto") == "native"
    assert resolve_backend("auto", "tpu") == "ragged_dot"
    # In this process, which has no GPU; see test_triton.py.
    assert resolve_backend("auto", "cuda") == "ragged_dot"
    assert resolve_backend("ragged_dot", "cpu") == "ragged_dot"
    rows, weights, _ = operands(8, 2, 4, 4)
    shapes = rows, weights, jnp.array([4, 4], jnp.int32)
    traced = jax.jit(grouped_matmul).trace(*shapes)
    assert "@emoe_grouped_matrix" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "@emoe_grouped_matrix" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_unknown_backend_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match=r"'tokamax' does not exist.*auto, ragged_dot, triton, native, loops"
    ):
        resolve_backend("tokamax")
    with pytest.raises(ValueError, match="'tokamax' does not exist"):
        grouped_matmul(*operands(2, 1, 2, 2)[:2], jnp.array([2], jnp.int32), backend="tokamax")


def test_dense_where_the_compiler_knows_no_grouped_product():
    assert is_dense("ragged_dot")
    assert is_dense("ragged_dot", "cuda")
    assert is_dense("ragged_dot", "rocm")
    assert not is_dense("ragged_dot", "tpu")
    assert not any(is_dense(backend, "cuda") for backend in ("triton", "native", "loops"))


@pytest.mark.parametrize("backend", ["native", "loops", "ragged_dot", "triton"])
def test_wide_weights_are_rounded_for_the_products_and_their_gradients_are_not(backend):
    M, E, D, F = 24, 3, 4, 5
    sizes = jnp.array([9, 0, 13], jnp.int32)
    rows, weights, cotangent = operands(M, E, D, F)
    rows, cotangent = rows.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)
    out, d_rows, d_weights = product_and_gradients(rows, weights, sizes, cotangent, backend)
    low = product_and_gradients(rows, weights.astype(jnp.bfloat16), sizes, cotangent, backend)
    chex.assert_trees_all_equal((out, d_rows), low[:2])
    assert d_weights.dtype == jnp.float32
    exact = oracle(rows, weights, sizes, cotangent)[2]
    # 2^-9 is what rounding to bfloat16 leaves, relatively.
    np.testing.assert_allclose(d_weights, exact, rtol=1e-6, atol=1e-6)
    assert not np.allclose(low[2].astype(jnp.float32), exact, rtol=1e-6, atol=1e-6)


def test_no_rounded_copy_of_the_weights_is_kept():
    rows, weights, _ = operands(6, 2, 3, 4)
    product = partial(grouped_matmul, sizes=jnp.array([4, 2], jnp.int32), backend="loops")
    _, pull_back = jax.vjp(product, rows.astype(jnp.bfloat16), weights)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.shape == weights.shape]
    assert [leaf.dtype for leaf in kept] == [jnp.float32]


@pytest.mark.parametrize(
    ("rows", "weights", "sizes", "words"),
    [
        ((4,), (2, 3, 5), (2,), r"rows \[M,D\]"),
        ((4, 3), (3, 5), (2,), r"weights \[E,D,F\]"),
        ((4, 3), (2, 4, 5), (2,), "rows are 3 wide and weights take 4"),
        ((4, 3), (2, 3, 5), (3,), "sizes counts 3 groups and weights hold 2"),
    ],
)
def test_shapes_that_do_not_fit(rows, weights, sizes, words):
    with pytest.raises(ValueError, match=words):
        grouped_matmul(jnp.zeros(rows), jnp.zeros(weights), jnp.zeros(sizes, jnp.int32))


def test_dtypes_that_do_not_fit():
    rows, weights, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="float32 and weights bfloat16; cast both"):
        grouped_matmul(rows, weights.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match=r"bfloat16 and weights float16.* leave .* in float32"):
        grouped_matmul(rows.astype(jnp.bfloat16), weights.astype(jnp.float16), sizes)
    with pytest.raises(ValueError, match="sizes are float32; cast them to int32"):
        grouped_matmul(rows, weights, sizes.astype(jnp.float32))
