"""Dispatchers: each moves tokens to their experts and back, behind one contract (`base`).

`exchange` does it on a mesh of devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from emoe_jax.config import require_choice
from emoe_jax.dispatch import capacity, dense, dropless
from emoe_jax.dispatch.base import Groups
from emoe_jax.dispatch.exchange import choose, exchange


class Dispatcher(NamedTuple):
    """A pair of functions; see `base`."""

    dispatch: Callable[..., Groups]
    combine: Callable[[jax.Array, Groups], jax.Array]


_BY_NAME = {
    "dense": Dispatcher(dense.dispatch, dense.combine),
    "capacity": Dispatcher(capacity.dispatch, capacity.combine),
    "dropless": Dispatcher(dropless.dispatch, dropless.combine),
}


def dispatcher(name: str) -> Dispatcher:
    """The dispatcher of that name.

    Raises:
        ValueError: there is none.
    """
    require_choice("dispatch", name, _BY_NAME)
    return _BY_NAME[name]


__all__ = ["Dispatcher", "Groups", "choose", "dispatcher", "exchange"]
