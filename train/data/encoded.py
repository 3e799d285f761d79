"""Ids of documents, kept on disk: a text is tokenised once for all runs that read it."""

from __future__ import annotations

import hashlib
import io
import logging
import pathlib
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from train.data.tokenizer import Tokenizer, default_cache_dir, write_atomically

LOGGER = logging.getLogger(__name__)

WORTH = 2**20
"""Characters from which on ids are kept: fewer are tokenised in a moment."""

_DAMAGE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a file that is not whole."""


def encoded(tokenizer: Tokenizer, texts: Sequence[str], cache_dir: str) -> list[np.ndarray]:
    """Encodes texts, or reads the ids that the same tokenizer gave the same texts before.

    A file that is damaged, or that cannot be written, costs time and nothing else.

    Args:
        tokenizer: The tokenizer.
        texts: Documents.
        cache_dir: Folder of the cache, see `default_cache_dir`.

    Returns:
        For each text its ids [n], int32, without the begin and end ids.
    """
    if sum(map(len, texts)) < WORTH:
        return tokenizer.encode_batch(texts)
    path = default_cache_dir(cache_dir) / f"ids-{_digest(tokenizer, texts)}.npz"
    if path.is_file():
        try:
            return _read(path, len(texts))
        except _DAMAGE as error:
            LOGGER.warning("%s is damaged (%s): the texts are tokenised again", path, error)
    made = tokenizer.encode_batch(texts)
    try:
        write_atomically(path, _packed(made))
    except OSError as error:
        LOGGER.warning("ids cannot be kept in %s (%s); see data.cache_dir", path.parent, error)
    return made


def _digest(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(tokenizer.identity().encode())
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def _packed(documents: Sequence[np.ndarray]) -> bytes:
    """All ids in one array of the smallest type that holds them, and the documents' lengths."""
    ids = np.concatenate(documents)
    small = np.uint16 if ids.max(initial=0) < 2**16 else np.int32
    file = io.BytesIO()
    np.savez(file, ids=ids.astype(small), lengths=np.array([len(each) for each in documents]))
    return file.getvalue()


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
