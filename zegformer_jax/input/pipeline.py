"""Batches for training and evaluation. What a batch holds depends on seed and step alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from zegformer_jax.input import transforms
from zegformer_jax.input.datasets import Source
from zegformer_jax.input.records.processes import count_cores
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import Vocabulary

tf.config.set_visible_devices([], "GPU")

SHUFFLE_ROUNDS = 4  # TensorFlow's own choice
SHUFFLE_STREAM, AUGMENT_STREAM = 0, 1


def train_batches(
    source: Source,
    vocabulary: Vocabulary,
    *,
    batch_size: int,
    crop_size: int,
    short_sides: Sequence[int],
    max_long_side: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    shard_index: int = 0,
    shard_count: int = 1,
    skip_unseen_pictures: bool = False,
    threads: int = 0,
    prefetch: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields shuffled, augmented training batches; unseen classes never leave this function.

    The records are permuted anew in each epoch, and batches run over epochs' ends. A row depends on
    (seed, its place in the order) alone: a run that starts at step k gives the batches that a run
    from 0 gives there, and shards give the rows that one shard would give.

    Args:
      source: records with labels in the vocabulary's order.
      vocabulary: says which classes are seen.
      batch_size: rows of the global batch.
      crop_size: side s of the crops.
      short_sides: a record's shorter side is drawn from these.
      max_long_side: limit of the longer side.
      seed: at least 0.
      start_step: number of the first batch.
      num_steps: how many batches.
      shard_index: which shard this process reads.
      shard_count: divides `batch_size`; a shard yields b = batch_size / shard_count rows.
      skip_unseen_pictures: leave out the records without any pixel of a seen class; the epochs are
        permutations of the others.
      threads: that read and augment, 0 for one a core; changes speed and memory only.
      prefetch: batches made ahead.

    Yields:
      `image` uint8 RGB [b, s, s, 3]; `label` uint8 or uint16 [b, s, s], places among the seen
      classes 0..S-1, all else the ignore label; `index` int64 [b], the records' places in `source`.

    Raises:
      ValueError: no records, sizes that do not fit, or a label outside the vocabulary (when its
        record is read; the message names the record).
    """
    _check_sharding(batch_size, shard_index, shard_count)
    if not short_sides:
        raise UserError("train_batches: short_sides is empty")
    rows = batch_size // shard_count
    table = vocabulary.training_table()
    records = _records(source, vocabulary, skip_unseen_pictures)
    label_dtype = vocabulary.label_dtype

    def example(place: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        record = _read(source, vocabulary, index)
        # The lowest word counts an example's own numbers: neighbours would share them in it.
        stream = np.random.Philox(key=[seed, AUGMENT_STREAM], counter=[0, place, 0, 0])
        image_hw3, label_hw = transforms.augment(
            record["image"],
            record["label"].astype(label_dtype),
            np.random.Generator(stream).random(transforms.NUM_RANDOM),
            crop_size=crop_size,
            short_sides=tuple(short_sides),
            max_long_side=max_long_side,
            ignore_label=vocabulary.ignore_label,
        )
        return image_hw3, table[label_hw]

    calls = _Calls(example, (tf.uint8, tf.as_dtype(label_dtype)))

    def as_tensors(count: tf.Tensor) -> dict[str, tf.Tensor]:
        place = count // rows * batch_size + shard_index * rows + count % rows
        index = tf.gather(records, _shuffled(place, len(records), seed))
        image_hw3, label_hw = calls(place, index)
        image_hw3 = tf.ensure_shape(image_hw3, (crop_size, crop_size, 3))
        label_hw = tf.ensure_shape(label_hw, (crop_size, crop_size))
        return {"image": image_hw3, "label": label_hw, "index": index}

    threads = threads or count_cores()
    dataset = tf.data.Dataset.range(start_step * rows, (start_step + num_steps) * rows)
    dataset = dataset.map(as_tensors, num_parallel_calls=threads, deterministic=True)
    dataset = dataset.batch(rows, drop_remainder=True).prefetch(prefetch)
    return calls.iterate(dataset.with_options(_options(threads)))


def _records(source: Source, vocabulary: Vocabulary, skip_unseen_pictures: bool) -> np.ndarray:
    """Places of the records to train on: int64."""
    if skip_unseen_pictures:
        records = source.records_with(vocabulary.seen_indices)
    else:
        records = np.arange(len(source))
    if len(records) == 0:
        what = " with a pixel of a seen class" if skip_unseen_pictures else ""
        raise UserError(f"train_batches: the source has no records{what}")
    return records.astype(np.int64)


def _check_sharding(batch_size: int, shard_index: int, shard_count: int) -> None:
    if batch_size < 1 or batch_size % shard_count:
        raise UserError(
            f"train_batches: {shard_count} shards do not divide a batch of {batch_size}"
        )
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"train_batches: no shard {shard_index} of {shard_count}")


def _options(threads: int) -> tf.data.Options:
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False
    return options


