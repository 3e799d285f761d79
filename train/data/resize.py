"""Crops and resizes images to the square that a model takes, with Pillow."""

import math
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

_TRIES = 10
_WIDEST = 4 / 3


def to_squares(
    images: Iterable[Image.Image],
    size: int,
    channels: int,
    least: float = 1.0,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Resizes images, bicubic; images of the size and without a crop stay as they are.

    Args:
        images: n of them, each of any size, grey or RGB.
        size: H = W.
        channels: C, 1 or 3, that of the images.
        least: Smallest share of an image's area that a random crop leaves.
        rng: Random numbers for random crops, a fixed count of them for each image. Where it is
            None, the largest centred square is taken: the whole of a square image.

    Returns:
        Pixels [n, H, W, C] uint8.
    """
    rows = []
    for image in images:
        if rng is None:
            square = image
            if image.size != (size, size):
                square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        else:
            box = random_box(*image.size, least, rng.random((_TRIES, 4)))
            # Cropped first: `resize(box=...)` would let pixels beside the box shine in.
            square = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
        rows.append(np.asarray(square, np.uint8))
    return np.array(rows, np.uint8).reshape(-1, size, size, channels)


def random_box(
    width: int, height: int, least: float, uniforms: np.ndarray
) -> tuple[int, int, int, int]:
    """Draws the crop of torchvision's RandomResizedCrop (arXiv 1409.4842, section 6).

    The area is uniform in [least, 1] of the image's, the aspect ratio log-uniform in [3/4, 4/3],
    the place uniform. A crop that does not fit is drawn again; where no try fits, it is the largest
    centred one of an allowed ratio.

    Args:
        width: Of the image, pixels.
        height: Of the image, pixels.
        least: Smallest share of the area.
        uniforms: [tries, 4] in [0, 1): area, ratio, and place from the left and from the top.

    Returns:
        Left, top, right and bottom, pixels.
    """
    for share, ratio, left, top in uniforms:
        area = width * height * (least + (1 - least) * share)
        aspect = _WIDEST ** (2 * ratio - 1)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * _WIDEST)), min(height, round(width * _WIDEST))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h
