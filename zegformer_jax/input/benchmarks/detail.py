"""PASCAL in Detail's annotations: masks of categories in one JSON, run-length encoded as COCO's."""

import collections
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from zegformer_jax.input import decoding
from zegformer_jax.runtime.errors import UserError, reading

# Whole numbers of at most 7 characters: pycocotools reads past the end of a text that stops within
# a number, and past 32 bits.
RUNS = re.compile("([P-o]{0,6}[0-O])+")
MOST = 10_000  # of a side in pixels, or a category; the data set's are at most 500 and 459


class Mask(NamedTuple):
    """Pixels of a category.

    Attributes:
        category: Its id.
        size: Height and width.
        runs: Lengths of runs down the columns, of pixels outside and inside in turn, compressed.
    """

    category: int
    size: tuple[int, int]
    runs: str


class Annotation(NamedTuple):
    """An image's masks, in the order in which they are painted.

    Attributes:
        size: Height and width.
        masks: Later ones cover earlier ones.
    """

    size: tuple[int, int]
    masks: Sequence[Mask]


@functools.lru_cache(maxsize=1)  # several hundred MB, needed for reading each record
def load(path: Path) -> Mapping[str, Annotation]:
    """Reads `trainval_merged.json`, once for all calls with the same path.

    Args:
        path: Path of the file, a JSON object with `images` (`image_id`, `file_name`, `height`,
            `width`) and `annos_segmentation` (`image_id`, `category_id`, `segmentation` with `size`
            and `counts`).

    Returns:
        Annotations by the images' file names without the ending.

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UserError: The file is not of this form; the message starts with the path.
    """
    masks, data = collections.defaultdict(list), decoding.read_file(path)
    with reading(path, "not the annotations of PASCAL in Detail; unpack them again"):
        content = json.loads(data.decode(), object_hook=_reduce)
        for number, mask in content["annos_segmentation"]:
            masks[number].append(mask)
        annotations = {
            name: Annotation(size, masks[number]) for number, name, size in content["images"]
        }
        _check(annotations.values())
    if not annotations or not masks:
        raise UserError(f"{path}: has {len(annotations)} images, and masks for {len(masks)}")
    return annotations


def _check(annotations: Iterable[Annotation]) -> None:
    for annotation in annotations:
        numbers = [*annotation.size, *(mask.category for mask in annotation.masks)]
        if len(annotation.size) != 2 or not all(type(x) is int and 0 < x <= MOST for x in numbers):
            raise ValueError(f"sides or categories {numbers[:9]} are not in 1..{MOST}")


def _reduce(item: dict[str, Any]) -> Any:
    """Reduces an object of the file to the needed fields, as soon as it is parsed.

    The file's other objects (parts, joints, occlusion) are never in memory together; this matters
    because each process that reads records reads the whole file.
    """
    if item.keys() >= {"size", "counts"} and isinstance(item["counts"], str):
        return tuple(item["size"]), item["counts"]
    if isinstance(item.get("segmentation"), tuple) and item.keys() >= {"image_id", "category_id"}:
        return item["image_id"], Mask(item["category_id"], *item["segmentation"])
    if item.keys() >= {"image_id", "file_name", "height", "width"}:
        return item["image_id"], Path(item["file_name"]).stem, (item["height"], item["width"])
    return item if item.keys() & {"images", "annos_segmentation"} else None


def paint(annotation: Annotation) -> np.ndarray:
    """Draws an image's masks.

    Returns:
        int32 [h, w]: ids of categories, 0 outside all masks.

    Raises:
        UserError: A mask has another size, or its runs do not fill it.
    """
    ids_hw = np.zeros(annotation.size, np.int32)
    for mask in annotation.masks:
        if mask.size != tuple(annotation.size):
            sizes = f"{mask.size}, its image {annotation.size}"
            raise UserError(f"category {mask.category}: the mask's size is {sizes}")
        ids_hw[decode_mask(mask.runs, mask.size)] = mask.category
    return ids_hw


def decode_mask(runs: str, size: tuple[int, int]) -> np.ndarray:
    """Decodes a compressed run-length encoding.

    Args:
        runs: Compressed run lengths, as in `Mask`.
        size: Height and width.

    Returns:
        bool [h, w].

    Raises:
        UserError: The runs do not fill the size.
    """
    height, width = size
    if min(size) < 1 or not RUNS.fullmatch(runs):
        raise UserError(f"the size {height}x{width} or the runs {runs[:20]!r} are not a mask's")
    mask = _fit(runs, size)
    if mask is None or _fit(runs, (height * width - 1, 1)) is not None:
        raise UserError(f"the runs of a mask do not fill its {height}x{width} pixels")
    return mask.astype(bool)


def _fit(runs: str, size: tuple[int, int]) -> np.ndarray | None:
    """Decodes runs; returns None if they are longer than the size.

    If they are shorter, pycocotools leaves the last pixels uninitialised without an error.
    """
    try:
        return coco_mask.decode({"size": list(size), "counts": runs})
    except ValueError:
        return None
