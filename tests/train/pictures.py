"""Tiny images, as files of Fashion-MNIST's form and as PNG; what batches of them hold."""

import gzip
import io
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from train.data.vision import VisionConfig


def idx(array: np.ndarray) -> bytes:
    """Returns an array uint8 as an idx file."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_fashion(folder: pathlib.Path, size: int = 4, train: int = 10, test: int = 5) -> None:
    """Writes four idx files; image i of a part is filled with i and has the label i % 3."""
    for prefix, count in (("train", train), ("t10k", test)):
        numbers = np.arange(count, dtype=np.uint8)
        pixels = np.broadcast_to(numbers[:, None, None], (count, size, size))
        for kind, array in (("images-idx3", pixels), ("labels-idx1", numbers % 3)):
            data = gzip.compress(idx(np.ascontiguousarray(array)))
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(data)


def fashion_config(folder: pathlib.Path, **changes: Any) -> VisionConfig:
    """The configuration of `write_fashion`'s files."""
    keys = {"image_size": 4, "classes": 3, "data_dir": str(folder)} | changes
    return VisionConfig(source="fashion_mnist", **keys)


def png(value: int, height: int = 6, width: int = 6) -> bytes:
    """An image of one value."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def take(iterator: Iterator[dict[str, np.ndarray]], count: int) -> list[dict[str, np.ndarray]]:
    """The next batches."""
    return [next(iterator) for _ in range(count)]


def image_numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """Reads the numbers of images that are filled with them."""
    return np.rint(batch["images"][:, 0, 0, 0]).astype(int).tolist()
