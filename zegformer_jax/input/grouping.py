"""Evaluation batches of images that have the same padded shapes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from zegformer_jax.input import transforms
from zegformer_jax.text.vocabulary import Vocabulary


def group_by_shape(
    records: Iterator[dict[str, Any]], batch_size: int, vocabulary: Vocabulary
) -> Iterator[dict[str, Any]]:
    """Yields batches of records that have the same padded shapes.

    Args:
        records: Records with `images` (one per view), `label`, `id` and `index`.
        batch_size: Rows of a batch; a group's last batch is filled with rows that are not valid.
        vocabulary: Vocabulary of the labels.

    Yields:
        Batches as `pipeline.eval_batches` describes them.
    """
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
