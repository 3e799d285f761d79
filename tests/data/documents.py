"""Small documents, configurations and checks that the text tests share."""

import json
import pathlib
from typing import Any

import chex
import grain
import numpy as np

from train.data.text import TextConfig, TextData

S = 16


def write_documents(folder: pathlib.Path, documents: list[str]) -> str:
    """Writes one .txt a document and returns the source that reads them."""
    for number, text in enumerate(documents):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return f"files:{folder}/*.txt"


def byte_config(source: str, **changes: Any) -> TextConfig:
    """Returns a small configuration of the byte tokenizer."""
    keys = {"tokenizer": "bytes", "sequence_length": S, "heldout_every": 4} | changes
    return TextConfig(sources=(source,), **keys)


def take(iterator: grain.DatasetIterator, count: int) -> list[dict[str, np.ndarray]]:
    """Takes some batches."""
    return [next(iterator) for _ in range(count)]


def check_state(data: TextData, steps: int) -> None:
    """Checks that a state saved after some steps continues with the very next batch."""
    iterator = data.train_iterator(4, seed=2)
    take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 40)
    iterator.set_state(state)
    chex.assert_trees_all_equal(take(iterator, 40), expected)
    fresh = data.train_iterator(4, seed=2)
    fresh.set_state(state)
    chex.assert_trees_all_equal(take(fresh, 40), expected)
    assert fresh.get_state() == iterator.get_state()
    iterator.close()
    fresh.close()
