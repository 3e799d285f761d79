"""Optimizers: AdamW with warm-up and cosine, decay masks, frozen parts, the retraction of bases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from emoe_jax.basis import is_basis, orthonormalize
from emoe_jax.config import require, require_positive

Tree = Any

DECAYED = frozenset({"kernel", "w_gate", "w_up", "w_down", "embedding", "head"})
"""Names of the matrices that weight decay shrinks; norms, biases, positions, gates of the
eigenbasis router and bases are left alone."""

UPPER_LEVELS = 4
"""Levels of the tree that an error lists: down to a block's parts, blocks/groups/0/moe."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) with warm-up and cosine decay.

    Attributes:
        learning_rate: the peak.
        warmup: steps over which the learning rate rises from zero.
        final: the learning rate at the last step, as a share of the peak.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of the matrices in `DECAYED`, times the learning rate.
        clip: global norm to which gradients are clipped.
        router_scale: the routers' learning rate as a share of the others'. AdamW moves every weight
            by about the learning rate, so one step moves a score by up to that times the sum of
            |h_d|; below 1 the choice of experts keeps up with its balance.
        trainable: names of path parts, such as ("moe", "alpha", "head"): a parameter is trained if
            one of the parts of its path is among them, and keeps its bits otherwise. Empty: all are
            trained. Running state of routers is no parameter and always moves.
    """

    learning_rate: float = 1e-3
    warmup: int = 100
    final: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    router_scale: float = 1.0
    trainable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values."""
        require_positive(learning_rate=self.learning_rate, eps=self.eps, clip=self.clip)
        require_positive(router_scale=self.router_scale)
        require(self.warmup >= 0, f"optim.warmup={self.warmup} is below zero")
        require(0 <= self.final <= 1, f"optim.final={self.final} must lie between 0 and 1")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} is below zero")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value} must lie in [0, 1)")
        require(
            not isinstance(self.trainable, str),
            f"optim.trainable must be a tuple of names, got the string {self.trainable!r}; write"
            f" ({self.trainable!r},)",
        )


def schedule(config: OptimConfig, steps: int) -> Callable[[Any], jax.Array]:
    """Learning rate by step: linear warm-up, then cosine to `final` at the last step.

    Raises:
        ValueError: the warm-up is as long as the training.
    """
    require(
        config.warmup < steps,
        f"optim.warmup={config.warmup} is not below steps={steps}; the learning rate would never"
        f" reach its peak: set optim.warmup to {max(steps // 10, 0)}, or train longer",
    )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup,
        decay_steps=steps,
        end_value=config.final * config.learning_rate,
    )


def decay_mask(params: Tree) -> Tree:
    """True for the leaves that weight decay shrinks."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) in DECAYED, params
    )


def router_mask(params: Tree) -> Tree:
    """True for the leaves that belong to a router."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(part, "key", None) == "router" for part in path), params
    )


def partition(params: Tree, trainable: Collection[str]) -> tuple[Tree, Tree]:
    """Splits parameters into those that are trained and those that stay as they are.

    Args:
        params: nested dict.
        trainable: see `OptimConfig`.

    Returns:
        Two nested dicts without empty ones: each leaf is in one of them, at its own path.

    Raises:
        ValueError: a name is no part of any path.
    """
    leaves = traverse_util.flatten_dict(params)
    parts = {part for path in leaves for part in path}
    unknown = [name for name in trainable if name not in parts]
    if unknown:
        upper = sorted({part for path in leaves for part in path[:UPPER_LEVELS]})
        raise ValueError(
            f"optim.trainable names {unknown[0]!r}, which is no part of any parameter's path; the"
            f" names on the upper {UPPER_LEVELS} levels are {', '.join(upper)}"
        )
    names = set(trainable) or parts
    trained = {path: leaf for path, leaf in leaves.items() if not names.isdisjoint(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trained}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def merge(trained: Tree, frozen: Tree) -> Tree:
    """The parameters whose `partition` these are."""
    leaves = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(leaves)


def retract_bases(method: str = "qr") -> optax.GradientTransformation:
    """Ends a chain of transforms so that every basis stays orthonormal after the update.

    The update u of a basis weight w becomes qf(w + u) - w, with qf the sign-fixed Q factor: the
    QR retraction on the Stiefel manifold (Absil, Mahony, Sepulchre 2008, example 4.1.3). With the
    methods "qr" and "cholesky_qr" this is "the weight is replaced by its own Q"; with "retraction",
    where the gradient is that of a free matrix, it is the paper's code's way.

    Args:
        method: see `basis.orthonormalize`.
    """

    def update(updates: Tree, state: optax.EmptyState, params: Tree | None = None) -> Any:
        require(params is not None, "retract_bases needs the parameters; pass params to update")

        def retract(path: tuple[Any, ...], step: jax.Array, weight: jax.Array) -> jax.Array:
            if not is_basis(path):
                return step
            return orthonormalize(weight + step, method) - weight

        return jax.tree_util.tree_map_with_path(retract, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimConfig, steps: int, basis_method: str = "qr"
) -> optax.GradientTransformation:
    """The training's optimizer: clip, AdamW on a schedule with masked decay, retraction.

    Args:
        config: its options.
        steps: steps of the whole training, where the cosine ends.
        basis_method: see `retract_bases`.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
        optax.masked(optax.scale(config.router_scale), router_mask),
        retract_bases(basis_method),
    )


def global_norm(tree: Tree) -> jax.Array:
    """Root of the sum of squares of all leaves, float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
