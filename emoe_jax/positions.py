"""The data position of a run, put together from what its processes know of its shards."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from emoe_jax.multihost import gather_texts

Tree = dict[str, Any]


def as_json(name: str, value: Any) -> str:
    """A value as JSON, or `ValueError` where it is none."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a JSON object: {error}.") from error


def whole_position(data_state: Mapping[str, Any]) -> Tree:
    """The positions of all shards, from what each process knows of some.

    Raises:
        ValueError: a position is no JSON, or two processes are at different ones in a shard.
    """
    whole: Tree = {}
    owner: dict[str, int] = {}
    for process, text in enumerate(gather_texts(as_json("data_state", dict(data_state)))):
        for shard, position in json.loads(text).items():
            if whole.setdefault(shard, position) != position:
                raise ValueError(
                    f"Processes {owner[shard]} and {process} are at different positions in data "
                    f"shard {shard!r}: they have not read the same batches."
                )
            owner.setdefault(shard, process)
    return whole


def read_position(stored: Tree | list[str]) -> Tree:
    """Positions by shard, also of a checkpoint from before there were shards.

    Those hold one position for each process, JSON in base64; process i read what is shard i now.
    """
    if isinstance(stored, dict):
        return stored
    return {str(i): json.loads(base64.b64decode(text)) for i, text in enumerate(stored)}
