"""The paper's eigenbasis router, exactly as released (EMoE, arXiv 2601.12137).

Source of every equation: the authors' code, github.com/Belis0811/EMoE at 5453639.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from emoe_jax import basis as bases
from emoe_jax.config import MoEConfig
from emoe_jax.routers.base import (
    Context,
    Router,
    RouterState,
    Routing,
    gather_gates,
    linear,
    make_routing,
    router_options,
    select_top_k,
)

Array = jax.Array

ENERGY_EPSILON = 1e-6
"""Added to the total energy of a token before division, as in the release."""


class EigenRouter(Router):
    """Routes a token by its energy along the directions of an orthonormal basis.

    With z = Qᵀh and e_r = z_r² / (Σ z² + 1e-6), expert k scores s_k = Σ_r γ_r m_kr e_r + b_k, where
    m is the softmax of the masks over experts, and p = softmax(s / τ). The K largest p are chosen
    and are the gates, never renormalised; K = E is the release's "soft" mode.

    The basis is used as it stands: `basis.prepare_bases` orthonormalises it, once per step, and
    it is orthonormal when the router is made. `Context.train` prepares it here instead.

    Attributes:
        basis: Q [D,R].
        masks: M [E,R].
        gamma: γ [R].
        bias: b [E].
        companion: P [D,R], only with `BasisConfig.companion`: carried, never trained. Its part of
            the penalty is added, as in the release.
        log_lambda: [R], likewise; nothing reads it.
    """

    OPTIONS: ClassVar[frozenset[str]] = frozenset({"temperature", "orthogonality_weight"})

    def __init__(self, config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        E, R = config.experts, config.basis.rank_of(width)
        options = router_options(config, EigenRouter, temperature=1.0, orthogonality_weight=5e-4)
        self.temperature = options["temperature"]
        self.orthogonality_weight = options["orthogonality_weight"]
        self.top_k = config.top_k
        self.method = config.basis.method
        weight = jax.random.normal(rngs.params(), (width, R), jnp.float32)
        self.basis = nnx.Param(bases.orthonormalize(weight))
        self.has_companion = config.basis.companion
        if self.has_companion:
            weight = jax.random.normal(rngs.params(), (width, R), jnp.float32)
            self.companion = RouterState(bases.orthonormalize(weight))
            self.log_lambda = RouterState(jnp.zeros((R,), jnp.float32))
        self.masks = nnx.Param(jax.random.normal(rngs.params(), (E, R), jnp.float32))
        self.gamma = nnx.Param(jnp.ones((R,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((E,), jnp.float32))

    def __call__(self, tokens: Array, context: Context) -> Routing:
        """Routes tokens [T,D]; see the class."""
        basis = self.basis[...]
        if context.train:
            basis = bases.prepare_in_pass(basis, self.method)
        penalty = orthogonality_penalty(basis)
        if self.has_companion:
            penalty = penalty + orthogonality_penalty(lax.stop_gradient(self.companion[...]))
        z = linear(tokens, basis)
        scores = energy_scores(z, self.masks[...], self.gamma[...], self.bias[...])
        probs = jax.nn.softmax(scores / self.temperature, axis=-1)
        indices = select_top_k(probs, self.top_k)
        return make_routing(
            indices,
            gather_gates(probs, indices),
            probs,
            context.mask,
            aux_loss=self.orthogonality_weight * penalty,
            metrics={"orthonormality_error": bases.orthonormality_error(lax.stop_gradient(basis))},
            stats=moment_stats(tokens, z, context.mask.reshape(-1)),
        )


def energy_scores(z: Array, masks: Array, gamma: Array, bias: Array) -> Array:
    """Scores [T,E] from projections z [T,R]: s_k = Σ_r γ_r m_kr e_r + b_k.

    Args:
        z: [T,R], projections on the basis.
        masks: M [E,R]; m is its softmax over experts, for each direction.
        gamma: γ [R].
        bias: b [E].
    """
    square = jnp.square(z)
    energy = square / (jnp.sum(square, axis=-1, keepdims=True) + ENERGY_EPSILON)
    return linear(energy, (jax.nn.softmax(masks, axis=0) * gamma[None, :]).T) + bias[None, :]


def orthogonality_penalty(basis: Array) -> Array:
    """‖QᵀQ - I‖² (Frobenius) of a basis [D,R]; zero but for rounding where Q is orthonormal."""
    gram = jnp.einsum("dr,ds->rs", basis, basis, precision=lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(gram - jnp.eye(basis.shape[1], dtype=basis.dtype)))


def moment_stats(tokens: Array, z: Array, real: Array) -> dict[str, Array]:
    """Sums over real tokens from which `metrics.energy_captured` follows.

    Returns:
        `token_sum` [D] and `token_square` [] of the tokens h; `z_sum` [R] and `z_square` [] of
        their projections z = Qᵀh.
    """
    h = lax.stop_gradient(jnp.where(real[:, None], tokens.astype(jnp.float32), 0.0))
    z = lax.stop_gradient(jnp.where(real[:, None], z, 0.0))
    return {
        "token_sum": jnp.sum(h, axis=0),
        "token_square": jnp.sum(jnp.square(h)),
        "z_sum": jnp.sum(z, axis=0),
        "z_square": jnp.sum(jnp.square(z)),
    }
