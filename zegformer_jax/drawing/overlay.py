"""Draws class colours and names over an image."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from zegformer_jax.drawing.fonts import fit_size, measure, writable, write
from zegformer_jax.drawing.palette import palette

UNSEEN_MARK = "★"
NO_LABEL = -1
SCREEN = 2560 * 1440  # pixels; larger overlays are reduced to it
_SMALLEST_NAMED = 1 / 1000  # Of the image: a smaller region's name would only hide it.
_LABEL_SEARCH_SIDE = 512  # Names are placed at this size, to be fast for any image.
INK, PAPER, GREY = (25, 25, 28), (255, 255, 255), (110, 110, 116)


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    seen: Sequence[bool] | None = None,
    ignore: int | None = None,
    alpha: float = 0.55,
    min_side: int = 384,
    max_pixels: int = SCREEN,
) -> Image.Image:
    """Draws a label map over its image: colours, thin borders, and the name of every class.

    A class's name (its first synonym) is written on its largest region, unless the region is tiny
    or the name does not fit. Classes that were not seen in training are hatched, bordered in white
    and starred. An image whose longer side is under `min_side` is enlarged by an integer factor;
    one of more than `max_pixels` is reduced.

    Args:
        image: uint8 [h, w, 3], RGB.
        labels: Integer [h, w]; values outside 0..c-1 are left as they are in the image.
        names: C class names.
        seen: C flags; None means all seen.
        ignore: An additional value that means no label.
        alpha: Weight of the colours, 0..1.
        min_side: The least longer side of the result, in pixels.
        max_pixels: Most pixels of the result.

    Returns:
        An RGB image, of the image's size, times an integer factor, or reduced.

    Raises:
        ValueError: If image, labels, names and seen do not fit together.
    """
    image, labels = _at_most(max_pixels, np.asarray(image), np.asarray(labels))
    image, labels = check_drawing(image, labels, names, seen, ignore)
    seen = np.ones(len(names), bool) if seen is None else np.asarray(seen, bool)
    allowed = math.isqrt(max_pixels // labels.size)
    factor = max(1, min(math.ceil(min_side / max(labels.shape)), allowed))
    height, width = labels.shape[0] * factor, labels.shape[1] * factor
    enlarged = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    labels = labels.repeat(factor, axis=0).repeat(factor, axis=1)
    painted = Image.fromarray(paint(enlarged, labels, seen, alpha))
    _write_names(painted, labels, names, seen)
    return painted


def _at_most(
    max_pixels: int, image: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reduces an image and its labels to at most `max_pixels`, if they fit together."""
    if labels.size <= max_pixels or labels.shape != image.shape[:2] or image.dtype != np.uint8:
        return image, labels
    scale = math.sqrt(max_pixels / labels.size)
    height, width = (max(1, math.floor(side * scale)) for side in labels.shape)
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)  # the pixel at the centre
        for old, new in zip(labels.shape, (height, width), strict=True)
    )
    reduced = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(reduced), labels[rows][:, columns]


def check_drawing(image, labels, names, seen, ignore) -> tuple[np.ndarray, np.ndarray]:
    """Returns image and labels as arrays; labels are int32, NO_LABEL for unlabelled pixels."""
    image, labels = np.asarray(image), np.asarray(labels)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image is {image.dtype} {image.shape}; it must be uint8 [h, w, 3]")
    if labels.shape != image.shape[:2] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}; they must be integer {image.shape[:2]}"
        )
    if seen is not None and len(seen) != len(names):
        raise ValueError(f"seen has {len(seen)} flags for {len(names)} class names")
    labels = labels.astype(np.int32)
    unlabelled = (labels < 0) | (labels >= len(names))
    if ignore is not None:
        unlabelled |= labels == ignore
    return image, np.where(unlabelled, NO_LABEL, labels)


def paint(image: np.ndarray, labels: np.ndarray, seen: np.ndarray, alpha: float) -> np.ndarray:
    """Blends colours, hatching of unseen classes and borders into an image [h, w, 3]."""
    if not len(seen):
        return image
    labelled = labels != NO_LABEL
    unseen = labelled & ~seen[labels]
    thickness = max(1, round(math.sqrt(labels.size) / 350))
    rows, columns = np.indices(labels.shape, sparse=True)
    hatched = unseen & ((rows + columns) % (10 * thickness) < 2 * thickness)
    colours = palette(len(seen))[labels].astype(np.float32)
    colours = np.where(hatched[..., None], 0.35 * colours + 0.65 * 255, colours)
    weight = np.where(labelled, np.float32(alpha), np.float32(0))[..., None]
    painted = (1 - weight) * image + weight * colours
    border = _border(labels, thickness)
    painted[border & labelled] *= 0.3
    painted[_border(np.where(unseen, labels, NO_LABEL), 2 * thickness) & unseen] = 255
    return painted.round().astype(np.uint8)


