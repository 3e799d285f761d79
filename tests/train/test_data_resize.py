"""Random crops and resizing."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.data.resize import random_box, to_squares


def draws(*rows: tuple[float, float, float, float]) -> np.ndarray:
    """Tries of share, ratio, left, top, each in [0, 1)."""
    return np.array(rows)


@pytest.mark.parametrize(
    ("uniforms", "box"),
    [
        # Half of 8 x 8 pixels in a square: 32 pixels, a side of 5.66, rounded to 6.
        (draws((0.0, 0.5, 0.0, 0.0)), (0, 0, 6, 6)),
        (draws((0.0, 0.5, 0.99, 0.5)), (2, 1, 8, 7)),
        # 32 pixels at 4/3: 6.53 by 4.90; at 3/4: 4.90 by 6.53.
        (draws((0.0, 1.0, 0.0, 0.0)), (0, 0, 7, 5)),
        (draws((0.0, 0.0, 0.0, 0.0)), (0, 0, 5, 7)),
        # 48 pixels, the middle of [1/2, 1], in a square.
        (draws((0.5, 0.5, 0.0, 0.0)), (0, 0, 7, 7)),
        # 64 pixels at 4/3 are 9.24 wide and do not fit: the next try does.
        (draws((1.0, 1.0, 0.0, 0.0), (0.0, 0.5, 0.0, 0.0)), (0, 0, 6, 6)),
        # No try fits: the whole of a square image.
        (draws((1.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)), (0, 0, 8, 8)),
    ],
)
def test_boxes_of_an_image_of_8_by_8(uniforms: np.ndarray, box: tuple[int, ...]) -> None:
    assert random_box(8, 8, 0.5, uniforms) == box


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (100, 6, (46, 0, 54, 6)),  # 4/3 of 6 is 8
        (6, 100, (0, 46, 6, 54)),
        (1, 1, (0, 0, 1, 1)),
        (12, 10, (0, 0, 12, 10)),
    ],
)
def test_where_no_try_fits_the_box_is_the_largest_of_an_allowed_ratio(
    width: int, height: int, box: tuple[int, ...]
) -> None:
    assert random_box(width, height, 1.0, np.zeros((0, 4))) == box


@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    least=st.floats(0.01, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_boxes_lie_in_the_image(width: int, height: int, least: float, seed: int) -> None:
    uniforms = np.random.default_rng(seed).random((10, 4))
    left, top, right, bottom = random_box(width, height, least, uniforms)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_areas_and_ratios_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(1000, 1000, 0.36, rng.random((10, 4))) for _ in range(2000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shares, logs = widths * heights / 1e6, np.log(widths / heights)
    assert 0.355 < shares.min() < 0.37
    assert 0.95 < shares.max() <= 1
    assert np.abs(logs).max() <= math.log(4 / 3) + 0.005
    assert abs(logs.mean()) < 0.01
    # Left and right have the same room on average.
    assert abs((boxes[:, 0] - (1000 - boxes[:, 2])).mean()) < 15


def test_squares_are_pillows_own() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3)).astype(np.uint8)
    images = [Image.fromarray(one) for one in pixels]
    np.testing.assert_array_equal(to_squares(images, 6, 3), pixels)
    expected = [image.resize((9, 9), Image.Resampling.BICUBIC) for image in images]
    np.testing.assert_array_equal(
        to_squares(images, 9, 3), np.stack(list(map(np.asarray, expected)))
    )


class Chosen:
    """Random numbers that are always the same."""

    def __init__(self, *row: float) -> None:
        self.row = row

    def random(self, size: tuple[int, int]) -> np.ndarray:
        return np.broadcast_to(np.array(self.row), size)


def test_a_crop_sees_nothing_beside_its_box() -> None:
    # A black square of 3 x 3 in a white frame; 0.2 + 0.8 · 0.2 = 9/25 of the area is that square.
    pixels = np.full((5, 5), 255, np.uint8)
    pixels[1:4, 1:4] = 0
    middle: Any = Chosen(0.2, 0.5, 0.5, 0.5)
    assert random_box(5, 5, 0.2, middle.random((1, 4))) == (1, 1, 4, 4)
    assert not to_squares([Image.fromarray(pixels)], 8, 1, 0.2, middle).any()


def test_every_image_has_a_crop_of_its_own_from_one_seed() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 12, dtype=np.uint8), (20, 1)))
    first, again = (
        to_squares([ramp] * 8, 5, 1, 0.3, np.random.default_rng(seed)) for seed in (4, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert len({one.tobytes() for one in first}) > 4
    # An image's crop depends on those before it alone.
    part = to_squares([ramp] * 3, 5, 1, 0.3, np.random.default_rng(4))
    np.testing.assert_array_equal(part, first[:3])


def test_no_images_are_an_empty_batch() -> None:
    assert to_squares([], 4, 3).shape == (0, 4, 4, 3)
