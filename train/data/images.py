"""Images of the vision sources, addressed by index: packages, idx files, prepared tfds datasets.

Every source becomes two `Images`: those to train on and those held out. Small sources are held in
memory; tfds images are read, decoded and resized as they are asked for.
"""

import dataclasses
import gzip
import io
import math
import os
import pathlib
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from train.data import prepared
from train.data.config import VisionConfig
from train.data.resize import to_squares

_HELDOUT_EVERY = 5

# Pixels scaled to [0, 1], over the training images of each source (for digits those not held out).
_DIGITS_MEAN, _DIGITS_STD = 0.3052, 0.3763
_FASHION_MEAN, _FASHION_STD = 0.2860, 0.3530

# Where the Debian package dataset-fashion-mnist puts its files.
_FASHION_DIR = "/usr/share/datasets/fashion-mnist"
# http://yann.lecun.com/exdb/mnist: two zero bytes, the type (8: unsigned byte), the dimensions.
_IDX_UNSIGNED_BYTE = 8

# What Pillow may take bytes for: it has readers that start programs (EPS) or follow references.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# Pixels above which Pillow warns of a decompression bomb; ImageNet's largest images have 61 M.
_MOST_PIXELS = 89_478_485


class Images(Protocol):
    """Images with their labels, as they are to enter a batch."""

    def __len__(self) -> int:
        """Returns how many there are."""

    def read(
        self, indices: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads some of them.

        Args:
            indices: [n] int, below the length.
            rng: Random numbers; where they are given, images are cropped at random, see
                `VisionConfig.crop_scale`.

        Returns:
            Pixels [n, H, W, C] uint8 and labels [n] int32.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """What `load_images` finds.

    Attributes:
        train: Images to train on.
        heldout: Images that are never trained on.
        peak: Pixel value that is white.
        mean: Per channel, of pixels divided by `peak`; the default of the source.
        std: Per channel, as `mean`.
        decodes: Whether reading costs enough to be spread over threads.
    """

    train: Images
    heldout: Images
    peak: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decodes: bool


def load_images(config: VisionConfig) -> ImageSource:
    """Finds the images of the source and checks that they fit the configuration.

    Args:
        config: The `data.*` keys.

    Returns:
        The images.

    Raises:
        ValueError: If files are damaged, or sizes, channels or labels do not fit.
        FileNotFoundError: If files or a prepared dataset are missing.
        ModuleNotFoundError: If a package is missing.
    """
    if config.source == "digits":
        return _load_digits(config)
    if config.source == "fashion_mnist":
        return _load_fashion(config)
    return _load_tfds(config)


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryImages:
    """Grey images in memory.

    Attributes:
        pixels: [n, height, width] uint8.
        labels: [n] int32.
        config: Whether and to what size they are resized.
    """

    pixels: np.ndarray
    labels: np.ndarray
    config: VisionConfig

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, indices: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads as `Images.read`."""
        pixels, labels, config = self.pixels[indices], self.labels[indices], self.config
        if not config.resize:
            return pixels[..., None], labels
        opened = map(Image.fromarray, pixels)
        return to_squares(opened, config.image_size, 1, config.crop_scale, rng), labels


def _load_digits(config: VisionConfig) -> ImageSource:
    """Reads scikit-learn's digits; pixels run from 0 to 16, to 255 where they are resized."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "source 'digits' needs scikit-learn, which is not installed; run `pip install "
            "scikit-learn` or install the `train` extra"
        ) from error
    bunch = datasets.load_digits()
    # Pixels in between are rounded to integers, of which 17 would be few.
    peak = 255 if config.resize else 16
    pixels = np.rint(bunch.images * (peak / 16)).astype(np.uint8)
    held = np.arange(len(pixels)) % _HELDOUT_EVERY == 0
    train = _memory_images(pixels[~held], bunch.target[~held], config)
    heldout = _memory_images(pixels[held], bunch.target[held], config)
    mean, std = (_DIGITS_MEAN,), (_DIGITS_STD,)
    return ImageSource(train, heldout, float(peak), mean, std, decodes=config.resize)


