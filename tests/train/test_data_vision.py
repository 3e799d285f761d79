"""Vision pipeline: order, augmentation, sizes and exact state of the batches."""

import dataclasses
import gzip
import json
import pathlib

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.pictures import fashion_config, idx, image_numbers, take, write_fashion
from train.data import vision
from train.data.vision import VisionData, load_vision


@pytest.fixture
def fashion(tmp_path: pathlib.Path) -> VisionData:
    """Ten training and five held-out images; pixel values are their numbers."""
    write_fashion(tmp_path)
    return load_vision(fashion_config(tmp_path, mean=(0.0,), std=(1 / 255,)))


# Training batches


def test_epochs_visit_every_image_once(fashion: VisionData) -> None:
    iterator = fashion.train_iterator(5, seed=0)
    batches = take(iterator, 40)
    iterator.close()
    epochs = [
        image_numbers(a) + image_numbers(b)
        for a, b in zip(batches[::2], batches[1::2], strict=True)
    ]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    for batch in batches:
        chex.assert_shape(batch["images"], (5, 4, 4, 1))
        chex.assert_type(list(batch.values()), np.float32)
        assert batch["labels"].argmax(-1).tolist() == [n % 3 for n in image_numbers(batch)]
        assert batch["labels"].sum(-1).tolist() == [1.0] * 5


def in_shards(data: VisionData, count: int) -> VisionData:
    return dataclasses.replace(data, config=dataclasses.replace(data.config, shards=count))


def test_shards_hold_disjoint_images_and_are_read_alone(fashion: VisionData) -> None:
    parts = []
    for rows in (np.arange(5), np.arange(5, 10)):
        iterator = in_shards(fashion, 2).train_iterator(10, seed=1, rows=rows)
        parts.append([image_numbers(batch) for batch in take(iterator, 8)])
        assert len(iterator.get_state()) == 1
        iterator.close()
    for first, second in zip(*parts, strict=True):
        assert sorted(first + second) == list(range(10))


@pytest.mark.parametrize("count", [1, 2])
def test_rows_make_up_the_same_batches_however_they_are_read(
    tmp_path: pathlib.Path, count: int
) -> None:
    write_fashion(tmp_path)
    config = fashion_config(tmp_path, crop_padding=2, flip=True, mixup=0.4, shards=count)
    data = load_vision(config)
    rows = [np.arange(2), np.arange(2, 8)]
    whole = data.train_iterator(8, seed=1)
    parts = [data.train_iterator(8, seed=1, rows=mine) for mine in rows]
    for batch in take(whole, 6):
        for mine, part in zip(rows, parts, strict=True):
            chex.assert_trees_all_equal(next(part), {key: x[mine] for key, x in batch.items()})
    for iterator in (whole, *parts):
        iterator.close()


def test_shards_are_augmented_each_in_its_own_way(tmp_path: pathlib.Path) -> None:
    write_fashion(tmp_path, train=40)
    # Every image is the same, so that only the crops can differ.
    for kind, shape in (("images-idx3", (40, 4, 4)), ("labels-idx1", (40,))):
        data = gzip.compress(idx(np.ones(shape, np.uint8)))
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(data)
    data = load_vision(fashion_config(tmp_path, crop_padding=3, shards=2))
    iterator = data.train_iterator(16, seed=1)
    first, second = np.split(next(iterator)["images"], 2)
    iterator.close()
    assert not np.array_equal(first, second)


def test_seeds_differ_and_repeat(fashion: VisionData) -> None:
    orders = []
    for seed in (0, 0, 1):
        iterator = fashion.train_iterator(10, seed=seed)
        orders.append([image_numbers(batch) for batch in take(iterator, 6)])
        iterator.close()
    assert orders[0] == orders[1]
    # Not even shifted by an epoch: seed 1 is not seed 0 one epoch later.
    assert not {tuple(order) for order in orders[0]} & {tuple(order) for order in orders[2]}


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_state_continues_with_the_next_batch(tmp_path: pathlib.Path, steps: int) -> None:
    write_fashion(tmp_path)
    config = fashion_config(tmp_path, crop_padding=2, flip=True, mixup=0.4)
    data = load_vision(config)
    iterator = data.train_iterator(4, seed=2)
    take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 12)
    iterator.set_state(state)
    chex.assert_trees_all_equal(take(iterator, 12), expected)
    fresh = load_vision(config).train_iterator(4, seed=2)
    fresh.set_state(state)
    chex.assert_trees_all_equal(take(fresh, 12), expected)
    iterator.close()
    fresh.close()


def test_heldout_rows_are_shared_by_processes(fashion: VisionData) -> None:
    whole = list(fashion.heldout_batches(4))
    parts = [list(fashion.heldout_batches(4, rows=np.array(rows))) for rows in ([0, 1], [2, 3])]
    for batch, first, second in zip(whole, *parts, strict=True):
        joined = {key: np.concatenate([first[key], second[key]]) for key in batch}
        chex.assert_trees_all_equal(joined, batch)


