"""Vision pipeline: splits, augmentation, exact state, and errors that name the remedy."""

import gzip
import io
import json
import pathlib
import struct
import sys
from typing import Any

import chex
import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from tests.data.write_prepared import write_prepared
from train.data import images, vision
from train.data.vision import VisionConfig, VisionData, load_vision

FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "label": tfds.features.ClassLabel(num_classes=3),
}


def _idx(array: np.ndarray) -> bytes:
    """Returns an array uint8 as an idx file."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def _write_fashion(folder: pathlib.Path, size: int = 4, train: int = 10, test: int = 5) -> None:
    """Writes four idx files; image i of a part is filled with i and has the label i % 3."""
    for prefix, count in (("train", train), ("t10k", test)):
        numbers = np.arange(count, dtype=np.uint8)
        pixels = np.broadcast_to(numbers[:, None, None], (count, size, size))
        for kind, array in (("images-idx3", pixels), ("labels-idx1", numbers % 3)):
            data = gzip.compress(_idx(np.ascontiguousarray(array)))
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(data)


def _fashion(folder: pathlib.Path, **changes: Any) -> VisionConfig:
    keys = {"image_size": 4, "classes": 3, "data_dir": str(folder)} | changes
    return VisionConfig(source="fashion_mnist", **keys)


@pytest.fixture
def fashion(tmp_path: pathlib.Path) -> VisionData:
    """Ten training and five held-out images; pixel values are their numbers."""
    _write_fashion(tmp_path)
    return load_vision(_fashion(tmp_path, mean=(0.0,), std=(1 / 255,)))


def _png(value: int, height: int = 6, width: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _take(iterator: grain.DatasetIterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def _numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """Reads the numbers of images that are filled with them."""
    return np.rint(batch["images"][:, 0, 0, 0]).astype(int).tolist()


# Sources


def test_digits_hold_out_every_fifth_image() -> None:
    data = load_vision(VisionConfig())
    bunch = load_digits()
    assert (data.train_images, data.heldout_images, data.classes) == (1437, 360, 10)
    batches = list(data.heldout_batches(100))
    assert len(batches) == 4
    scored = np.concatenate([batch["scored"] for batch in batches])
    labels = np.concatenate([batch["labels"] for batch in batches])
    pixels = np.concatenate([batch["images"] for batch in batches])
    assert scored.tolist() == [True] * 360 + [False] * 40
    np.testing.assert_array_equal(labels[scored].argmax(-1), bunch.target[::5])
    np.testing.assert_array_equal(labels.sum(-1), scored)
    expected = (bunch.images[::5] / 16 - data.mean[0]) / data.std[0]
    np.testing.assert_allclose(pixels[scored][..., 0], expected, atol=1e-5)
    assert not pixels[~scored].any()


def test_digits_constants_normalise_the_training_images() -> None:
    data = load_vision(VisionConfig())
    pixels = load_digits().images[np.arange(1797) % 5 != 0] / 16
    assert data.mean == pytest.approx((pixels.mean(),), abs=1e-4)
    assert data.std == pytest.approx((pixels.std(),), abs=1e-4)


def test_fashion_files_are_read_in_order(fashion: VisionData) -> None:
    (batch,) = fashion.heldout_batches(6)
    assert batch["images"].shape == (6, 4, 4, 1)
    assert _numbers(batch) == [0, 1, 2, 3, 4, 0]
    assert batch["labels"].argmax(-1).tolist() == [0, 1, 2, 0, 1, 0]
    assert batch["scored"].tolist() == [True] * 5 + [False]
    assert fashion.train_images == 10


def test_folder_may_come_from_the_environment_and_be_unpacked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_fashion(tmp_path)
    for file in list(tmp_path.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    data = load_vision(VisionConfig(source="fashion_mnist", image_size=4, data_dir=""))
    assert data.heldout_images == 5
    assert data.mean == (0.2860,)


# Training batches


def test_epochs_visit_every_image_once(fashion: VisionData) -> None:
    iterator = fashion.train_iterator(5, seed=0)
    batches = _take(iterator, 40)
    iterator.close()
    epochs = [_numbers(a) + _numbers(b) for a, b in zip(batches[::2], batches[1::2], strict=True)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    for batch in batches:
        chex.assert_shape(batch["images"], (5, 4, 4, 1))
        chex.assert_type(list(batch.values()), np.float32)
        assert batch["labels"].argmax(-1).tolist() == [n % 3 for n in _numbers(batch)]
        assert batch["labels"].sum(-1).tolist() == [1.0] * 5


def test_processes_see_disjoint_images(fashion: VisionData) -> None:
    parts = []
    for index in range(2):
        iterator = fashion.train_iterator(10, seed=1, process_index=index, process_count=2)
        parts.append([_numbers(batch) for batch in _take(iterator, 8)])
        iterator.close()
    for first, second in zip(*parts, strict=True):
        assert sorted(first + second) == list(range(10))


def test_processes_augment_each_in_its_own_way(tmp_path: pathlib.Path) -> None:
    _write_fashion(tmp_path, train=40)
    # Every image is the same, so that only the crops can differ.
    for kind, shape in (("images-idx3", (40, 4, 4)), ("labels-idx1", (40,))):
        data = gzip.compress(_idx(np.ones(shape, np.uint8)))
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(data)
    data = load_vision(_fashion(tmp_path, crop_padding=3))
    batches = []
    for index in range(2):
        iterator = data.train_iterator(16, seed=1, process_index=index, process_count=2)
        batches.append(next(iterator)["images"])
        iterator.close()
    assert not np.array_equal(*batches)


def test_seeds_differ_and_repeat(fashion: VisionData) -> None:
    orders = []
    for seed in (0, 0, 1):
        iterator = fashion.train_iterator(10, seed=seed)
        orders.append([_numbers(batch) for batch in _take(iterator, 6)])
        iterator.close()
    assert orders[0] == orders[1]
    # Not even shifted by an epoch: seed 1 is not seed 0 one epoch later.
    assert not {tuple(order) for order in orders[0]} & {tuple(order) for order in orders[2]}


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_state_continues_with_the_next_batch(tmp_path: pathlib.Path, steps: int) -> None:
    _write_fashion(tmp_path)
    config = _fashion(tmp_path, crop_padding=2, flip=True, mixup=0.4)
    data = load_vision(config)
    iterator = data.train_iterator(4, seed=2)
    _take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = _take(iterator, 12)
    iterator.set_state(state)
    chex.assert_trees_all_equal(_take(iterator, 12), expected)
    fresh = load_vision(config).train_iterator(4, seed=2)
    fresh.set_state(state)
    chex.assert_trees_all_equal(_take(fresh, 12), expected)
    iterator.close()
    fresh.close()


def test_heldout_rows_are_shared_by_processes(fashion: VisionData) -> None:
    whole = list(fashion.heldout_batches(4))
    parts = [list(fashion.heldout_batches(4, process_index=i, process_count=2)) for i in range(2)]
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
    _write_fashion(tmp_path)
    data = load_vision(_fashion(tmp_path, mean=(0.5,), std=(0.25,)))
    (batch,) = data.heldout_batches(5)
    expected = (np.arange(5) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(batch["images"][:, 1, 2, 0], expected, rtol=1e-5)


# Other sizes than the source's


def test_resized_images_keep_their_labels_and_their_values(tmp_path: pathlib.Path) -> None:
    _write_fashion(tmp_path)
    data = load_vision(_fashion(tmp_path, image_size=6, resize=True, mean=(0.0,), std=(1 / 255,)))
    (batch,) = data.heldout_batches(6)
    # Images of one value have that value at every size; the last row pads.
    assert batch["images"].shape == (6, 6, 6, 1)
    np.testing.assert_allclose(np.ptp(batch["images"], axis=(1, 2, 3)), 0)
    assert _numbers(batch) == [0, 1, 2, 3, 4, 0]
    assert batch["labels"].argmax(-1).tolist() == [0, 1, 2, 0, 1, 0]
    iterator = data.train_iterator(10, seed=0)
    batch = next(iterator)
    iterator.close()
    assert sorted(_numbers(batch)) == list(range(10))
    assert batch["labels"].argmax(-1).tolist() == [n % 3 for n in _numbers(batch)]


def test_resized_digits_run_from_0_to_255() -> None:
    same, large = (load_vision(VisionConfig(image_size=n, resize=True)) for n in (8, 16))
    pixels, labels = large.source.heldout.read(np.arange(4))
    whole = (load_digits().images[:20:5] * (255 / 16)).round().astype(np.uint8)
    expected = [Image.fromarray(one).resize((16, 16), Image.Resampling.BICUBIC) for one in whole]
    np.testing.assert_array_equal(pixels[..., 0], np.stack([np.asarray(e) for e in expected]))
    np.testing.assert_array_equal(same.source.heldout.read(np.arange(4))[0][..., 0], whole)
    np.testing.assert_array_equal(labels, load_digits().target[:20:5])
    # Pixels of 0 to 16 as without resizing, but for the rounding to 255 steps.
    (exact,) = load_vision(VisionConfig()).heldout_batches(360)
    (rounded,) = same.heldout_batches(360)
    np.testing.assert_allclose(rounded["images"], exact["images"], atol=0.5 / 255 / 0.3763 + 1e-6)


def test_random_crops_train_and_the_whole_image_evaluates(tmp_path: pathlib.Path) -> None:
    # Each image is a ramp from left to right: a crop spans less of it, resized to the same size.
    ramp = np.broadcast_to(np.arange(0, 200, 10, dtype=np.uint8), (10, 20, 20))
    _write_fashion(tmp_path)
    for prefix, count in (("train", 10), ("t10k", 5)):
        data = gzip.compress(_idx(np.ascontiguousarray(ramp[:count])))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(data)
    keys = {"image_size": 20, "resize": True, "mean": (0.0,), "std": (1 / 255,)}
    config = _fashion(tmp_path, crop_scale=0.25, **keys)
    data = load_vision(config)
    iterator = data.train_iterator(10, seed=3)
    state = json.loads(json.dumps(iterator.get_state()))
    batches = _take(iterator, 3)
    spans = [np.ptp(image) for batch in batches for image in batch["images"]]
    assert len({round(float(span)) for span in spans}) > 5
    # A width of sqrt(1/4 · 3/4) of the image at least; 190 is the whole ramp.
    assert 190 * 0.38 < min(spans) < max(spans) <= 191
    iterator.set_state(state)
    chex.assert_trees_all_equal(_take(iterator, 3), batches)
    iterator.close()
    again = load_vision(config).train_iterator(10, seed=3)
    chex.assert_trees_all_equal(_take(again, 3), batches)
    again.close()
    (held,) = data.heldout_batches(5)
    np.testing.assert_allclose(held["images"][..., 0], ramp[:5], rtol=1e-5)


def test_processes_crop_each_in_its_own_way(tmp_path: pathlib.Path) -> None:
    ramp = np.broadcast_to(np.arange(0, 200, 10, dtype=np.uint8), (10, 20, 20))
    _write_fashion(tmp_path)
    content = gzip.compress(_idx(np.ascontiguousarray(ramp)))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    batches = []
    for index in range(2):
        config = _fashion(tmp_path, image_size=4, resize=True, crop_scale=0.25)
        iterator = load_vision(config).train_iterator(
            10, seed=1, process_index=index, process_count=2
        )
        batches.append(next(iterator)["images"])
        iterator.close()
    assert batches[0].shape == (5, 4, 4, 1)
    assert not np.array_equal(*batches)


# Prepared tfds datasets


def test_tfds_images_are_decoded_cropped_and_resized(tmp_path: pathlib.Path) -> None:
    imported = "tensorflow" in sys.modules
    train = [{"image": _png(20 * i, 6, 6 + i), "label": i % 3} for i in range(6)]
    test = [{"image": _png(200), "label": 2}]
    write_prepared(tmp_path, "tiny", FEATURES, {"train": train, "test": test})
    config = VisionConfig(
        source="tfds:tiny",
        image_size=4,
        channels=3,
        classes=3,
        tfds_dir=str(tmp_path),
        mean=(0.0,) * 3,
        std=(1 / 255,) * 3,
    )
    data = load_vision(config)
    (batch,) = data.heldout_batches(2)
    np.testing.assert_allclose(batch["images"][0], np.full((4, 4, 3), 200.0), rtol=1e-5)
    assert batch["labels"].tolist() == [[0, 0, 1], [0, 0, 0]]
    iterator = data.train_iterator(3, seed=0)
    state = json.loads(json.dumps(iterator.get_state()))
    batches = _take(iterator, 2)
    assert sorted(_numbers(batches[0]) + _numbers(batches[1])) == [0, 20, 40, 60, 80, 100]
    iterator.set_state(state)
    chex.assert_trees_all_equal(_take(iterator, 2), batches)
    iterator.close()
    assert ("tensorflow" in sys.modules) == imported


def test_tfds_grey_and_without_heldout_split(tmp_path: pathlib.Path) -> None:
    train = [{"image": _png(10 * i), "label": 0} for i in range(11)]
    write_prepared(tmp_path, "tiny", FEATURES, {"train": train})
    config = VisionConfig(source="tfds:tiny", image_size=6, classes=3, tfds_dir=str(tmp_path))
    data = load_vision(config)
    assert (data.train_images, data.heldout_images) == (8, 3)
    (batch,) = data.heldout_batches(3)
    # Images 0, 5 and 10; the default maps pixels to [-1, 1].
    expected = np.array([0, 50, 100]) / 127.5 - 1
    np.testing.assert_allclose(batch["images"][:, 3, 3, 0], expected, rtol=1e-5)
    assert batch["images"].shape == (3, 6, 6, 1)


def test_tfds_crops_are_taken_from_the_image_as_it_is_stored(tmp_path: pathlib.Path) -> None:
    # Wide images, red rising from left to right: the centre alone holds 30 to 60 of 0 to 90.
    wide = np.zeros((4, 10, 3), np.uint8)
    wide[..., 0] = np.arange(0, 100, 10)
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    train = [{"image": buffer.getvalue(), "label": i % 3} for i in range(20)]
    write_prepared(tmp_path, "tiny", FEATURES, {"train": train, "test": train[:1]})
    keys = {"image_size": 4, "channels": 3, "classes": 3, "tfds_dir": str(tmp_path)}
    keys |= {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    data = load_vision(
        VisionConfig(source="tfds:tiny", resize=True, crop_scale=0.1, flip=True, **keys)
    )
    iterator = data.train_iterator(20, seed=0)
    batch = next(iterator)
    iterator.close()
    red = batch["images"][..., 0]
    assert red.min() < 10
    assert red.max() > 80
    assert not batch["images"][..., 1:].any()
    (held,) = data.heldout_batches(1)
    np.testing.assert_allclose(held["images"][0, :, :, 0], np.tile([30, 40, 50, 60], (4, 1)))


def test_tfds_errors(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"'cifar10' is not prepared: looked in .*cifar10"):
        load_vision(VisionConfig(source="tfds:cifar10"))
    bad = [{"image": b"no image", "label": 0}] * 2
    write_prepared(tmp_path, "tiny", FEATURES, {"train": bad})
    with pytest.raises(ValueError, match=r"has 3 classes, but data.classes=2"):
        load_vision(VisionConfig(source="tfds:tiny", classes=2))
    with pytest.raises(ValueError, match=r"no feature 'pixels'.*data.image_key"):
        load_vision(VisionConfig(source="tfds:tiny", image_key="pixels"))
    data = load_vision(VisionConfig(source="tfds:tiny"))
    with pytest.raises(ValueError, match=r"'tfds:tiny' example 0 is no image"):
        next(data.heldout_batches(1))
    write_prepared(tmp_path, "one", FEATURES, {"train": bad[:1]})
    with pytest.raises(ValueError, match="0 images to train on and 1 to hold out"):
        load_vision(VisionConfig(source="tfds:one"))


# Errors


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


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"image_size": 28},
            r"images of 8x8, but data.image_size=28 .*; set .*=8, or data.resize=True",
        ),
        ({"channels": 3}, "is grey, but data.channels=3"),
        ({"classes": 9}, r"has the label 9, but data.classes=9 allows 0 to 8"),
    ],
)
def test_digits_that_do_not_fit(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_vision(VisionConfig(**keys))


def test_missing_fashion_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*tfds:fashion_mnist"
    ):
        load_vision(_fashion(tmp_path))


def test_labels_must_match_the_images(tmp_path: pathlib.Path) -> None:
    _write_fashion(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(_idx(np.zeros(9, np.uint8))))
    with pytest.raises(ValueError, match=r"train-labels.* holds 9 labels for 10 images"):
        load_vision(_fashion(tmp_path))


GOOD = _idx(np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gz", gzip.compress(GOOD, mtime=0)[:-9], r"a\.gz is damaged"),
        ("a.gz", b"not gzip", r"a\.gz is damaged"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 40, r"a\.gz is damaged"),
        ("a", GOOD[:-1], r"holds 17 values, but its header promises 18 \(2 x 3 x 3\)"),
        ("a", GOOD + b"0", r"holds 19 values, but its header promises 18"),
        ("a", GOOD[:9], r"ends inside its header, after 9 of 16 bytes"),
        ("a", b"", "not with the idx magic 00000803"),
        ("a", _idx(np.zeros(4, np.uint8)), "begins with 00000801, not with the idx magic 00000803"),
    ],
)
def test_damaged_idx_files(tmp_path: pathlib.Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        images.read_idx(tmp_path / name, 3)


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load_vision(VisionConfig())


def test_arguments_of_the_iterators(fashion: VisionData) -> None:
    with pytest.raises(ValueError, match="batch=3 must be a positive multiple of the 2"):
        fashion.train_iterator(3, seed=0, process_count=2)
    with pytest.raises(ValueError, match="batch=0"):
        fashion.heldout_batches(0)
    with pytest.raises(ValueError, match="seed=-1"):
        fashion.train_iterator(2, seed=-1)
