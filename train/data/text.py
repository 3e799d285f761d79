"""Text for language models: documents in, packed rows of ids out.

Training rows are endless, seeded and exactly restorable. Held-out documents are scored in
overlapping windows, every target once. What a model then scores depends on the windows only through
the context that a target sees (and, with dispatch "capacity", through what else is in its batch).
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from grain import experimental as grain_experimental

from emoe_jax import json_file
from train.data import packing, shards, sources
from train.data.config import BYTE_VOCABULARY, TextConfig
from train.data.encoded import kept_ids
from train.data.tokenizer import Tokenizer, byte_tokenizer, cached_bpe, write_atomically

__all__ = ["TextConfig", "TextData", "load_text"]

SPLIT = "split.json"
"""File beside a run's tokenizer: digests of its training and held-out documents."""

LOGGER = logging.getLogger(__name__)

_PREFETCH = 2
"""Batches that a thread makes ready while the model computes."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
    """Tokenised text of a run; `load_text` builds it.

    Attributes:
        config: What it was built from.
        tokenizer: Encodes and decodes.
        heldout_bytes: UTF-8 bytes of the held-out documents: the denominator of bits per byte.
        heldout_targets: Targets that `heldout_batches` scores, one EOS per document included.
    """

    config: TextConfig
    tokenizer: Tokenizer
    heldout_bytes: int
    heldout_targets: int
    _documents: tuple[sources.Documents, ...] = dataclasses.field(repr=False)
    _heldout: tuple[np.ndarray, ...] = dataclasses.field(repr=False)

    @functools.cached_property
    def _tokenised(self) -> tuple[tuple[np.ndarray, ...], ...]:
        """For each source its framed training documents; none where it streams.

        Programs that only score or sample never ask for them.
        """
        return tuple(
            () if each.streamed else _frame_all(self.tokenizer, each.train, self.config.cache_dir)
            for each in self._documents
        )

    @property
    def train_targets(self) -> int:
        """Targets of one epoch of the sources that are held in memory."""
        return sum(len(ids) - 1 for documents in self._tokenised for ids in documents)

    def train_iterator(
        self, batch: int, *, seed: int, rows: np.ndarray | None = None
    ) -> shards.GlobalBatches:
        """Returns an endless iterator of training batches.

        Every epoch visits each piece once, in an order and with cuts of its own. Sources are mixed
        row by row, by weight. Data shards hold disjoint parts of every epoch.

        Args:
            batch: Rows of the global batch.
            seed: Seed, non-negative.
            rows: Rows of the global batch that are wanted here, B of them, ascending; None: all.

        Returns:
            An iterator of dicts, all [B, S] int32: `tokens` (inputs), `targets` (the next token),
            `segments` (1, 2, … per piece in the row, 0 for padding) and `positions` (from 0 in
            each piece). Its `get_state()` is a JSON-serialisable dict, and `set_state()` of it
            continues with the very next batch. `close()` stops its thread.

        Raises:
            ValueError: If the shards do not divide the batch, or the seed is negative.
        """
        shards.check_seed(seed)
        streams = [
            self._stream(i, shards.derive_seed(seed, i)) for i in range(len(self._documents))
        ]

        def open_shard(shard: int) -> grain.DatasetIterator:
            parts = [stream(shard=shard, shards=self.config.shards) for stream in streams]
            mixed = parts[0] if len(parts) == 1 else grain.IterDataset.mix(parts, weights)
            batches = mixed.batch(batch // self.config.shards, drop_remainder=True)
            named = batches.map(packing.named_rows)
            ready = grain_experimental.ThreadPrefetchIterDataset(
                named, prefetch_buffer_size=_PREFETCH
            )
            return iter(ready)

        weights = self.config.weights
        return shards.GlobalBatches(open_shard, batch=batch, shards=self.config.shards, rows=rows)

    def _stream(self, source: int, seed: int) -> Callable[..., grain.IterDataset]:
        """Returns what makes the endless packed rows of one source, given shard and shards."""
        documents, S = self._documents[source], self.config.sequence_length
        if not documents.streamed:
            joined = packing.TokenisedDocuments.join(self._tokenised[source], S, seed)
            return functools.partial(packing.memory_rows, joined)
        tokenise = functools.partial(_frame, self.tokenizer)
        return functools.partial(
            packing.streamed_rows, documents.train, tokenise, sequence_length=S, seed=seed
        )

    def heldout_batches(
        self, batch: int, *, rows: np.ndarray | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields batches that score every held-out target exactly once, always in the same order.

        A document is read in windows of S positions that begin S // 2 apart; a window scores what
        the window before it did not reach, so that every target but a document's first S has at
        least S // 2 positions of context. Windows that are short are packed together.

        Args:
            batch: Rows of the global batch.
            rows: As in `train_iterator`; the number of batches does not depend on it.

        Returns:
            An iterator of dicts as of `train_iterator`, with `scored` [B, S] bool: false for
            context and for padding. Rows that pad the last batch have segments 0.

        Raises:
            ValueError: If there are no such rows.
        """
        S = self.config.sequence_length
        mine = shards.check_rows(batch, rows)
        stride = max(1, S // 2)
        batches = packing.heldout_rows(self._heldout, batch=batch, sequence_length=S, stride=stride)
        return ({key: array[mine] for key, array in arrays.items()} for arrays in batches)


def load_text(config: TextConfig, *, tokenizer_path: pathlib.Path | None = None) -> TextData:
    """Reads, splits and tokenises the documents of a run.

    Args:
        config: The `data.*` keys.
        tokenizer_path: The run's own tokenizer.json. If the file exists, the run goes on with it;
            otherwise the tokenizer is built as `config` says and saved there.

    Returns:
        The data.

    Raises:
        ValueError: If a document or the tokenizer does not fit the configuration, nothing is left
            to train on, or the run was begun with other documents.
        FileNotFoundError: If files or a prepared dataset are missing.
        ModuleNotFoundError: If a package is missing.
    """
    documents = _without_heldout(
        [sources.load_documents(source, config) for source in config.sources]
    )
    if tokenizer_path is not None:
        _check_record(documents, tokenizer_path.with_name(SPLIT))
    tokenizer = _load_tokenizer(config, documents, tokenizer_path)
    heldout = [text for each in documents for text in each.heldout if text]
    if not heldout:
        raise ValueError(f"the held-out documents of {config.sources} hold no text")
    framed = _frame_all(tokenizer, heldout, config.cache_dir)
    return TextData(
        config=config,
        tokenizer=tokenizer,
        heldout_bytes=sum(len(text.encode("utf-8")) for text in heldout),
        heldout_targets=sum(len(ids) - 1 for ids in framed),
        _documents=tuple(documents),
        _heldout=framed,
    )


def _without_heldout(documents: Sequence[sources.Documents]) -> list[sources.Documents]:
    """Takes out of the training documents those that are held out too.

    Sources may overlap, and corpora repeat documents: what is scored must not have been seen.
    Streamed sources have splits of their own and are left as they are.
    """
    held = {_hash(text) for each in documents for text in each.heldout}
    kept = []
    for each in documents:
        if each.streamed:
            kept.append(each)
            continue
        train = tuple(text for text in each.train if _hash(text) not in held)
        if not train:
            raise ValueError(
                f"every training document of {each.source!r} is held out as well; remove"
                " repetitions, or sources that overlap"
            )
        if len(train) < len(each.train):
            count = len(each.train) - len(train)
            LOGGER.warning(
                "%s: %d training documents are held out too; dropped", each.source, count
            )
        kept.append(dataclasses.replace(each, train=train))
    return kept


def _check_record(documents: Sequence[sources.Documents], record: pathlib.Path) -> None:
    """Refuses other documents than a run was begun with; records them where it begins.

    Otherwise what its model or tokenizer has seen could be scored as held out.
    """
    split = {
        "train": [_hash(text) for each in documents if not each.streamed for text in each.train],
        "heldout": sorted(_hash(text) for each in documents for text in each.heldout),
    }
    here = {side: _hash("".join(digests)) for side, digests in split.items()}
    if not record.is_file():
        write_atomically(record, json.dumps(here) + "\n")
        return
    begun = json_file.read_object(record)
    changed = [side for side in here if here[side] != begun.get(side)]
    if changed:
        raise ValueError(
            f"the {' and '.join(changed)} documents are not those that this run was begun with"
            f" ({record}): its tokenizer or model may have seen what is held out now; restore the"
            " documents and data.* keys, or use another --workdir"
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _load_tokenizer(
    config: TextConfig, documents: Sequence[sources.Documents], path: pathlib.Path | None
) -> Tokenizer:
    """Takes the run's tokenizer if it has one, else builds the one that is asked for."""
    if path is not None and path.is_file():
        tokenizer = Tokenizer.load(path)
    elif config.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    elif config.tokenizer == "bpe":
        texts = [text for each in documents for text in _tokenizer_texts(each, config)]
        tokenizer = cached_bpe(texts, config.vocab_size, config.cache_dir)
    else:
        tokenizer = Tokenizer.load(config.tokenizer)
    _check_vocab_size(config, tokenizer, path)
    if path is not None and not path.is_file():
        tokenizer.save(path)
    return tokenizer


def _tokenizer_texts(documents: sources.Documents, config: TextConfig) -> Sequence[str]:
    """Chooses the documents that train a tokenizer: all of them, or a spread of a stream."""
    if not documents.streamed:
        return documents.train
    chosen = sources.evenly_spaced(len(documents.train), config.tokenizer_documents)
    return [documents.train[i] for i in chosen]


def _check_vocab_size(config: TextConfig, tokenizer: Tokenizer, path: pathlib.Path | None) -> None:
    """Refuses a vocabulary size that the tokenizer does not have.

    A size equal to the default may have been left out, and says nothing where it is not used.
    """
    if tokenizer.vocab_size == config.vocab_size:
        return
    left_out = config.vocab_size == TextConfig.vocab_size
    if config.tokenizer not in ("bytes", "bpe") and left_out:
        return
    if config.tokenizer == "bytes" and left_out and tokenizer.vocab_size == BYTE_VOCABULARY:
        return
    origin = f"in {path}" if path is not None and path.is_file() else f"{config.tokenizer!r}"
    raise ValueError(
        f"data.vocab_size={config.vocab_size}, but the tokenizer {origin} has "
        f"{tokenizer.vocab_size} ids; set data.vocab_size={tokenizer.vocab_size}, or choose the "
        "tokenizer that belongs to this run"
    )


def _frame_all(
    tokenizer: Tokenizer, texts: Sequence[str], cache_dir: str
) -> tuple[np.ndarray, ...]:
    """Returns for each text BOS, its ids, EOS."""
    return tuple(_with_ends(tokenizer, ids) for ids in kept_ids(tokenizer, texts, cache_dir))


def _frame(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Returns BOS, the text's ids, EOS."""
    return _with_ends(tokenizer, tokenizer.encode(text))


def _with_ends(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Returns BOS, the ids, EOS."""
    return np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]], dtype=np.int32)
