"""The kernels for CUDA: their tiles, and what of them can be checked without a GPU.

Values and gradients are compared in test_grouped.py, where the kernels are interpreted; here the
code that Triton is given is parsed, and so verified, for each product.
"""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

from emoe_jax import devices
from emoe_jax.grouped import grouped_matmul, is_dense, loops, resolve_backend, triton
from emoe_jax.grouped.products import Product


def shapes_of(product, M, E, D, F):
    """Shapes of the two operands."""
    return {
        Product.MATRIX: ((M, D), (E, D, F)),
        Product.TRANSPOSE: ((M, F), (E, D, F)),
        Product.COLUMNS: ((M, D), (M, F)),
    }[product]


def test_tiles_of_rows_written_out():
    # Blocks of 2 of 9 rows: expert 0 has 3 (2 tiles), 1 none, 2 has 2 (1), and 4 are nobody's (2).
    # Six more could have been needed at most: 9 // 2 + 4 in all.
    groups, starts, ends = triton._row_tiles(jnp.array([3, 0, 2], jnp.int32), M=9, block=2)
    np.testing.assert_array_equal(groups[:5], [0, 0, 2, 3, 3])
    np.testing.assert_array_equal(starts[:5], [0, 2, 3, 5, 7])
    np.testing.assert_array_equal(ends[:5], [3, 3, 5, 9, 9])
    assert len(groups) == 8
    assert (starts[5:] >= ends[5:]).all()


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), spare=st.integers(0, 5))
def test_tiles_take_each_row_once(sizes, spare):
    M = sum(sizes) + spare
    if not M:
        return
    block = 4
    tiles = triton._row_tiles(jnp.array(sizes, jnp.int32), M, block)
    owner = np.repeat(np.arange(len(sizes) + 1), [*sizes, spare])
    rows = [
        (row, group)
        for group, start, end in zip(*map(np.asarray, tiles), strict=True)
        for row in range(start, min(start + block, end))
    ]
    assert sorted(rows) == list(enumerate(owner))


def test_no_tile_reaches_past_the_rows():
    # Sizes of 44 rows where there are 8.
    _, starts, ends = triton._row_tiles(jnp.array([4, 40], jnp.int32), M=8, block=4)
    assert list(zip(starts[:2].tolist(), ends[:2].tolist(), strict=True)) == [(0, 4), (4, 8)]
    assert (starts[2:] >= ends[2:]).all()


