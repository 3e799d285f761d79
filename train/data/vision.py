"""Images for classifiers: shuffled, augmented and normalised batches.

Batches of indices are shuffled first; then a whole batch is gathered and augmented at once by
vectorised numpy, so that one thread keeps up with a model that has the other cores.
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np

from train.data import images, shards
from train.data.config import VisionConfig

__all__ = ["VisionConfig", "VisionData", "load_vision"]

# One thread is enough for a gather; decoding releases Python's lock and takes several.
_READ_MEMORY = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
_READ_DECODE = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True, eq=False)
class VisionData:
    """Images of a run; `load_vision` builds it.

    Attributes:
        config: What it was built from.
        source: The images.
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, as `mean`.
    """

    config: VisionConfig
    source: images.ImageSource = dataclasses.field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def classes(self) -> int:
        """N, number of classes."""
        return self.config.classes

    @property
    def train_images(self) -> int:
        """Images of one epoch."""
        return len(self.source.train)

    @property
    def heldout_images(self) -> int:
        """Images that `heldout_batches` scores."""
        return len(self.source.heldout)

    def train_iterator(
        self, batch: int, *, seed: int, rows: np.ndarray | None = None
    ) -> shards.GlobalBatches:
        """Returns an endless iterator of augmented training batches.

        Every epoch visits each image once in an order of its own; batches run across the border of
        two epochs. Data shards hold disjoint parts.

        Args:
            batch: Images of the global batch.
            seed: Seed, non-negative.
            rows: Images of the global batch that are wanted here, B of them, ascending; None: all.

        Returns:
            An iterator of dicts: `images` [B, H, W, C] float32, normalised, and `labels` [B, N]
            float32, one-hot or mixed. Its `get_state()` is a JSON-serialisable dict, and
            `set_state()` of it continues with the very next batch, augmentation included.
            `close()` stops its threads.

        Raises:
            ValueError: If the shards do not divide the batch, or the seed is negative.
        """
        shards.check_seed(seed)
        count = self.config.shards

        def open_shard(shard: int) -> grain.DatasetIterator:
            batches = (
                shards.shuffled_indices(self.train_images, shards.derive_seed(seed, 0))
                .slice(slice(shard, None, count))
                .batch(batch // count, drop_remainder=True, batch_fn=np.array)
                .random_map(self._train_batch, seed=shards.derive_seed(seed, 1, shard))
            )
            return iter(batches.to_iter_dataset(self._read_options()))

        return shards.GlobalBatches(open_shard, batch=batch, shards=count, rows=rows)

    def heldout_batches(
        self, batch: int, *, rows: np.ndarray | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields all held-out images once, in the order of the source, without augmentation.

        Args:
            batch: Images of the global batch.
            rows: As in `train_iterator`; the number of batches does not depend on it.

        Returns:
            An iterator of dicts: `images` [B, H, W, C] float32, normalised, `labels` [B, N] float32
            one-hot, and `scored` [B] bool, false for the rows (zeros) that pad the last batch.

        Raises:
            ValueError: If there are no such rows.
        """
        mine = shards.check_rows(batch, rows)
        padded = -(-self.heldout_images // batch) * batch
        numbers = np.arange(padded).reshape(-1, batch)[:, mine]
        batches = grain.MapDataset.source(list(numbers)).map(self._heldout_batch)
        return iter(batches.to_iter_dataset(self._read_options()))

    def _read_options(self) -> grain.ReadOptions:
        return _READ_DECODE if self.source.decodes else _READ_MEMORY

    def _train_batch(self, numbers: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads and augments one batch of training images."""
        crops = rng if self.config.crop_scale < 1 else None
        return self._augment(self.source.train.read(numbers, crops), rng)

    def _augment(
        self, batch: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Pads and crops, flips, normalises and mixes one batch."""
        config = self.config
        pixels, labels = batch
        if config.crop_padding:
            pixels = random_crop(pixels, config.crop_padding, rng)
        if config.flip:
            pixels = random_flip(pixels, rng)
        normalised = self._normalise(pixels)
        soft = one_hot(labels, config.classes)
        if config.mixup:
            normalised, soft = mix_up(normalised, soft, config.mixup, rng)
        return {"images": normalised, "labels": soft}

    def _normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Returns (pixels / peak - mean) / std, float32."""
        scale = 1.0 / (self.source.peak * np.array(self.std))
        shift = np.array(self.mean) / np.array(self.std)
        return pixels.astype(np.float32) * scale.astype(np.float32) - shift.astype(np.float32)

    def _heldout_batch(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Reads one batch of held-out images; numbers past the last are padding."""
        scored = numbers < self.heldout_images
        pixels, labels = self.source.heldout.read(numbers[scored])
        arrays = {
            "images": self._normalise(pixels),
            "labels": one_hot(labels, self.config.classes),
        }
        missing = len(numbers) - len(labels)
        padded = {
            key: np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
            for key, rows in arrays.items()
        }
        return {**padded, "scored": scored}


def load_vision(config: VisionConfig) -> VisionData:
    """Finds and checks the images of a run.

    Args:
        config: The `data.*` keys.

    Returns:
        The data.

    Raises:
        ValueError: If files are damaged, or sizes, channels or labels do not fit.
        FileNotFoundError: If files or a prepared dataset are missing.
        ModuleNotFoundError: If a package is missing.
    """
    source = images.load_images(config)
    return VisionData(
        config=config,
        source=source,
        mean=tuple(config.mean) or source.mean,
        std=tuple(config.std) or source.std,
    )


def random_crop(pixels: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Pads with black and crops back to the size, at a place of its own for each image.

    Args:
        pixels: [B, H, W, C].
        padding: Pixels on every side.
        rng: Random numbers.

    Returns:
        [B, H, W, C].
    """
    B, H, W, _ = pixels.shape
    edges = (padding, padding)
    padded = np.pad(pixels, [(0, 0), edges, edges, (0, 0)])
    rows, columns = rng.integers(0, 2 * padding + 1, (2, B))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (H, W), axis=(1, 2))
    return np.moveaxis(windows[np.arange(B), rows, columns], 1, -1)


def random_flip(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors each image left to right with probability one half.

    Args:
        pixels: [B, H, W, C].
        rng: Random numbers.

    Returns:
        [B, H, W, C].
    """
    mirrored = rng.random(len(pixels)) < 0.5
    return np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)


def mix_up(
    pixels: np.ndarray, labels: np.ndarray, alpha: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mixes every image with another of the batch: λ x + (1 - λ) x', λ ~ Beta(α, α).

    Source: arXiv 1710.09412, with one λ for each image.

    Args:
        pixels: [B, H, W, C] float32.
        labels: [B, N] float32.
        alpha: α.
        rng: Random numbers.

    Returns:
        Mixed pixels and labels, same shapes.
    """
    share = rng.beta(alpha, alpha, len(pixels)).astype(np.float32)
    partner = rng.permutation(len(pixels))
    across = share[:, None, None, None]
    mixed = across * pixels + (1 - across) * pixels[partner]
    return mixed, share[:, None] * labels + (1 - share[:, None]) * labels[partner]


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns labels [B] int as [B, N] float32."""
    return (labels[:, None] == np.arange(classes)).astype(np.float32)
