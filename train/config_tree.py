"""Dataclasses as trees of keys, and trees of keys as dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from emoe_jax.config import require


def defaults(kind: type) -> dict[str, Any]:
    """Default values of a dataclass as a tree; a value that may be None keeps its type."""
    hints = typing.get_type_hints(kind)
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING:
            continue
        optional = _optional_type(hints[field.name])
        if dataclasses.is_dataclass(field.default):
            tree[field.name] = defaults(type(field.default))
        elif field.default is None and optional is not None:
            tree[field.name] = config_dict.placeholder(optional)
        else:
            tree[field.name] = field.default
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted names, each begun with the prefix."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unknown_key(name: str, known: Sequence[str]) -> str:
    """What to say of a key that does not exist."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
    return f"config key {name!r} does not exist; {hint}"


def build(kind: type, tree: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass from a tree, nested ones included; lists become tuples.

    Args:
        kind: the dataclass.
        tree: values by the names of its fields.
        prefix: of their dotted keys, for errors.

    Raises:
        ValueError: an unknown key, a value of another type, or what the dataclass refuses.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in tree.items():
        require(name in hints, unknown_key(f"{prefix}{name}", [f"{prefix}{key}" for key in hints]))
        hint, key = hints[name], f"{prefix}{name}"
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hint):
            # The experts' keys stand beside the model's, not below them.
            assert isinstance(hint, type)
            value = build(hint, value, "moe." if name == "moe" else f"{key}.")
        values[name] = tuple(value) if isinstance(value, list) else value
        require(
            _fits(values[name], hint),
            f"config key {key!r} cannot be {reprlib.repr(value)}: it takes {_wanted(hint)}",
        )
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; whole numbers have 32 bits, as the steps count them."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(each, inner) for each in value)
    if hint is int:
        return type(value) is int and abs(value) < 2**31
    if hint is float:
        return (type(value) is float and not math.isnan(value)) or _fits(value, int)
    return isinstance(value, hint)


def _wanted(hint: Any) -> str:
    """The values of a field's type, in words."""
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_wanted, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_wanted(typing.get_args(hint)[0])}"
    words = {
        int: "a whole number below 2**31",
        float: "a number",
        str: "text",
        bool: "true or false",
    }
    return words.get(hint, "nothing" if hint is types.NoneType else "a group of keys")


def _optional_type(hint: Any) -> type | None:
    """X of the hint X | None."""
    if not isinstance(hint, types.UnionType):
        return None
    inner = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return inner[0] if len(inner) == 1 else None
