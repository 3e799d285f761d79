"""What the backward pass keeps of a block, and what it computes again.

Two things of an expert layer are dear to have again: what was decided (which experts, in which
order), and what has travelled (rows of an exchange, there and back). They bear checkpoint names,
whatever the policy; "exchange" keeps them and nothing else but a block's input. What linear maps
give bears a name too, for "dots". No policy, "none" included, keeps further rounds of an exchange
that overflows (see `dispatch.rounds`), the inside of activations (`layers.swiglu`), or experts'
weights, gathered or not (`dispatch.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

DECIDED = "routing_decision"
"""Checkpoint name of chosen experts, their order, and counts of all devices: small integers."""

EXCHANGED = "exchanged_rows"
"""Checkpoint name of rows that have come from other devices."""

MULTIPLIED = "linear_map"
"""Checkpoint name of what a linear map gives, in the compute dtype."""


def decided(integers: Array) -> Array:
    """Names what a router, or the sorting of its choices, has decided.

    The choices of experts ("expert_choice") carry gradients in their values, and are made again.
    """
    return checkpoint_name(integers, DECIDED)


def exchanged(rows: Array) -> Array:
    """Names what an exchange has brought."""
    return checkpoint_name(rows, EXCHANGED)


def multiplied(rows: Array) -> Array:
    """Names what a linear map gives.

    Its product has a derivative of its own (`layers.row_product`): no policy sees it as a product.
    """
    return checkpoint_name(rows, MULTIPLIED)


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """The function with what its backward pass computes again.

    Args:
        function: of a block.
        policy: "none": all else is kept. "full": nothing but the inputs. "dots": besides them the
            results of matrix products (`MULTIPLIED`, and the routers'), but not of batched ones
            (attention's) and grouped ones (the experts'). "exchange": besides them `DECIDED` and
            `EXCHANGED`. "full" and "dots" route and exchange a second time.
    """
    if policy == "none":
        return function
    policies = jax.checkpoint_policies
    kept = {
        "full": policies.nothing_saveable,
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(MULTIPLIED)
        ),
        "exchange": policies.save_only_these_names(DECIDED, EXCHANGED),
    }
    return jax.checkpoint(function, policy=kept[policy])
