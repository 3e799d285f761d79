"""Sources of images: what is held out, what is read, and errors that name the remedy."""

import gzip
import io
import json
import pathlib
import struct
import sys
import zlib
from typing import Any

import chex
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from tests.data.write_prepared import write_prepared
from tests.train.pictures import fashion_config, idx, image_numbers, png, take, write_fashion
from train.data import images
from train.data.vision import VisionConfig, load_vision

FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "label": tfds.features.ClassLabel(num_classes=3),
}


# Digits


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


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load_vision(VisionConfig())


# Files of Fashion-MNIST


def test_fashion_files_are_read_in_order(tmp_path: pathlib.Path) -> None:
    write_fashion(tmp_path)
    fashion = load_vision(fashion_config(tmp_path, mean=(0.0,), std=(1 / 255,)))
    (batch,) = fashion.heldout_batches(6)
    assert batch["images"].shape == (6, 4, 4, 1)
    assert image_numbers(batch) == [0, 1, 2, 3, 4, 0]
    assert batch["labels"].argmax(-1).tolist() == [0, 1, 2, 0, 1, 0]
    assert batch["scored"].tolist() == [True] * 5 + [False]
    assert fashion.train_images == 10


def test_folder_may_come_from_the_environment_and_be_unpacked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fashion(tmp_path)
    for file in list(tmp_path.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    data = load_vision(VisionConfig(source="fashion_mnist", image_size=4, data_dir=""))
    assert data.heldout_images == 5
    assert data.mean == (0.2860,)


def test_missing_fashion_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*tfds:fashion_mnist"
    ):
        load_vision(fashion_config(tmp_path))


def test_labels_must_match_the_images(tmp_path: pathlib.Path) -> None:
    write_fashion(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(9, np.uint8))))
    with pytest.raises(ValueError, match=r"train-labels.* holds 9 labels for 10 images"):
        load_vision(fashion_config(tmp_path))


GOOD = idx(np.zeros((2, 3, 3), np.uint8))
HUGE = struct.pack(">4B3I2x", 0, 0, 8, 3, 1, 1, 2**32 - 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gz", gzip.compress(GOOD, mtime=0)[:-9], r"a\.gz is damaged"),
        ("a.gz", b"not gzip", r"a\.gz is damaged"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 40, r"a\.gz is damaged"),
        # A name of a test must not hold the time: workers compare the names that they collect.
        (
            "a.gz",
            gzip.compress(GOOD + bytes(9), mtime=0),
            "more than 18 values, but its header promises 18",
        ),
        (
            "a.gz",
            gzip.compress(HUGE, mtime=0),
            r"holds \d+ values, but its header promises 4294967295 ",
        ),
        ("a", HUGE, r"holds \d+ values, but its header promises 4294967295 "),
        ("a", GOOD[:-1], r"holds 17 values, but its header promises 18 \(2 x 3 x 3\)"),
        ("a", GOOD + b"0", "holds more than 18 values, but its header promises 18"),
        ("a", GOOD[:9], r"ends inside its header, after 9 of 16 bytes"),
        ("a", b"", "not with the idx magic 00000803"),
        ("a", idx(np.zeros(4, np.uint8)), "begins with 00000801, not with the idx magic 00000803"),
    ],
)
def test_damaged_idx_files(tmp_path: pathlib.Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        images.read_idx(tmp_path / name, 3)


def test_what_was_not_promised_is_not_unpacked() -> None:
    stream = io.BytesIO(bytes(2**23))
    assert images._count_bytes(stream, 18) == 2**20  # one piece
    assert stream.tell() == 0


# Prepared tfds datasets


def test_tfds_images_are_decoded_cropped_and_resized(tmp_path: pathlib.Path) -> None:
    imported = "tensorflow" in sys.modules
    train = [{"image": png(20 * i, 6, 6 + i), "label": i % 3} for i in range(6)]
    test = [{"image": png(200), "label": 2}]
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
    batches = take(iterator, 2)
    assert sorted(image_numbers(batches[0]) + image_numbers(batches[1])) == [0, 20, 40, 60, 80, 100]
    iterator.set_state(state)
    chex.assert_trees_all_equal(take(iterator, 2), batches)
    iterator.close()
    assert ("tensorflow" in sys.modules) == imported


def test_tfds_grey_and_without_heldout_split(tmp_path: pathlib.Path) -> None:
    train = [{"image": png(10 * i), "label": 0} for i in range(11)]
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


# What Pillow would do with bytes that are no plain image


def decoded(encoded: bytes) -> np.ndarray:
    examples = [{"image": encoded, "label": 0}]
    config = VisionConfig(source="tfds:tiny", resize=True)
    return images.PreparedImages(examples, np.array([0]), config).read(np.array([0]))[0]


def png_header(width: int, height: int) -> bytes:
    """A PNG of so many grey pixels, as far as its header tells."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    end = b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + bytes(4) + end


def test_only_plain_formats_are_opened() -> None:
    """Pillow would start Ghostscript for the first."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(postscript)) as image:
        assert image.format == "EPS"
    with pytest.raises(ValueError, match=r"'tfds:tiny' example 0 is no image .*JPEG"):
        decoded(postscript)


def test_pictures_too_large_for_memory_are_refused_by_their_header() -> None:
    with pytest.raises(ValueError, match="example 0 has 9500 x 9500 pixels, more than 89,478,485"):
        decoded(png_header(9500, 9500))
    with pytest.raises(ValueError, match=r"example 0 is no image .*decompression bomb"):
        decoded(png_header(2**31 - 1, 2**31 - 1))


def test_whatever_pillow_raises_names_the_example() -> None:
    """A header cut short is a plain ValueError of Pillow's."""
    cut = png(0, 8, 8).replace(b"\x00\x00\x00\rIHDR", b"\x00\x00\x00\x05IHDR")
    with pytest.raises(ValueError, match="'tfds:tiny' example 0 is no image"):
        decoded(cut)
