"""Byte-level tokenizers: text to ids and back, exactly.

One class serves the plain byte tokenizer, a byte-pair encoding trained on the run's own training
documents, and any byte-level tokenizer.json of the `tokenizers` library. All three are saved as one
tokenizer.json.
"""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

BOS = "<|bos|>"
EOS = "<|eos|>"

# Other projects' names for the same two ids; one id may serve as both.
_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
# Everything that a normaliser or a pre-tokenizer could swallow: runs of spaces, line endings,
# decomposed and composed accents, wide and astral characters, controls, and the specials' names.
# The second one begins without a space, which a prefix would change.
_PROBES = (
    f" a  b\t\r\n\n e\u0301 \xe9 \u6f22\u5b57 \U0001f600 \x00 \ufeff ﬁ {BOS}{EOS} <s> ",
    "a",
)
_ENCODE_CHUNK = 256
# The largest vocabularies have a quarter of a million.
_MOST_IDS = 2**24
# Bytes that no UTF-8 holds (RFC 3629, section 1).
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}


class Tokenizer:
    """A byte-level tokenizer: every UTF-8 text survives encode and decode unchanged.

    Attributes:
        vocab_size: Number of ids, special ones included.
        bos_id: Id that begins a document.
        eos_id: Id that ends a document.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "tokenizer"):
        """Wraps a tokenizer of the `tokenizers` library.

        Args:
            backend: The tokenizer; its model must be byte-level.
            name: For errors.

        Raises:
            ValueError: If it is not byte-level, loses text, or has no begin or end token.
        """
        # The names of special tokens inside a document are ordinary text.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        ids = set(vocabulary.values())
        if len(ids) < len(vocabulary):
            raise ValueError(
                f"{name} has {len(vocabulary)} tokens, but only {len(ids)} ids: an id that stands "
                "for two tokens is decoded to the wrong text; fetch it again, or use 'bpe' or "
                "'bytes'"
            )
        # One more than the largest id: the file of another project may leave gaps between ids.
        self.vocab_size: int = max(ids, default=-1) + 1
        if not 0 < self.vocab_size <= _MOST_IDS:
            raise ValueError(
                f"{name} has {self.vocab_size} ids, for each of which a model has a row; there "
                f"must be some, and at most {_MOST_IDS}"
            )
        self.bos_id = _special_id(backend, _BOS_NAMES, name)
        self.eos_id = _special_id(backend, _EOS_NAMES, name)
        self._bytes_of = _byte_table(backend, name)
        self._is_bytes = backend.get_vocab_size(with_added_tokens=False) == 256 and all(
            self._bytes_of.get(i) == bytes([i]) for i in range(256)
        )
        if any(self.decode(self.encode(probe)) != probe for probe in _PROBES):
            raise ValueError(
                f"{name} does not give back the text it encodes; use one without normaliser and "
                "prefix space (ByteLevel pre-tokenizer and decoder), or 'bpe' or 'bytes'"
            )

    def encode(self, text: str) -> np.ndarray:
        """Encodes one text.

        Args:
            text: Any text that has a UTF-8 form.

        Returns:
            Ids [n], int32, without the begin and end ids.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes many texts, each on its own, on all cores.

        Args:
            texts: Texts.

        Returns:
            For each text its ids [n], int32, without the begin and end ids.
        """
        if self._is_bytes:
            return [np.frombuffer(t.encode("utf-8"), np.uint8).astype(np.int32) for t in texts]
        encoded: list[np.ndarray] = []
        for start in range(0, len(texts), _ENCODE_CHUNK):
            chunk = list(texts[start : start + _ENCODE_CHUNK])
            for encoding in self._backend.encode_batch_fast(chunk, add_special_tokens=False):
                encoded.append(np.array(encoding.ids, np.int32))
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids, such as a model samples them; never raises.

        Args:
            ids: Ids of any value. Special ids stand for no text.

        Returns:
            The text. Bytes that are no UTF-8, and ids that the tokenizer does not have (a model's
            vocabulary may be padded), become U+FFFD.
        """
        unknown = "\ufffd".encode()
        data = b"".join(self._bytes_of.get(int(i), unknown) for i in ids)
        return data.decode("utf-8", errors="replace")

    def identity(self) -> str:
        """What decides the ids of a text: the tokenizer's file, and the library's version."""
        return f"tokenizers {tokenizers.__version__}\n{self._backend.to_str()}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokenizer as one tokenizer.json; the file appears whole or not at all.

        Args:
            path: Where; missing folders are made.

        Raises:
            OSError: If it cannot be written.
        """
        write_atomically(pathlib.Path(path), self._backend.to_str(pretty=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a byte-level tokenizer.json.

        Args:
            path: The file.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a tokenizer.json, or not a lossless byte-level one.
        """
        file = pathlib.Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no tokenizer file {file}; data.tokenizer is 'bytes', 'bpe' or the path "
                "of a tokenizer.json"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        # The library raises bare `Exception` for JSON that it cannot use.
        except Exception as error:
            raise ValueError(
                f"{file} is not a tokenizer.json of the tokenizers library ({error}); if it was "
                "written by a run, delete it and start again"
            ) from error
        return cls(backend, str(file))


