"""The contract of dispatchers: tokens to groups of rows, and expert outputs back to tokens.

`dispatch(tokens [T,D], routing, ...) -> Groups` copies tokens to rows grouped by expert;
`combine(outputs, groups) -> [T,D]` weighs the experts' outputs by the gates and brings them back.
Neither looks at a logit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

Array = jax.Array


class Groups(NamedTuple):
    """Rows grouped by expert.

    Attributes:
        rows: [E,C,D], C slots for every expert; or [M,D], sorted by expert, where group sizes vary.
        sizes: [E] int32, rows of each expert that hold a token. In the [M,D] form the rows beyond
            their sum hold nothing, and the experts' output there must be zero.
        gates: float32, as `combine` takes them: [T,K] where tokens choose experts, [E,C] where
            experts choose tokens, [E,T] where every expert sees every token.
        plan: what the dispatcher's own `combine` needs.
        dropped: [] float32, assignments of real tokens that found no slot.
    """

    rows: Array
    sizes: Array
    gates: Array
    plan: Any
    dropped: Array
