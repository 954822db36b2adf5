"""Batches for training and evaluation. A batch's content depends on seed and step alone."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from zegformer_jax.input import transforms
from zegformer_jax.input.calls import Calls, thread_options
from zegformer_jax.input.datasets import Source
from zegformer_jax.input.grouping import group_by_shape
from zegformer_jax.input.records.processes import count_cores
from zegformer_jax.input.settings import InputSettings
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import Vocabulary

SHUFFLE_ROUNDS = 4  # TensorFlow's own choice
SHUFFLE_STREAM, AUGMENT_STREAM = 0, 1


def train_batches(
    source: Source,
    vocabulary: Vocabulary,
    settings: InputSettings,
    *,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields shuffled, augmented training batches; unseen classes never leave this function.

    Each epoch has another permutation of the images, and batches run over the ends of epochs. A row
    depends on the seed and its position in the order alone: a run that starts at step k yields the
    batches that a run from step 0 yields there, and shards yield the rows that one shard would.

    Args:
        source: Images with labels in the vocabulary's order.
        vocabulary: Tells which classes are seen.
        settings: Sizes of batches and crops, threads and the images to leave out.
        seed: Seed of order and augmentation, at least 0.
        start_step: Number of the first batch.
        num_steps: Number of batches.
        shard_index: Index of the shard that this process reads.
        shard_count: Number of shards; divides the batch size. A shard yields
            b = batch size / shard_count rows.

    Yields:
        `image` uint8 RGB [b, s, s, 3]; `label` uint8 or uint16 [b, s, s], indices among the seen
        classes 0..S-1, all else the ignore label; `index` int64 [b], the images' indices in
        `source`.

    Raises:
        UserError: There are no images, sizes do not fit, or a label is outside the vocabulary
            (raised when its image is read; the message names the image).
    """
    _check(settings, shard_index, shard_count)
    rows, side = settings.batch_size // shard_count, settings.crop_size
    indices = _training_indices(source, vocabulary, settings.skip_unseen_pictures)
    crops = _Crops(source, vocabulary, settings, seed)
    calls = Calls(crops, (tf.uint8, tf.as_dtype(vocabulary.label_dtype)))

    def as_tensors(count: tf.Tensor) -> dict[str, tf.Tensor]:
        position = count // rows * settings.batch_size + shard_index * rows + count % rows
        index = tf.gather(indices, _shuffled(position, len(indices), seed))
        image_hw3, label_hw = calls(position, index)
        image_hw3 = tf.ensure_shape(image_hw3, (side, side, 3))
        label_hw = tf.ensure_shape(label_hw, (side, side))
        return {"image": image_hw3, "label": label_hw, "index": index}

    threads = settings.threads or count_cores()
    dataset = tf.data.Dataset.range(start_step * rows, (start_step + num_steps) * rows)
    dataset = dataset.map(as_tensors, num_parallel_calls=threads, deterministic=True)
    dataset = dataset.batch(rows, drop_remainder=True).prefetch(settings.prefetch)
    return calls.iterate(dataset.with_options(thread_options(threads)))


def _check(settings: InputSettings, shard_index: int, shard_count: int) -> None:
    if settings.batch_size < 1 or settings.batch_size % shard_count:
        raise UserError(
            f"train_batches: {shard_count} shards do not divide a batch of {settings.batch_size}"
        )
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"train_batches: no shard {shard_index} of {shard_count}")
    if not settings.short_sides:
        raise UserError("train_batches: short_sides is empty")


def _training_indices(source: Source, vocabulary: Vocabulary, skip_unseen: bool) -> np.ndarray:
    """Returns the indices of the images to train on, int64."""
    if skip_unseen:
        indices = source.records_with(vocabulary.seen_indices)
    else:
        indices = np.arange(len(source))
    if len(indices) == 0:
        rest = " with a pixel of a seen class" if skip_unseen else ""
        raise UserError(f"train_batches: the source has no images{rest}")
    return indices.astype(np.int64)


