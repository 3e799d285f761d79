"""Routers: each decides which experts a token goes to, behind one contract (`base`)."""

from __future__ import annotations

from flax import nnx

from emoe_jax.config import MoEConfig, require_choice
from emoe_jax.routers.base import Context, ExpertChoice, Router, RouterState, Routing
from emoe_jax.routers.eigen import EigenRouter
from emoe_jax.routers.offset import SoftmaxOffsetRouter
from emoe_jax.routers.others import ExpertChoiceRouter, HashRouter, RandomRouter, SoftRouter
from emoe_jax.routers.softmax import LossFreeRouter, SoftmaxRouter, SwitchRouter
from emoe_jax.routers.whitened import WhitenedRouter

ROUTERS: dict[str, type[Router]] = {
    "whitened": WhitenedRouter,
    "eigen": EigenRouter,
    "softmax": SoftmaxRouter,
    "switch": SwitchRouter,
    "loss_free": LossFreeRouter,
    "softmax_offset": SoftmaxOffsetRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "random": RandomRouter,
    "soft": SoftRouter,
}
"""Every router by the name that `MoEConfig.router` takes."""


def router_class(name: str) -> type[Router]:
    """The router of that name.

    Raises:
        ValueError: there is none.
    """
    require_choice("router", name, ROUTERS)
    return ROUTERS[name]


def make_router(config: MoEConfig, width: int, *, rngs: nnx.Rngs) -> Router:
    """Builds the router that a configuration names, for tokens of width D."""
    return router_class(config.router)(config, width, rngs=rngs)  # type: ignore[call-arg]


__all__ = [
    "ROUTERS",
    "Context",
    "EigenRouter",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "HashRouter",
    "LossFreeRouter",
    "RandomRouter",
    "Router",
    "RouterState",
    "Routing",
    "SoftRouter",
    "SoftmaxOffsetRouter",
    "SoftmaxRouter",
    "SwitchRouter",
    "WhitenedRouter",
    "make_router",
    "router_class",
]
