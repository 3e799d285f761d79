"""Ids of documents, kept on disk: a text is tokenised once for all runs that read it.

The files may be deleted at any time. They take two bytes a token, four where the vocabulary has
more than 65,536 ids; each text, tokenizer and version of the library has its own.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from train.data.tokenizer import Tokenizer, content_hash, default_cache_dir, write_atomically

LOGGER = logging.getLogger(__name__)

LEAST_CHARACTERS = 2**17
"""Characters from which on ids are kept: fewer are tokenised in a moment."""


def kept_ids(tokenizer: Tokenizer, texts: Sequence[str], cache_dir: str) -> list[np.ndarray]:
    """Encodes texts, or reads the ids that the same tokenizer gave the same texts before.

    A file that is damaged, or that cannot be written, costs time and nothing else.

    Args:
        tokenizer: The tokenizer.
        texts: Documents.
        cache_dir: Folder of the cache, see `default_cache_dir`.

    Returns:
        For each text its ids [n], int32, without the begin and end ids.
    """
    if sum(map(len, texts)) < LEAST_CHARACTERS:
        return tokenizer.encode_batch(texts)
    path = default_cache_dir(cache_dir) / f"ids-{content_hash(tokenizer.identity(), texts)}.npz"
    if path.is_file():
        try:
            return _read(path, len(texts))
        # Of a damaged file numpy and zipfile raise nearly anything.
        except Exception as error:
            LOGGER.warning("%s is damaged (%s): the texts are tokenised again", path, error)
    made = tokenizer.encode_batch(texts)
    try:
        write_atomically(path, lambda file: _write(file, made))
    except OSError as error:
        LOGGER.warning("ids cannot be kept in %s (%s); see data.cache_dir", path.parent, error)
    return made


def _write(file: BinaryIO, documents: Sequence[np.ndarray]) -> None:
    """All ids in one array of the smallest type that holds them, and the documents' lengths."""
    largest = max((int(each.max(initial=0)) for each in documents), default=0)
    ids = np.empty(sum(map(len, documents)), np.uint16 if largest < 2**16 else np.int32)
    np.concatenate(documents, out=ids, casting="unsafe")
    np.savez(file, ids=ids, lengths=np.array([len(each) for each in documents]))


def _read(path: pathlib.Path, documents: int) -> list[np.ndarray]:
    """The ids of a file; the checksums of its parts are verified.

    Raises:
        ValueError: it holds another number of documents, or lengths that are not its ids'.
    """
    with path.open("rb") as file, np.load(file, allow_pickle=False) as parts:
        ids, lengths = parts["ids"].astype(np.int32), parts["lengths"]
    if len(lengths) != documents or lengths.sum() != len(ids):
        raise ValueError(f"it holds {len(lengths)} documents of {len(ids)} ids")
    return np.split(ids, np.cumsum(lengths)[:-1])
