"""Configurations of data that cannot be meant."""

from typing import Any

import pytest

from train.data.config import VisionConfig


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"source": "mnist"}, "unknown data source 'mnist'"),
        ({"channels": 2}, "channels=2 must be 1"),
        ({"classes": 1}, "classes=1 must be at least 2"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"mixup": -0.5}, "mixup=-0.5"),
        ({"crop_scale": 0.0, "resize": True}, "crop_scale=0.0 must be above 0 and at most 1"),
        ({"crop_scale": 1.5, "resize": True}, "crop_scale=1.5 must be above 0 and at most 1"),
        ({"crop_scale": float("nan"), "resize": True}, "crop_scale=nan must be above 0"),
        ({"crop_scale": 0.5}, "crop_scale=0.5 .* but data.resize=False; set data.resize=True"),
        ({"mean": (0.5, 0.5)}, "2 entries for data.channels=1"),
        ({"std": (0.0,)}, "must be positive"),
        ({"mean": (float("inf"),)}, "must be finite"),
    ],
)
def test_impossible_configurations(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VisionConfig(**keys)
