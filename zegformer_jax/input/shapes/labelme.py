"""labelme's annotation file of an image, whose shapes become polygons of COCO's form."""

from pathlib import Path
from typing import Any

import numpy as np

from zegformer_jax.input.shapes.annotation import (
    Annotation,
    Shape,
    field,
    read_object,
    read_size,
)
from zegformer_jax.runtime.errors import UserError

CIRCLE_CORNERS = 360  # of the polygon for a circle: 0.02 pixels off at a radius of 500
HUGE = 1e9  # pixels; no image is as large


def load(path: Path) -> Annotation:
    """Reads an annotation file; an image inside it is ignored.

    Args:
        path: Path of the file, a JSON object with the list `shapes` (`label`, `points`, each x and
            y, and `shape_type`: polygon, rectangle or circle), and optionally `imageHeight` and
            `imageWidth`. The points are of the image as it is shown: with its EXIF rotation.

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UserError: The file is not of this form; the message starts with the path.
    """
    content = read_object(path)
    shapes = []
    for place, item in enumerate(field(content, "shapes", list, str(path)), 1):
        where = f"shape {place}"
        name = field(item, "label", str, f"{path}: {where}")
        shapes.append(Shape(name, [_outline(item, f"{path}: {where}")], where))
    return Annotation(read_size(content, "imageHeight", "imageWidth", str(path)), shapes)


def _outline(item: dict[str, Any], where: str) -> list[float]:
    """Returns a shape's polygon x, y, x, y, ..."""
    kind, points = item.get("shape_type") or "polygon", field(item, "points", list, where)
    if not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise UserError(f"{where}: 'points' must be pairs of x and y")
    if kind not in ("polygon", "rectangle", "circle"):
        raise UserError(
            f"{where}: the shape_type '{kind}' is no area here; draw a polygon, rectangle or circle"
        )
    if kind == "circle":
        return _circle(points, where)
    if kind == "rectangle" and len(points) == 2:  # some tools write all four corners
        (left, top), (right, bottom) = points
        return [left, top, right, top, right, bottom, left, bottom]
    return [value for point in points for value in point]


def _circle(points: list[list[float]], where: str) -> list[float]:
    """Returns the polygon of a circle, given its centre and a point of it."""
    numbers = [value for point in points for value in point]
    if len(points) != 2 or not all(type(x) in (int, float) and abs(x) < HUGE for x in numbers):
        raise UserError(f"{where}: a circle must have two points, its centre and one on it")
    centre, edge = np.array(points, np.float64)
    radius = np.hypot(*(edge - centre))
    angles = np.linspace(0, 2 * np.pi, CIRCLE_CORNERS, endpoint=False)
    corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return corners.ravel().tolist()