def _shuffled(position: tf.Tensor, count: int, seed: int) -> tf.Tensor:
    """Returns the image at a position of the endless order: each `count` are a permutation."""
    epoch, within = position // count, position % count
    key = tf.stack([tf.constant(seed, tf.int64), epoch, tf.constant(SHUFFLE_STREAM, tf.int64)])
    last = tf.constant(count - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(
        index=within, seed=key, max_index=last, rounds=SHUFFLE_ROUNDS
    )


class _Crops:
    """Reads and augments training images; labels leave it as training labels."""

    def __init__(
        self, source: Source, vocabulary: Vocabulary, settings: InputSettings, seed: int
    ) -> None:
        self._source, self._vocabulary, self._seed = source, vocabulary, seed
        self._sizes = {
            "crop_size": settings.crop_size,
            "short_sides": tuple(settings.short_sides),
            "max_long_side": settings.max_long_side,
        }
        self._table = vocabulary.training_table()

    def __call__(self, position: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the crop and the label map of the image at a position of the order."""
        record = _read(self._source, self._vocabulary, index)
        # The counter's lowest word counts the numbers drawn for one image: in that word,
        # neighbouring positions would share numbers.
        stream = np.random.Philox(key=[self._seed, AUGMENT_STREAM], counter=[0, position, 0, 0])
        image_hw3, label_hw = transforms.augment(
            record["image"],
            record["label"].astype(self._vocabulary.label_dtype),
            np.random.Generator(stream).random(transforms.NUM_RANDOM),
            ignore_label=self._vocabulary.ignore_label,
            **self._sizes,
        )
        return image_hw3, self._table[label_hw]


def _read(source: Source, vocabulary: Vocabulary, index: int) -> dict:
    """Reads and checks a record."""
    record = source[int(index)]
    image_hw3, label_hw = record["image"], record["label"]
    if image_hw3.shape != (*label_hw.shape, 3):
        shapes = f"{image_hw3.shape}, its label {label_hw.shape}"
        raise UserError(f"record {record['id']!r}: the image's shape is {shapes}")
    outside = (label_hw >= len(vocabulary)) & (label_hw != vocabulary.ignore_label)
    if outside.any():
        raise UserError(
            f"record {record['id']!r}: label {int(label_hw[outside][0])} is not a class of the "
            f"vocabulary (0..{len(vocabulary) - 1}) nor the ignore label {vocabulary.ignore_label}"
        )
    return record


def eval_batches(
    source: Source,
    vocabulary: Vocabulary,
    *,
    batch_size: int,
    short_sides: Sequence[int],
    max_long_side: int,
    done: np.ndarray | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 0,
    prefetch: int = 2,
) -> Iterator[dict[str, Any]]:
    """Yields every image exactly once, grouped by padded shape.

    Args:
        source: Images with labels in the vocabulary's order.
        vocabulary: Checks the labels.
        batch_size: Rows b of a batch; a group's last batch is filled with rows that are not valid.
        short_sides: Lengths to which the image's shorter side is resized, one for each view.
        max_long_side: Limit of the longer side.
        done: bool [len(source)], images to leave out.
        shard_index: This process reads the images i with i % shard_count == shard_index.
        shard_count: Number of processes.
        threads: Threads that read and resize, 0 for one per core; changes speed and memory only.
        prefetch: Images read ahead.

    Yields:
        `views`: for each of `short_sides` a pair of images and sizes: uint8 RGB [b, H, W, 3],
        resized, then padded with 0 at the bottom and right to multiples of 32, and int32 [b, 2],
        height and width before padding; `label` [b, Ho, Wo] in the vocabulary's order at the
        original size, padded with the ignore label to `transforms.label_sides`; `original_size`
        int32 [b, 2]; `valid` bool [b], False in rows that only fill the batch (black, ignored, of
        the first row's sizes); `id` texts [b], empty in those rows; `index` int64 [b], the images'
        indices in `source`, -1 in those rows.

    Raises:
        UserError: A label is outside the vocabulary; the message names the image.
    """
    types = (*[tf.uint8] * len(short_sides), tf.as_dtype(vocabulary.label_dtype), tf.string)
    calls = Calls(_Views(source, vocabulary, short_sides, max_long_side), types)
    own = np.arange(shard_index, len(source), shard_count)
    dataset = tf.data.Dataset.from_tensor_slices(own if done is None else own[~done[own]])
    threads = threads or count_cores()

    def as_tensors(index: tf.Tensor) -> dict[str, Any]:
        *images, label_hw, id_ = calls(index)
        return {"images": tuple(images), "label": label_hw, "id": id_, "index": index}

    dataset = dataset.map(as_tensors, num_parallel_calls=threads, deterministic=True)
    dataset = dataset.prefetch(prefetch).with_options(thread_options(threads))
    yield from group_by_shape(calls.iterate(dataset), batch_size, vocabulary)


@dataclasses.dataclass(frozen=True)
class _Views:
    """Reads images and resizes them, once for each of the short sides."""

    source: Source
    vocabulary: Vocabulary
    short_sides: Sequence[int]
    max_long_side: int

    def __call__(self, index: int) -> tuple[np.ndarray | bytes, ...]:
        """Returns the resized images, the label map and the id."""
        record = _read(self.source, self.vocabulary, index)
        height, width = record["label"].shape
        sizes = [
            transforms.resized_sides(height, width, side, self.max_long_side)
            for side in self.short_sides
        ]
        images = [transforms.resize_image(record["image"], size) for size in sizes]
        label_hw = record["label"].astype(self.vocabulary.label_dtype)
        return *images, label_hw, record["id"].encode()