@pytest.mark.parametrize("product", Product)
def test_more_than_a_tile_each_way(product):
    # Sides of 128: two tiles of rows an expert, two of D, two of F, and several steps of depth.
    left, right = (
        jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
        for seed, shape in enumerate(shapes_of(product, 290, 2, 150, 130))
    )
    sizes = jnp.array([140, 141], jnp.int32)
    run = jax.jit(triton.multiply, static_argnums=(0, 4))
    got = run(product, left, right, sizes, jnp.dtype("float32"))
    want = loops.multiply(product, left, right, sizes, jnp.float32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def mesh_of_gpus(size):
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return AbstractMesh((size,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


def kernels(function, *arrays, platform="cuda", gpus=1):
    """The code of each of Triton's kernels in a program as it is lowered for a platform, parsed."""
    found = []
    with jax.sharding.use_abstract_mesh(mesh_of_gpus(gpus)):
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,))

    def visit(operation):
        target = operation.attributes.get("call_target_name")
        if target is not None and "triton" in str(target):
            found.append(ir.DictAttr(operation.attributes["mhlo.backend_config"])["ir"])
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    context = ir.Context()
    triton_dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        return [str(ir.Module.parse(ir.StringAttr(code).value_bytes)) for code in found]


@pytest.mark.parametrize("product", Product)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
# Sides that tiles divide, and sides that need masks.
@pytest.mark.parametrize("sides", [(64, 128), (40, 33)])
def test_code_for_cuda_is_valid(product, dtype, sides):
    left, right = (
        jax.ShapeDtypeStruct(shape, dtype) for shape in shapes_of(product, 300, 3, *sides)
    )
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    # Gradients of weights that stay in float32 are not rounded.
    for result in {dtype, "float32"} if product is Product.COLUMNS else {dtype}:
        run = partial(triton.multiply, product, dtype=jnp.dtype(result))
        (code,) = kernels(run, left, right, sizes)
        assert code.count("tt.dot") == 1
        assert code.count("scf.for") == 1


class GPU:
    """What of a device is asked."""

    platform = "gpu"

    def __init__(self, capability, version="cuda 13000"):
        self.compute_capability = capability
        self.client = types.SimpleNamespace(platform_version=version)


def compute_on(monkeypatch, *those):
    monkeypatch.setattr(devices, "all_devices", lambda: those)


@pytest.fixture
def on_gpu(monkeypatch):
    """Traces as in a process that computes on one H100."""
    compute_on(monkeypatch, GPU("9.0"))


def test_auto_by_kind_of_gpu(monkeypatch):
    compute_on(monkeypatch, GPU("8.0"))
    assert resolve_backend("auto") == resolve_backend("auto", "cuda") == "triton"
    compute_on(monkeypatch, GPU("9.0"), GPU("7.5"))
    assert resolve_backend("auto") == "ragged_dot"
    assert is_dense("ragged_dot")
    compute_on(monkeypatch, GPU("gfx942", version="rocm 70000"))
    assert resolve_backend("auto") == resolve_backend("auto", "rocm") == "ragged_dot"


@pytest.mark.usefixtures("on_gpu")
def test_auto_lowers_to_them_for_cuda_alone():
    arrays = jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.array([4, 4], jnp.int32)
    step = jax.grad(lambda *arrays: jnp.sum(grouped_matmul(*arrays)), (0, 1))
    # Both gradients; the sum needs no product.
    assert len(kernels(step, *arrays)) == 2
    for platform in ("cpu", "tpu", "rocm"):
        assert not kernels(step, *arrays, platform=platform)


@pytest.mark.usefixtures("on_gpu")
def test_results_vary_over_the_mesh_as_the_operands_do():
    sharded = jax.shard_map(
        lambda rows, weights, sizes: grouped_matmul(rows, weights, sizes[0]),
        mesh=mesh_of_gpus(2),
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
    )
    step = jax.grad(lambda *arrays: jnp.sum(sharded(*arrays)), (0, 1))
    arrays = jnp.ones((8, 4)), jnp.ones((3, 4, 4)), jnp.array([[1, 0, 3], [2, 2, 0]], jnp.int32)
    # The types inside shard_map are checked when the step is traced.
    assert len(kernels(step, *arrays, gpus=2)) == 2


@pytest.mark.usefixtures("on_gpu")
def test_integers_of_64_bits():
    rows, weights = jnp.ones((5, 4)), jnp.ones((2, 4, 3))
    sizes = jnp.array([1, 3], jnp.int32)

    def step(backend, *operands):
        return jax.grad(lambda *arrays: jnp.sum(grouped_matmul(*arrays, backend=backend)), (0, 1))(
            *operands
        )

    want = step("loops", rows, weights, sizes)
    with jax.enable_x64(True):
        got = jax.jit(partial(step, "triton"))(rows, weights, sizes)
        assert len(kernels(partial(step, "auto"), rows, weights, sizes)) == 2
    for mine, exact in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, exact)


@pytest.mark.usefixtures("on_gpu")
def test_other_dtypes_are_refused_and_auto_has_loops_for_them():
    with jax.enable_x64(True):
        rows, weights = jnp.ones((4, 2), jnp.float64), jnp.ones((2, 2, 3), jnp.float64)
        sizes = jnp.array([1, 3], jnp.int32)
        with pytest.raises(ValueError, match=r'"triton" takes float32, .*, not float64; .*"loops"'):
            grouped_matmul(rows, weights, sizes, backend="triton")
        lowered = jax.jit(grouped_matmul).trace(rows, weights, sizes)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in text
    assert "ragged_dot" not in text
    assert "triton" not in text
