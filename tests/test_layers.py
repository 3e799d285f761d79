"""Parts of a transformer: linear maps, norms and MLP by hand, rotary positions, patches."""

import math

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from emoe_jax.layers import (
    MLP,
    LayerNorm,
    Linear,
    PatchEmbed,
    RMSNorm,
    gelu,
    rotate,
    row_product,
    swiglu,
)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def test_linear_by_hand():
    linear = Linear(2, 2, "float32", bias=True, rngs=nnx.Rngs(0))
    linear.kernel = nnx.Param(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    linear.bias = nnx.Param(jnp.array([10.0, 20.0]))
    chex.assert_trees_all_close(linear(jnp.array([[1.0, 1.0]])), jnp.array([[14.0, 26.0]]))
    low = Linear(2, 3, "bfloat16", rngs=nnx.Rngs(0))
    assert low(jnp.ones((1, 2))).dtype == jnp.bfloat16
    assert low.kernel[...].dtype == jnp.float32
    assert not hasattr(low, "bias")


def test_products_and_gradients_by_hand():
    # y = x W; of the sum of y·g: dx = g Wᵀ, dW = xᵀ g.
    x, kernel, g = (
        jnp.array([[[1.0, 2.0]]]),
        jnp.array([[1.0, 0.0], [3.0, -1.0]]),
        jnp.array([2.0, 1.0]),
    )
    out, pull = jax.vjp(row_product, x, kernel)
    np.testing.assert_array_equal(out, [[[7.0, -2.0]]])
    d_x, d_kernel = pull(g.reshape(1, 1, 2))
    np.testing.assert_array_equal(d_x, [[[2.0, 5.0]]])
    np.testing.assert_array_equal(d_kernel, [[2.0, 1.0], [4.0, 2.0]])


def products_of(program):
    """The dtypes of the operands and results of all matrix products, inner programs included."""
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(leaf.aval.dtype.name for leaf in (*eqn.invars, *eqn.outvars))
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from products_of(inner)


def test_low_precision_products_are_so_backward_too():
    x, kernel, cotangent = draw((5, 3)).astype(jnp.bfloat16), draw((3, 4), 1), draw((5, 4), 2)

    def gradients(x, kernel):
        return jax.vjp(row_product, x, kernel)[1](cotangent)

    program = jax.make_jaxpr(gradients)(x, kernel)
    # Forward, and for each of the gradients; sums in float32.
    assert list(products_of(program.jaxpr)) == 3 * [("bfloat16", "bfloat16", "float32")]
    d_x, d_kernel = gradients(x, kernel)
    assert (d_x.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    low = np.asarray(cotangent.astype(jnp.bfloat16), np.float32)
    # The kernel's is not rounded: 2^-9 is what that would leave, relatively.
    np.testing.assert_allclose(d_kernel, np.asarray(x, np.float32).T @ low, rtol=1e-5, atol=1e-6)
    narrow = np.asarray(kernel.astype(jnp.bfloat16), np.float32)
    np.testing.assert_allclose(np.asarray(d_x, np.float32), low @ narrow.T, rtol=2**-8, atol=1e-6)


def test_for_what_is_frozen_nothing_is_kept_or_computed():
    x, kernel = draw((5, 3)), draw((3, 4), 1)
    cases = ((lambda x: row_product(x, kernel), x), (lambda kernel: row_product(x, kernel), kernel))
    for function, argument in cases:
        out, pull = jax.vjp(function, argument)
        # A gradient is of the other operand, and takes one product.
        shapes = {leaf.shape for leaf in jax.tree.leaves(pull)}
        assert argument.shape not in shapes
        assert len(list(products_of(jax.make_jaxpr(pull)(out).jaxpr))) == 1


def test_no_rounded_copy_of_the_kernel_is_kept():
    _, pull = jax.vjp(row_product, draw((5, 3)).astype(jnp.bfloat16), draw((3, 4), 1))
    kept = [leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.shape == (3, 4)]
    assert kept == [jnp.float32]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_inside_somebodys_shard_map_gradients_are_those_of_all_rows(activation):
    mlp, x = MLP(3, 5, activation, "float32", bias=True, rngs=nnx.Rngs(0)), draw((8, 3))
    graph, params = nnx.split(mlp)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def loss(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

    rows, whole = PartitionSpec("rows"), PartitionSpec()
    spread = jax.shard_map(
        lambda params, x: jax.lax.psum(loss(params, x), "rows"),
        mesh=mesh,
        in_specs=(whole, rows),
        out_specs=whole,
    )
    result = jax.jit(jax.value_and_grad(spread, (0, 1)))(params, x)
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)


def test_linear_starts_with_the_deviation_of_its_fan_in():
    linear = Linear(64, 64, "float32", scale=0.5, rngs=nnx.Rngs(0))
    assert float(np.std(linear.kernel[...])) == pytest.approx(0.5 / 8, rel=0.05)


def test_norms_by_hand():
    # rms of (3,4) is sqrt(12.5); mean 3.5, deviation 0.5.
    x = jnp.array([[3.0, 4.0]])
    rms, layer = RMSNorm(2), LayerNorm(2)
    np.testing.assert_allclose(rms(x), np.array([[3.0, 4.0]]) / math.sqrt(12.5), rtol=1e-6)
    np.testing.assert_allclose(layer(x), [[-1.0, 1.0]], rtol=1e-5)
    rms.scale = nnx.Param(jnp.array([2.0, 0.0]))
    layer.scale, layer.bias = nnx.Param(jnp.array([2.0, 0.0])), nnx.Param(jnp.array([1.0, 5.0]))
    np.testing.assert_allclose(rms(x), [[6 / math.sqrt(12.5), 0.0]], rtol=1e-6)
    np.testing.assert_allclose(layer(x), [[-1.0, 5.0]], rtol=1e-5)
    assert rms(x.astype(jnp.bfloat16)).dtype == layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_mlp_equals_its_formula(activation):
    mlp, x = MLP(3, 5, activation, "float32", bias=True, rngs=nnx.Rngs(0)), draw((4, 3))
    up = np.asarray(x @ mlp.up.kernel[...], np.float64)
    if activation == "swiglu":
        gate = np.asarray(x @ mlp.gate.kernel[...], np.float64)
        hidden = gate / (1 + np.exp(-gate)) * up
    else:
        hidden = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        assert not hasattr(mlp, "gate")
    np.testing.assert_allclose(
        mlp(x), hidden @ np.asarray(mlp.down.kernel[...], np.float64), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("function", "plain", "arguments"),
    [
        (swiglu, lambda gate, up: gate / (1 + jnp.exp(-gate)) * up, 2),
        (gelu, lambda x: x * (1 + jax.lax.erf(x / math.sqrt(2))) / 2, 1),
    ],
)
def test_activations_keep_their_arguments_alone(function, plain, arguments):
    x = [draw((3, 4), seed) for seed in range(arguments)]
    out, pull = jax.vjp(function, *x)
    expected, pull_plain = jax.vjp(plain, *x)
    cotangent = draw((3, 4), 7)
    chex.assert_trees_all_close(
        (out, pull(cotangent)), (expected, pull_plain(cotangent)), rtol=1e-5, atol=1e-6
    )
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == (3, 4)]
    assert len(kept) == arguments
    for leaf, argument in zip(kept, x, strict=True):
        np.testing.assert_array_equal(leaf, argument)


def test_rotary_angles_by_hand():
    # dim 4, base 100: pair (0,2) turns by the position, pair (1,3) by a tenth of it.
    x = jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = rotate(x, jnp.array([[3]], jnp.int32), 100.0).reshape(4)
    expected = [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_rotary_products_depend_on_the_distance_alone():
    query, key = draw((1, 1, 2, 8)), draw((1, 1, 2, 8), 1)
    turn = jax.jit(lambda x, p: rotate(x, jnp.full((1, 1), p, jnp.int32), 10000.0))

    def product(m, n):
        return jnp.sum(turn(query, m) * turn(key, n), axis=-1)

    chex.assert_trees_all_close(product(5, 2), product(103, 100), atol=1e-4)
    chex.assert_trees_all_close(product(0, 0), product(77, 77), atol=1e-4)
    assert float(jnp.max(jnp.abs(product(5, 2) - product(2, 5)))) > 1e-2
    chex.assert_trees_all_close(turn(query, 0), query)
    assert turn(query.astype(jnp.bfloat16), 1).dtype == jnp.bfloat16


def test_patches_are_flattened_row_by_row_channels_last():
    embed = PatchEmbed(2, 2, 8, "float32", rngs=nnx.Rngs(0))
    embed.kernel = nnx.Param(jnp.eye(8).reshape(2, 2, 2, 8))
    images = jnp.arange(4 * 6 * 2, dtype=jnp.float32).reshape(1, 4, 6, 2)
    tokens = np.asarray(embed(images))
    assert tokens.shape == (1, 6, 8)
    for row in range(2):
        for column in range(3):
            patch = images[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(tokens[0, 3 * row + column], np.ravel(patch))