def _shuffled(place: tf.Tensor, num_records: int, seed: int) -> tf.Tensor:
    """Record at a place of the endless order: each run of `num_records` is a permutation."""
    epoch, position = place // num_records, place % num_records
    key = tf.stack([tf.constant(seed, tf.int64), epoch, tf.constant(SHUFFLE_STREAM, tf.int64)])
    last = tf.constant(num_records - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(
        index=position, seed=key, max_index=last, rounds=SHUFFLE_ROUNDS
    )


class _Calls:
    """A Python function inside tf.data, whose own errors reach the caller.

    Args:
      function: of whole numbers, to arrays; may run in several threads at once.
      types: of the arrays.
    """

    def __init__(self, function: Callable[..., tuple], types: Sequence[tf.DType]):
        self._function = function
        self._types = types
        self._errors: list[Exception] = []

    def __call__(self, *numbers: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Calls the function on tensors."""
        return tf.numpy_function(self._call, numbers, self._types, stateful=False)

    def _call(self, *numbers: np.ndarray) -> tuple:
        try:
            return self._function(*numbers)
        except Exception as error:
            self._errors.append(error)
            raise

    def iterate(self, dataset: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
        """Yields the data set's elements as arrays."""
        try:
            yield from dataset.as_numpy_iterator()
        except tf.errors.OpError:
            if not self._errors:
                raise
            raise self._errors[0] from None


def _read(source: Source, vocabulary: Vocabulary, index: int) -> dict:
    """Reads and checks a record."""
    record = source[int(index)]
    image_hw3, label_hw = record["image"], record["label"]
    if image_hw3.shape != (*label_hw.shape, 3):
        shapes = f"{image_hw3.shape}, its label {label_hw.shape}"
        raise UserError(f"record {record['id']!r}: the picture's shape is {shapes}")
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
    """Yields every record exactly once, grouped by padded shape.

    Args:
        source: Records with labels in the vocabulary's order.
        vocabulary: Checks the labels.
        batch_size: Rows b of a batch; a group's last batch is filled with rows that are not valid.
        short_sides: Lengths to which the image's shorter side is resized, one for each view.
        max_long_side: Limit of the longer side.
        done: bool [len(source)], records to leave out.
        shard_index: This process reads the records i with i % shard_count == shard_index.
        shard_count: Number of processes.
        threads: Threads that read and resize, 0 for one a core; changes speed and memory only.
        prefetch: Records read ahead.

    Yields:
        `views`: for each of `short_sides` a pair of images and sizes: uint8 RGB [b, H, W, 3],
        resized, then padded with 0 at the bottom and right to multiples of 32, and int32 [b, 2],
        height and width before padding; `label` [b, Ho, Wo] in the vocabulary's order at the
        original size, padded with the ignore label to `transforms.label_sides`; `original_size`
        int32 [b, 2]; `valid` bool [b], False in rows that only fill the batch (black, ignored, of
        the first row's sizes); `id` texts [b], empty in those rows; `index` int64 [b], the records'
        indices in `source`, -1 in those rows.

    Raises:
        ValueError: A label is outside the vocabulary; the message names the record.
    """
    label_dtype = vocabulary.label_dtype

    def example(index: int) -> tuple[np.ndarray | bytes, ...]:
        record = _read(source, vocabulary, index)
        sizes = [
            transforms.resized_sides(*record["label"].shape, side, max_long_side)
            for side in short_sides
        ]
        images = [transforms.resize_image(record["image"], size) for size in sizes]
        return *images, record["label"].astype(label_dtype), record["id"].encode()

    types = (*[tf.uint8] * len(short_sides), tf.as_dtype(label_dtype), tf.string)
    calls = _Calls(example, types)
    threads = threads or count_cores()
    own = np.arange(shard_index, len(source), shard_count)
    dataset = tf.data.Dataset.from_tensor_slices(own if done is None else own[~done[own]])
    dataset = dataset.map(
        lambda index: dict(zip(_FIELDS, _split(calls(index)), strict=True)) | {"index": index},
        num_parallel_calls=threads,
        deterministic=True,
    )
    dataset = dataset.prefetch(prefetch).with_options(_options(threads))
    yield from _grouped(calls.iterate(dataset), batch_size, vocabulary)


_FIELDS = ("images", "label", "id")


def _split(values: Sequence[Any]) -> tuple[Any, ...]:
    *images, label, id_ = values
    return tuple(images), label, id_


def _grouped(
    records: Iterator[dict[str, Any]], batch_size: int, vocabulary: Vocabulary
) -> Iterator[dict[str, Any]]:
    """Yields batches of records that have the same padded shapes."""
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for record in records:
        shapes = [transforms.padded_sides(*image.shape[:2]) for image in record["images"]]
        shapes.append(transforms.label_sides(*record["label"].shape))
        key = tuple(side for shape in shapes for side in shape)
        group = groups.setdefault(key, [])
        group.append(record)
        if len(group) == batch_size:
            yield _stack(groups.pop(key), batch_size, vocabulary)
    for group in groups.values():
        yield _stack(group, batch_size, vocabulary)


def _stack(group: list[dict[str, Any]], batch_size: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """Pads a group's records to its shape, and fills the batch with rows that are not valid."""
    empty = batch_size - len(group)
    labels, original_size = _pad_together(
        [record["label"] for record in group],
        transforms.label_sides,
        batch_size,
        vocabulary.ignore_label,
    )
    views = zip(*(record["images"] for record in group), strict=True)
    return {
        "views": tuple(
            _pad_together(images, transforms.padded_sides, batch_size, 0) for images in views
        ),
        "label": labels,
        "original_size": original_size,
        "valid": np.arange(batch_size) < len(group),
        "id": np.array([record["id"].decode() for record in group] + [""] * empty),
        "index": np.array([record["index"] for record in group] + [-1] * empty),
    }


def _pad_together(
    arrays: Sequence[np.ndarray],
    padded_sides: Callable[[int, int], tuple[int, int]],
    rows: int,
    fill: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Pads arrays to one shape and fills up their number; returns their sizes as well."""
    first = arrays[0]
    shape = padded_sides(*first.shape[:2])
    padded = np.full((rows, *shape, *first.shape[2:]), fill, first.dtype)
    sizes = np.tile(np.array(first.shape[:2], np.int32), (rows, 1))
    for row, array in enumerate(arrays):
        height, width = sizes[row] = array.shape[:2]
        padded[row, :height, :width] = array
    return padded, sizes
