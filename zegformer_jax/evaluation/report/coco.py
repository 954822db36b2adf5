"""Label maps in the forms of COCO's tools: segments, run lengths, categories and numbers of images.

Axes: h w pixels, s segment.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from zegformer_jax.input import benchmarks
from zegformer_jax.text.vocabulary import Vocabulary

MOST_DIGITS = 18  # of an image's number, which COCO's tools hold in 64 bits


class Segments(NamedTuple):
    """Segments that cover a label map.

    Attributes:
        ids_hw: Integer [h, w], each pixel's segment, from 1.
        classes_s: The segments' class indices; `classes_s[0]` is the class of segment 1.
    """

    ids_hw: np.ndarray
    classes_s: np.ndarray


def class_segments(labels_hw: np.ndarray) -> Segments:
    """Returns a segment for each class in a label map, integer [h, w]."""
    classes_s, places = np.unique(labels_hw, return_inverse=True)
    return Segments(places.reshape(labels_hw.shape) + 1, classes_s)


def connected_segments(labels_hw: np.ndarray) -> Segments:
    """Returns a segment for each connected component of each class in a label map.

    Pixels are connected if they touch at a side or a corner.

    Args:
        labels_hw: Integer [h, w], class indices.
    """
    from scipy import ndimage

    ids_hw, classes = np.zeros(labels_hw.shape, np.int64), []
    for index in np.unique(labels_hw).tolist():
        components_hw, count = ndimage.label(labels_hw == index, structure=np.ones((3, 3)))
        ids_hw += np.where(components_hw > 0, components_hw + len(classes), 0)
        classes += [index] * count
    return Segments(ids_hw, np.array(classes))


def encode_segments(ids_hw: np.ndarray) -> list[dict[str, Any]]:
    """Returns the run lengths of segments as COCO's tools read them.

    Args:
        ids_hw: Integer [h, w], each pixel's segment, 1 to s.

    Returns:
        For each segment `size`: [h, w], and `counts`: compressed run lengths, a text.
    """
    from pycocotools import mask

    height, width = ids_hw.shape
    ids = ids_hw.ravel(order="F")  # COCO's runs are down the columns
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    ends = np.append(starts[1:], ids.size)
    by_segment = np.argsort(ids[starts], kind="stable")
    first_runs = np.flatnonzero(np.diff(ids[starts][by_segment])) + 1  # of segments 2 to s
    encoded = []
    for runs in np.split(by_segment, first_runs):
        bounds = np.stack([starts[runs], ends[runs]], axis=1).ravel()
        counts = np.diff(bounds, prepend=0, append=ids.size)
        counts = counts if counts[-1] else counts[:-1]
        run_lengths = {"size": [height, width], "counts": counts.tolist()}
        compressed = mask.frPyObjects(run_lengths, height, width)["counts"]
        encoded.append({"size": [height, width], "counts": compressed.decode("ascii")})
    return encoded


def make_categories(vocabulary: Vocabulary, dataset: str) -> list[dict[str, Any]]:
    """Returns COCO's categories of a vocabulary's classes, in its order.

    Args:
        vocabulary: The classes of label maps.
        dataset: Name of the data set. Its category ids are the vocabulary's ids, plus 1 if the data
            set counts from there, see `Benchmark.category_offset`.

    Returns:
        Dicts of `id`, `name` and `isthing`: 1, as vocabularies do not tell stuff from things.
    """
    is_known = dataset in benchmarks.BENCHMARKS
    offset = benchmarks.find(dataset).category_offset if is_known else 0
    return [
        {"id": id_ + offset, "name": name, "isthing": 1}
        for id_, name in zip(vocabulary.ids, vocabulary.names, strict=True)
    ]


def number_images(ids: Sequence[str]) -> list[int]:
    """Returns numbers for images: their ids if these are different numbers, else 1, 2, ..."""
    if all(id_.isascii() and id_.isdecimal() and len(id_) <= MOST_DIGITS for id_ in ids):
        numbers = [int(id_) for id_ in ids]
        if len(set(numbers)) == len(ids):
            return numbers
    return list(range(1, len(ids) + 1))
