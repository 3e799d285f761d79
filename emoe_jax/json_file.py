"""JSON that somebody else wrote: parsed, or refused with the name of the file."""

from __future__ import annotations

import json
import pathlib
import reprlib
from typing import Any


def parse(text: bytes, where: str) -> Any:
    """The value of a JSON text in UTF-8.

    Args:
        text: the text.
        where: what it is, for the error.

    Raises:
        ValueError: it is no UTF-8, no JSON, or nested too deep.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error})") from error


def read(file: pathlib.Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: it is no UTF-8, no JSON, or nested too deep.
        OSError: it cannot be read.
    """
    return parse(file.read_bytes(), str(file))


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: it is no UTF-8, no JSON, nested too deep, or no object.
        OSError: it cannot be read.
    """
    tree = read(file)
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds {reprlib.repr(tree)}, no JSON object")
    return tree