# Augmentation


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), padding=st.integers(1, 3))
def test_crops_are_windows_of_the_padded_image(seed: int, padding: int) -> None:
    pixels = np.arange(1, 1 + 3 * 4 * 4 * 2, dtype=np.uint8).reshape(3, 4, 4, 2)
    cropped = vision.random_crop(pixels, padding, np.random.default_rng(seed))
    assert cropped.shape == pixels.shape
    padded = np.pad(pixels, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    places = range(2 * padding + 1)
    for image, wide in zip(cropped, padded, strict=True):
        windows = [wide[y : y + 4, x : x + 4] for y in places for x in places]
        assert any(np.array_equal(image, window) for window in windows)


def test_flips_mirror_about_half_of_the_images() -> None:
    pixels = np.arange(200 * 3, dtype=np.int32).reshape(200, 1, 3, 1)
    flipped = vision.random_flip(pixels, np.random.default_rng(0))
    same = (flipped == pixels).all((1, 2, 3))
    mirrored = (flipped == pixels[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_mixup_mixes_pixels_and_labels_alike() -> None:
    # Image i is filled with i and is of class i, so that its pixels must be the labels' mean class.
    pixels = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None, None], (8, 2, 2, 1))
    labels = vision.one_hot(np.arange(8), 8)
    mixed, soft = vision.mix_up(pixels, labels, 1.0, np.random.default_rng(3))
    np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-6)
    assert ((soft > 0).sum(-1) <= 2).all()
    assert ((soft > 0).sum(-1) == 2).any()
    np.testing.assert_allclose(mixed[:, 0, 0, 0], soft @ np.arange(8), rtol=1e-5)
    assert (mixed.dtype, soft.dtype) == (np.float32, np.float32)


def test_without_augmentation_images_are_only_normalised(tmp_path: pathlib.Path) -> None:
    write_fashion(tmp_path)
    data = load_vision(fashion_config(tmp_path, mean=(0.5,), std=(0.25,)))
    (batch,) = data.heldout_batches(5)
    expected = (np.arange(5) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(batch["images"][:, 1, 2, 0], expected, rtol=1e-5)


# Other sizes than the source's


def test_resized_images_keep_their_labels_and_their_values(tmp_path: pathlib.Path) -> None:
    write_fashion(tmp_path)
    data = load_vision(
        fashion_config(tmp_path, image_size=6, resize=True, mean=(0.0,), std=(1 / 255,))
    )
    (batch,) = data.heldout_batches(6)
    # Images of one value have that value at every size; the last row pads.
    assert batch["images"].shape == (6, 6, 6, 1)
    np.testing.assert_allclose(np.ptp(batch["images"], axis=(1, 2, 3)), 0)
    assert image_numbers(batch) == [0, 1, 2, 3, 4, 0]
    assert batch["labels"].argmax(-1).tolist() == [0, 1, 2, 0, 1, 0]
    iterator = data.train_iterator(10, seed=0)
    batch = next(iterator)
    iterator.close()
    assert sorted(image_numbers(batch)) == list(range(10))
    assert batch["labels"].argmax(-1).tolist() == [n % 3 for n in image_numbers(batch)]


def test_random_crops_train_and_the_whole_image_evaluates(tmp_path: pathlib.Path) -> None:
    # Each image is a ramp from left to right: a crop spans less of it, resized to the same size.
    ramp = np.broadcast_to(np.arange(0, 200, 10, dtype=np.uint8), (10, 20, 20))
    write_fashion(tmp_path)
    for prefix, count in (("train", 10), ("t10k", 5)):
        data = gzip.compress(idx(np.ascontiguousarray(ramp[:count])))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(data)
    keys = {"image_size": 20, "resize": True, "mean": (0.0,), "std": (1 / 255,)}
    config = fashion_config(tmp_path, crop_scale=0.25, **keys)
    data = load_vision(config)
    iterator = data.train_iterator(10, seed=3)
    state = json.loads(json.dumps(iterator.get_state()))
    batches = take(iterator, 3)
    spans = [np.ptp(image) for batch in batches for image in batch["images"]]
    assert len({round(float(span)) for span in spans}) > 5
    # A width of sqrt(1/4 · 3/4) of the image at least; 190 is the whole ramp.
    assert 190 * 0.38 < min(spans) < max(spans) <= 191
    iterator.set_state(state)
    chex.assert_trees_all_equal(take(iterator, 3), batches)
    iterator.close()
    again = load_vision(config).train_iterator(10, seed=3)
    chex.assert_trees_all_equal(take(again, 3), batches)
    again.close()
    (held,) = data.heldout_batches(5)
    np.testing.assert_allclose(held["images"][..., 0], ramp[:5], rtol=1e-5)


def test_shards_are_cropped_each_in_its_own_way(tmp_path: pathlib.Path) -> None:
    ramp = np.broadcast_to(np.arange(0, 200, 10, dtype=np.uint8), (10, 20, 20))
    write_fashion(tmp_path)
    content = gzip.compress(idx(np.ascontiguousarray(ramp)))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    config = fashion_config(tmp_path, image_size=4, resize=True, crop_scale=0.25, shards=2)
    iterator = load_vision(config).train_iterator(10, seed=1)
    first, second = np.split(next(iterator)["images"], 2)
    iterator.close()
    assert first.shape == (5, 4, 4, 1)
    assert not np.array_equal(first, second)


# Errors


def test_arguments_of_the_iterators(fashion: VisionData) -> None:
    with pytest.raises(ValueError, match=r"batch=3 is not a multiple of data\.shards=2"):
        in_shards(fashion, 2).train_iterator(3, seed=0)
    with pytest.raises(ValueError, match="batch=0"):
        fashion.heldout_batches(0)
    with pytest.raises(ValueError, match="seed=-1"):
        fashion.train_iterator(2, seed=-1)