def _border(labels: np.ndarray, thickness: int) -> np.ndarray:
    """Marks the pixels within `thickness` of another label, across rows or columns."""
    border = np.zeros(labels.shape, bool)
    for step in range(1, thickness + 1):
        down, right = labels[step:] != labels[:-step], labels[:, step:] != labels[:, :-step]
        border[step:] |= down
        border[:-step] |= down
        border[:, step:] |= right
        border[:, :-step] |= right
    return border


def first_synonym(name: str) -> str:
    """Returns the part of a class name before the first comma."""
    return name.split(",")[0].strip()


def shown_name(first: str, seen: bool) -> str:
    """Returns a first synonym, starred if the class is unseen."""
    return first if seen else f"{UNSEEN_MARK} {first}"


def _region_centres(labels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Returns (class, row, column, depth) of the largest region of each class, largest first.

    The point is the one farthest from the region's edge; the depth is its distance to the edge.
    """
    from scipy import ndimage

    stride = math.ceil(max(labels.shape) / _LABEL_SEARCH_SIDE)
    labels = labels[::stride, ::stride]
    centres = []
    for index, box in enumerate(ndimage.find_objects(labels + 1)):
        if box is None:
            continue
        regions, _ = ndimage.label(labels[box] == index)
        sizes = np.bincount(regions.ravel())[1:]
        if sizes.max() < _SMALLEST_NAMED * labels.size:
            continue
        region = np.pad(regions == 1 + np.argmax(sizes), 1)
        depth = ndimage.distance_transform_edt(region)[1:-1, 1:-1]
        row, column = np.unravel_index(np.argmax(depth), depth.shape)
        centre = row + box[0].start, column + box[1].start, depth.max()
        centres.append((sizes.max(), index, *(int(value * stride) for value in centre)))
    return [centre[1:] for centre in sorted(centres, key=lambda centre: -centre[0])]


def _write_names(
    image: Image.Image, labels: np.ndarray, names: Sequence[str], seen: np.ndarray
) -> None:
    """Writes the names of the classes onto the image, moved apart if they would overlap."""
    largest = round(min(max(math.sqrt(image.width * image.height) / 34, 13), 64))
    colours, centres = palette(len(names)), _region_centres(labels)
    firsts = writable([first_synonym(name) for name in names], [index for index, *_ in centres])
    draw = ImageDraw.Draw(image, "RGBA")
    taken: list[tuple[int, int, int, int]] = []
    for index, *centre in centres:
        text = shown_name(firsts[index], seen[index])
        size = fit_size(text, largest, image.width, bold=True)
        if size is None:
            continue
        box = _free_box(text, size, centre, image.size, taken)
        if box is not None:
            taken.append(box)
            _draw_tag(draw, box, text, size, tuple(map(int, colours[index])), bool(seen[index]))


def _free_box(text, size, centre, image_size, taken) -> tuple[int, int, int, int] | None:
    """Finds a box (left, top, right, bottom) for a text that touches no taken box.

    It is on the region's centre, or below or above it if it would hide a small region.
    """
    row, column, depth = centre
    width, height = round(measure(text, size, bold=True) + size * 0.8), round(size * 1.45)
    last_left, last_top = image_size[0] - width - 1, image_size[1] - height - 1
    if last_left < 0 or last_top < 0:
        return None
    away, line = depth + height // 2 + 3, height + 2
    near = (0, line, -line) if depth > 0.75 * height else (away, -away, 0)
    for shift in (*near, 2 * line, -2 * line, 3 * line, -3 * line):
        left = min(max(column - width // 2, 0), last_left)
        top = min(max(row - height // 2 + shift, 0), last_top)
        box = left, top, left + width, top + height
        if not any(
            box[0] <= other[2] and other[0] <= box[2] and box[1] <= other[3] and other[1] <= box[3]
            for other in taken
        ):
            return box
    return None


def _draw_tag(draw, box, text, size, colour, seen) -> None:
    """Draws a name in a rounded box: dark for a seen class, white for an unseen one."""
    fill, ink = ((*INK, 205), PAPER) if seen else ((*PAPER, 235), INK)
    draw.rounded_rectangle(box, radius=(box[3] - box[1]) // 4, fill=fill, outline=colour)
    centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    write(draw, centre, text, size, fill=ink, bold=True, anchor="mm")
