"""Pixels of shapes in COCO's form, with the checks that pycocotools leaves to its callers."""

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from zegformer_jax.input.benchmarks.detail import decode_mask
from zegformer_jax.input.shapes.annotation import MOST_QUOTED
from zegformer_jax.runtime.errors import UserError

Runs = dict[str, Any]  # compressed run lengths: `size` and `counts`


def encode(segmentation: Any, size: tuple[int, int], where: str) -> Runs:
    """Returns the run lengths of a shape.

    A polygon has the pixels whose centres are inside, up to the rounding of COCO's tools: the
    rectangle from (2, 3) to (7, 6) has the columns 2 to 6 and the rows 3 to 5.

    Args:
        segmentation: A list of polygons, each a flat list x, y, x, y, ... from the image's upper
            left corner; or an object with `size` (height, width) and `counts`, the lengths of runs
            down the columns, of pixels outside and inside in turn: a list, or compressed to a text.
        size: Height and width of the image.
        where: The shape, with which error messages start.

    Raises:
        UserError: The segmentation is none of these, or does not fit the image.
    """
    if isinstance(segmentation, dict):
        return _encode_runs(segmentation, size, where)
    if not isinstance(segmentation, list) or not segmentation:
        raise UserError(f"{where}: has neither polygons nor run lengths; a box alone is no mask")
    for polygon in segmentation:
        _check_polygon(polygon, size, where)
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))


def decode(runs: Runs) -> np.ndarray:
    """Returns the mask of run lengths from `encode`: bool [h, w]."""
    return coco_mask.decode(runs).astype(bool)


def count_pixels(runs: Runs) -> int:
    """Returns the number of pixels of run lengths from `encode`."""
    return int(coco_mask.area(runs))


def _check_polygon(polygon: Any, size: tuple[int, int], where: str) -> None:
    """Checks a polygon: pycocotools reads four numbers as a box, and fails on huge ones."""
    is_list = isinstance(polygon, list) and all(type(x) in (int, float) for x in polygon)
    if not is_list or len(polygon) < 6 or len(polygon) % 2:
        raise UserError(f"{where}: a polygon must be a list of at least 3 points, x and y each")
    longest = max(size)  # neither NaN nor infinity are in this range
    far = [x for x in polygon if not -longest <= x <= 2 * longest]
    if far:
        value = repr(far[0])[:MOST_QUOTED]
        raise UserError(f"{where}: {value} is far outside the image of {size[0]}x{size[1]} pixels")


def _encode_runs(segmentation: dict[str, Any], size: tuple[int, int], where: str) -> Runs:
    if segmentation.get("size") != list(size):
        raise UserError(
            f"{where}: run lengths of the size {segmentation.get('size')!r}, but the image's is "
            f"{list(size)}"
        )
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        try:
            decode_mask(counts, size)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return {"size": list(size), "counts": counts}
    is_list = isinstance(counts, list) and all(type(x) is int and x >= 0 for x in counts)
    if not is_list or sum(counts) != math.prod(size):
        raise UserError(f"{where}: the runs of a mask do not fill its {size[0]}x{size[1]} pixels")
    return coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