def byte_tokenizer() -> Tokenizer:
    """Returns the byte tokenizer: ids 0 to 255 are the bytes, 256 begins and 257 ends a document.

    It is a byte-pair encoding without merges, so that it is saved and read like any other.
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    _make_byte_level(backend)
    backend.add_special_tokens([BOS, EOS])
    return Tokenizer(backend, "the byte tokenizer")


def train_bpe(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level byte-pair encoding; the same documents give the same tokenizer.

    Args:
        documents: Training documents.
        vocab_size: Ids wanted: 2 special ids, 256 bytes, and merges.

    Returns:
        The tokenizer; id 0 begins and id 1 ends a document.

    Raises:
        ValueError: If the documents are too small to yield so many ids.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    _make_byte_level(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer=trainer, length=len(documents))
    found = backend.get_vocab_size(with_added_tokens=True)
    if found != vocab_size:
        raise ValueError(
            f"data.vocab_size={vocab_size}, but the training documents yield only {found} ids; set "
            f"data.vocab_size={found} or less, or give more text"
        )
    return Tokenizer(backend, "the trained tokenizer")


def cached_bpe(documents: Sequence[str], vocab_size: int, cache_dir: str) -> Tokenizer:
    """Trains a byte-pair encoding, or reads the one that was trained on the same content before.

    Args:
        documents: Training documents.
        vocab_size: Ids wanted.
        cache_dir: Folder of the cache; empty: emoe_jax under $XDG_CACHE_HOME or ~/.cache.

    Returns:
        The tokenizer.

    Raises:
        ValueError: As `train_bpe`, or if the cached file is damaged.
        OSError: If the cache cannot be written.
    """
    recipe = f"recipe 1, tokenizers {tokenizers.__version__}, {vocab_size}"
    path = default_cache_dir(cache_dir) / f"bpe-{content_hash(recipe, documents)}.json"
    if path.is_file():
        return Tokenizer.load(path)
    tokenizer = train_bpe(documents, vocab_size)
    try:
        tokenizer.save(path)
    except OSError as error:
        raise OSError(
            f"the trained tokenizer cannot be cached in {path.parent} ({error}); set "
            "data.cache_dir to a folder that can be written"
        ) from error
    return tokenizer


def default_cache_dir(cache_dir: str) -> pathlib.Path:
    """Returns the cache folder: the one given, else emoe_jax under $XDG_CACHE_HOME or ~/.cache."""
    if cache_dir:
        return pathlib.Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "emoe_jax"


def content_hash(recipe: str, documents: Iterable[str]) -> str:
    """Hashes what something made from documents depends on: how it is made, and the documents."""
    digest = hashlib.sha256(recipe.encode())
    for document in documents:
        data = document.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def _make_byte_level(backend: tokenizers.Tokenizer) -> None:
    """Sets the byte-level pre-tokenizer and decoder that the JSON file records."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()


def _byte_characters() -> list[str]:
    """Returns the visible character by which byte-level encodings write each byte (GPT-2)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    stand_in = {byte: 256 + i for i, byte in enumerate(hidden)}
    return [chr(stand_in.get(byte, byte)) for byte in range(256)]


def _byte_table(backend: tokenizers.Tokenizer, name: str) -> dict[int, bytes]:
    """Maps each id to its bytes; special ids map to none."""
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    added = backend.get_added_tokens_decoder()
    table: dict[int, bytes] = {}
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        if index in added:
            continue
        try:
            table[index] = bytes(byte_of[character] for character in token)
        except KeyError as error:
            raise ValueError(
                f"{name} is not byte-level: its token {token!r} holds {error}; use a byte-level "
                "tokenizer.json (as GPT-2's), or 'bpe' or 'bytes'"
            ) from error
    # Without a token of its own, a byte is left out silently wherever no merge takes it.
    whole = set(table.values())
    missing = [byte for byte in range(256) if bytes([byte]) not in whole and byte not in _NEVER]
    if missing:
        raise ValueError(
            f"{name} is not byte-level: it has no token for the byte 0x{missing[0]:02x}; use a "
            "byte-level tokenizer.json (as GPT-2's), or 'bpe' or 'bytes'"
        )
    for index, special in added.items():
        table[index] = b"" if special.special else special.content.encode()
    return table


def _special_id(backend: tokenizers.Tokenizer, names: Sequence[str], name: str) -> int:
    """Finds the id of the first of some names that is a special token."""
    special = {
        token.content: index
        for index, token in backend.get_added_tokens_decoder().items()
        if token.special
    }
    for candidate in names:
        if candidate in special:
            return special[candidate]
    raise ValueError(
        f"{name} has none of the special tokens {', '.join(names)}; add one, or use 'bpe'"
    )


def write_atomically(path: pathlib.Path, content: str | Callable[[BinaryIO], object]) -> None:
    """Writes a file under another name and renames it, for readers that come in between.

    Args:
        path: The file.
        content: Its text, or what writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode("utf-8"))
            else:
                content(file)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
