"""The simple parts of a transformer: linear maps, norms, MLP, rotary positions, patches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.remat import multiplied
from emoe_jax.sharding import varying_alike

Array = jax.Array

NORM_EPSILON = 1e-6
"""Added to the mean square or variance before the root; timm's value for Vision Transformers."""


def row_product(x: Array, kernel: Array) -> Array:
    """Maps [...,in] by [in,out] to [...,out] float32: products in x's dtype, sums in float32.

    One product of a matrix of rows: XLA on CPU takes up to twice as long for the gradients of a
    product with several leading axes (docs/performance.md). On a mesh x may be split along its
    first and last axes; along another it would be gathered.

    Both products of the backward pass are in the dtype of x too. Left to JAX they would take the
    float32 cotangent as it is, which on GPU makes them float32 products. A kernel in float32 gets
    a gradient that is not rounded. Differentiable in reverse mode.
    """
    return _row_product(*varying_alike(x, kernel))


@jax.custom_vjp
def _row_product(x: Array, kernel: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    out = _contract(rows, kernel.astype(x.dtype), 1, 0)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def _contract(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Product of two matrices over an axis of each, summed in float32."""
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _row_product_forward(x: Any, kernel: Any) -> tuple[Array, Any]:
    """Keeps what the gradients that are wanted need: of a frozen kernel, no rows."""
    out = _row_product(x.value, kernel.value)
    rows = x.value if kernel.perturbed else None
    matrix = kernel.value if x.perturbed else None
    return out, (rows, matrix, jnp.zeros((0,), x.value.dtype), jnp.zeros((0,), kernel.value.dtype))


def _row_product_backward(kept: Any, cotangent: Array) -> tuple[Array | None, Array | None]:
    x, kernel, x_dtype, kernel_dtype = kept
    d_x = d_kernel = None
    low = cotangent.astype(x_dtype.dtype).reshape(-1, cotangent.shape[-1])
    if kernel is not None:
        d_x = _contract(low, kernel.astype(low.dtype), 1, 1).astype(low.dtype)
        d_x = d_x.reshape(*cotangent.shape[:-1], kernel.shape[0])
    if x is not None:
        d_kernel = _contract(x.reshape(-1, x.shape[-1]), low, 0, 0).astype(kernel_dtype.dtype)
    return d_x, d_kernel


_row_product.defvjp(_row_product_forward, _row_product_backward, symbolic_zeros=True)


class Linear(nnx.Module):
    """y = x W (+ b): weights float32, product in the compute dtype, accumulated in float32.

    Attributes:
        kernel: [in, out], normal with deviation `scale` / sqrt(in).
        bias: [out], only with `bias`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dtype: str,
        *,
        bias: bool = False,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        std = scale / math.sqrt(inputs)
        self.kernel = nnx.Param(
            std * jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32)
        )
        self.dtype, self.biased = dtype, bias
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """Maps [...,in] to [...,out] in the compute dtype."""
        out = row_product(x.astype(self.dtype), self.kernel[...])
        if self.biased:
            out = out + self.bias[...]
        return multiplied(out.astype(self.dtype))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis (arXiv 1910.07467), in float32.

    Attributes:
        scale: [D].
    """

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """Normalises [...,D], keeping its dtype."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + NORM_EPSILON) * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias over the last axis (arXiv 1607.06450), in float32.

    Attributes:
        scale: [D].
        bias: [D].
    """

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """Normalises [...,D], keeping its dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(variance + NORM_EPSILON)
        return (unit * self.scale[...] + self.bias[...]).astype(x.dtype)


def _from_arguments(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function, whose backward pass keeps its arguments, and computes the rest again.

    What lies between takes more memory than they do, and in a deep model more time on CPU to keep
    than to compute (docs/performance.md). Not `jax.checkpoint`, whose inside is seen, and may be
    kept, by a policy of remat around it.
    """

    def backward(arguments: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
        return tuple(jax.vjp(function, *arguments)[1](cotangent))

    again = jax.custom_vjp(function)
    again.defvjp(lambda *arguments: (function(*arguments), arguments), backward)

    @functools.wraps(function)
    def run(*arguments: Array) -> Array:
        return again(*varying_alike(*arguments))

    return run


@_from_arguments
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up (arXiv 2002.05202), elementwise."""
    return jax.nn.silu(gate) * up


@_from_arguments
def gelu(x: Array) -> Array:
    """Exact x Φ(x) (arXiv 1606.08415), elementwise."""
    return jax.nn.gelu(x, approximate=False)


class MLP(nnx.Module):
    """Dense MLP, "swiglu" (three matrices) or "gelu" (two, exact GELU).

    Attributes:
        gate: D to F, only with "swiglu".
        up: D to F.
        down: F to D.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        dtype: str,
        *,
        bias: bool = False,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.gated = activation == "swiglu"
        if self.gated:
            self.gate = Linear(width, hidden, dtype, bias=bias, rngs=rngs)
        self.up = Linear(width, hidden, dtype, bias=bias, rngs=rngs)
        self.down = Linear(hidden, width, dtype, bias=bias, scale=out_scale, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps [...,D] to [...,D] in the compute dtype."""
        if self.gated:
            return self.down(swiglu(self.gate(x), self.up(x)))
        return self.down(gelu(self.up(x)))


def rotate(x: Array, positions: Array, base: float) -> Array:
    """Rotary positions (arXiv 2104.09864): pair i turns by positions * base^(-2i/dim).

    Halves are paired (dimension i with i + dim/2), as in GPT-NeoX and Llama.

    Args:
        x: [B,S,H,dim], dim even.
        positions: [B,S] int32.
        base: of the frequencies.

    Returns:
        Of the shape and dtype of x.
    """
    half = x.shape[-1] // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / half
    angle = positions[:, :, None, None].astype(jnp.float32) * jnp.power(base, -exponent)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class PatchEmbed(nnx.Module):
    """Cuts images into patches and maps each to a token: weights float32, product as in `Linear`.

    Attributes:
        kernel: [patch, patch, channels, D], normal with deviation 1/sqrt(patch² channels).
        bias: [D].
    """

    def __init__(
        self, patch: int, channels: int, width: int, dtype: str, *, rngs: nnx.Rngs
    ) -> None:
        self.patch, self.dtype = patch, dtype
        shape = (patch, patch, channels, width)
        std = 1 / math.sqrt(patch * patch * channels)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, images: Array) -> Array:
        """Maps images [B,height,width,channels] to tokens [B,S,D], row by row."""
        B, height, width, channels = images.shape
        p = self.patch
        tiles = images.reshape(B, height // p, p, width // p, p, channels)
        tiles = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, p * p * channels)
        kernel = self.kernel[...].reshape(p * p * channels, -1)
        out = row_product(tiles.astype(self.dtype), kernel)
        return (out + self.bias[...]).astype(self.dtype)
