"""What the backward pass keeps of a block, and what it computes again.

Two things of an expert layer are dear to have again and small to keep: what was decided (which
experts, in which order) and what has travelled (rows of an exchange, there and back). They bear
checkpoint names, whatever the policy; "exchange" keeps them and nothing else but a block's input.
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


def decided(integers: Array) -> Array:
    """Names what a router, or the sorting of its choices, has decided."""
    return checkpoint_name(integers, DECIDED)


def exchanged(rows: Array) -> Array:
    """Names what an exchange has brought."""
    return checkpoint_name(rows, EXCHANGED)


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """The function with what its backward pass computes again.

    Args:
        function: of a block.
        policy: "none": all is kept. "full": nothing but the inputs. "dots": besides them the
            results of matrix products, but for the experts' grouped ones. "exchange": besides them
            what is named here. "full" and "dots" route and exchange a second time.
    """
    if policy == "none":
        return function
    policies = jax.checkpoint_policies
    kept = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "exchange": policies.save_only_these_names(DECIDED, EXCHANGED),
    }
    return jax.checkpoint(function, policy=kept[policy])