def _load_fashion(config: VisionConfig) -> ImageSource:
    """Reads Fashion-MNIST from its four idx files."""
    directory = config.data_dir or os.environ.get("FASHION_MNIST_DIR") or _FASHION_DIR
    folder = pathlib.Path(directory).expanduser()
    parts = []
    for prefix in ("train", "t10k"):
        pixels = read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"), 3)
        labels_file = _idx_file(folder, f"{prefix}-labels-idx1-ubyte")
        labels = read_idx(labels_file, 1)
        if len(pixels) != len(labels):
            raise ValueError(
                f"{labels_file} holds {len(labels)} labels for {len(pixels)} images; fetch the "
                "files again"
            )
        parts.append(_memory_images(pixels, labels, config))
    train, heldout = parts
    mean, std = (_FASHION_MEAN,), (_FASHION_STD,)
    return ImageSource(train, heldout, 255.0, mean, std, decodes=config.resize)


def _idx_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Finds an idx file, compressed or not."""
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"there is no {name}.gz in {folder}; install the files with `apt-get install "
        "dataset-fashion-mnist`, point data.data_dir or $FASHION_MNIST_DIR at a folder that holds "
        "them, or set data.source='tfds:fashion_mnist'"
    )


def read_idx(file: pathlib.Path, dimensions: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes.

    Args:
        file: The file; gzip if its name ends in .gz.
        dimensions: How many dimensions it should have.

    Returns:
        Array uint8.

    Raises:
        ValueError: If it is damaged, truncated or of another kind.
    """
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        try:
            shape = _read_idx_header(stream, file, dimensions)
            size = math.prod(shape)
            # Memory is taken once it is known to be there, whatever the header promises.
            found = _count_bytes(stream, size + 1)
            data = stream.read(size) if found == size else b""
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file} is damaged: {error}; fetch it again") from error
    if found != size:
        raise ValueError(
            f"{file} holds {found if found < size else f'more than {size}'} values, but its header "
            f"promises {size} ({' x '.join(map(str, shape))}); fetch it again"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _count_bytes(stream: io.BufferedIOBase, most: int) -> int:
    """Bytes to the end of a stream, at most so many or a piece more; few are held at a time.

    The stream stays where it is.
    """
    here, count = stream.tell(), 0
    while count < most and (piece := stream.read(2**20)):
        count += len(piece)
    stream.seek(here)
    return count


def _read_idx_header(
    stream: io.BufferedIOBase, file: pathlib.Path, dimensions: int
) -> tuple[int, ...]:
    """Reads the sizes that an idx file promises."""
    length = 4 + 4 * dimensions
    header = stream.read(length)
    expected = bytes([0, 0, _IDX_UNSIGNED_BYTE, dimensions])
    if header[:4] != expected:
        raise ValueError(
            f"{file} begins with {header[:4].hex()}, not with the idx magic {expected.hex()} of "
            f"{dimensions}-dimensional unsigned bytes; fetch it again"
        )
    if len(header) < length:
        raise ValueError(
            f"{file} ends inside its header, after {len(header)} of {length} bytes; fetch it again"
        )
    return tuple(int(size) for size in np.frombuffer(header, ">u4", dimensions, offset=4))


def _memory_images(pixels: np.ndarray, labels: np.ndarray, config: VisionConfig) -> MemoryImages:
    """Checks grey images [n, height, width] against the configuration."""
    height, width = pixels.shape[1:]
    if not config.resize and (height, width) != (config.image_size, config.image_size):
        raise ValueError(
            f"source {config.source!r} has images of {height}x{width}, but data.image_size="
            f"{config.image_size} asks for {config.image_size}x{config.image_size}; set "
            f"data.image_size={height}, or data.resize=True"
        )
    if config.channels != 1:
        raise ValueError(
            f"source {config.source!r} is grey, but data.channels={config.channels}; set it to 1"
        )
    _check_labels(labels, config)
    return MemoryImages(pixels, labels.astype(np.int32), config)


def _check_labels(labels: np.ndarray, config: VisionConfig) -> None:
    """Refuses a label outside 0..N-1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= config.classes))
    if wrong.size:
        raise ValueError(
            f"source {config.source!r} has the label {int(labels[wrong[0]])}, but data.classes="
            f"{config.classes} allows 0 to {config.classes - 1}; raise data.classes"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImages:
    """The images at some indices of a tfds split, decoded at each access.

    Attributes:
        examples: What `prepared.open_split` returned, with images left encoded.
        indices: Which of its examples these are.
        config: Size, channels and keys.
    """

    examples: Sequence[Any]
    indices: np.ndarray
    config: VisionConfig

    def __len__(self) -> int:
        return len(self.indices)

    def read(
        self, indices: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads as `Images.read`.

        Raises:
            ValueError: If an image does not decode or a label is out of range.
        """
        config, numbers = self.config, self.indices[indices]
        labels = np.zeros(len(numbers), np.int32)

        def opened() -> Iterator[Image.Image]:
            for row, index in enumerate(numbers):
                example = self.examples[int(index)]
                labels[row] = example[config.label_key]
                yield self._decode(example[config.image_key], int(index))

        pixels = to_squares(opened(), config.image_size, config.channels, config.crop_scale, rng)
        _check_labels(labels, config)
        return pixels, labels

    def _decode(self, encoded: Any, index: int) -> Image.Image:
        """Decodes one image."""
        name = f"source {self.config.source!r} example {index}"
        try:
            with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
                image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
            with image:
                width, height = image.size
                if width * height <= _MOST_PIXELS:
                    return image.convert("L" if self.config.channels == 1 else "RGB")
        # Of damaged images Pillow's readers raise any kind of error, and document none.
        except Exception as error:
            raise ValueError(
                f"{name} is no image that Pillow reads ({', '.join(_FORMATS)}): {error}"
            ) from error
        raise ValueError(
            f"{name} has {width} x {height} pixels, more than {_MOST_PIXELS:,}; make it smaller"
        )


def _load_tfds(config: VisionConfig) -> ImageSource:
    """Indexes a prepared tfds dataset."""
    builder = prepared.open_prepared(config.source.partition(":")[2], config.tfds_dir)
    _check_features(builder.info.features, config)
    split = config.tfds_train_split
    examples = _open_encoded(builder, split, config)
    held_split = prepared.heldout_split(builder, config.tfds_heldout_split, split)
    indices = np.arange(len(examples))
    if held_split:
        held_examples = _open_encoded(builder, held_split, config)
        heldout = PreparedImages(held_examples, np.arange(len(held_examples)), config)
    else:
        heldout = PreparedImages(examples, indices[::_HELDOUT_EVERY], config)
        indices = indices[indices % _HELDOUT_EVERY != 0]
    train = PreparedImages(examples, indices, config)
    if not len(train) or not len(heldout):
        raise ValueError(
            f"source {config.source!r} has {len(train)} images to train on and {len(heldout)} to "
            "hold out; both need one"
        )
    half = (0.5,) * config.channels
    return ImageSource(train, heldout, 255.0, half, half, decodes=True)


def _open_encoded(builder: Any, split: str, config: VisionConfig) -> Sequence[Any]:
    """Opens a split whose images are left encoded: only the pixels that are used get decoded."""
    import tensorflow_datasets as tfds

    decoders = {config.image_key: tfds.decode.SkipDecoding()}
    return prepared.open_split(builder, split, decoders=decoders)


def _check_features(features: Any, config: VisionConfig) -> None:
    """Refuses a tfds dataset without the features, or with more classes than configured."""
    for key, name in ((config.image_key, "image_key"), (config.label_key, "label_key")):
        if key not in features:
            raise ValueError(
                f"source {config.source!r} has no feature {key!r} (it has "
                f"{', '.join(sorted(features))}); set data.{name}"
            )
    found = getattr(features[config.label_key], "num_classes", None)
    if found is not None and found > config.classes:
        raise ValueError(
            f"source {config.source!r} has {found} classes, but data.classes={config.classes}; "
            f"set data.classes={found}"
        )
