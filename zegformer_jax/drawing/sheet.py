"""Draws images, labels and predictions side by side."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from zegformer_jax.drawing.fonts import SMALLEST, fit_size, measure, writable, write
from zegformer_jax.drawing.overlay import (
    GREY,
    INK,
    NO_LABEL,
    PAPER,
    UNSEEN_MARK,
    check_drawing,
    first_synonym,
    overlay,
    paint,
    shown_name,
)

_SHEET_ALPHA = 0.7


def sheet(
    rows: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    *,
    seen: Sequence[bool] | None = None,
    titles: Sequence[str] = ("image", "truth", "prediction", "baseline"),
    ignore: int | None = None,
    show_ignored: bool = False,
    cell: int = 288,
) -> Image.Image:
    """Draws rows of image, truth and predictions, with a legend of the classes in them.

    Args:
        rows: Each (image uint8 [h, w, 3], truth integer [h, w], prediction [h, w], ...), with the
            same number of label maps in every row.
        names: C class names.
        seen: C flags; None means all seen.
        titles: Titles of the columns, at least one per column.
        ignore: An additional value that means no label.
        show_ignored: Draw predictions also where the truth has no label.
        cell: Longer side of one image, in pixels.

    Returns:
        An RGB image.

    Raises:
        ValueError: If there are no rows, rows differ in length or their arrays do not fit.
    """
    if not rows or len({len(row) for row in rows}) != 1 or not 2 <= len(rows[0]) <= len(titles):
        raise ValueError(
            f"sheet: rows have {sorted({len(row) for row in rows})} images for the titles "
            f"{list(titles)}; every row needs an image and as many label maps as the others, "
            "at least one"
        )
    seen = [True] * len(names) if seen is None else list(seen)
    names = writable([first_synonym(name) for name in names], _present(rows, len(names)))
    scenes = [_scene(row, names, seen, ignore, show_ignored, cell) for row in rows]
    gap, title_height = cell // 24, cell // 9
    width = gap + len(rows[0]) * (cell + gap)
    heights = [max(panel.height for panel in panels) for panels, _ in scenes]
    shown = sum((counts for _, counts in scenes), np.zeros(len(names), np.int64))
    legend = _legend(names, seen, shown, width - 2 * gap, cell // 18, not show_ignored)
    below = title_height + sum(height + gap for height in heights)
    page = Image.new("RGB", (width, below + legend.height + gap), PAPER)
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles[: len(rows[0])]):
        centre = gap + column * (cell + gap) + cell // 2, title_height // 2
        size = fit_size(title, cell // 17, cell, bold=True)
        if size is not None:
            write(draw, centre, title, size, fill=INK, bold=True, anchor="mm")
    top = title_height
    for (panels, _), height in zip(scenes, heights, strict=True):
        for column, panel in enumerate(panels):
            page.paste(panel, (gap + column * (cell + gap) + (cell - panel.width) // 2, top))
        top += height + gap
    page.paste(legend, (gap, below))
    return page


def _present(rows: Sequence[Sequence[np.ndarray]], classes: int) -> list[int]:
    """Returns the classes in the label maps of any row."""
    found = set().union(*(np.unique(labels).tolist() for row in rows for labels in row[1:]))
    return sorted(found & set(range(classes)))


def _scene(row, names, seen, ignore, show_ignored, cell) -> tuple[list[Image.Image], np.ndarray]:
    """Draws one row of a sheet; returns its images and the number of pixels of each class."""
    image, *maps = row
    maps = [check_drawing(image, labels, names, seen, ignore)[1] for labels in maps]
    if not show_ignored:
        maps = [np.where(maps[0] == NO_LABEL, NO_LABEL, labels) for labels in maps]
    scale = cell / max(image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    panels = [Image.fromarray(small)]
    for labels in maps:
        resized = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        panels.append(overlay(small, resized, names, seen=seen, alpha=_SHEET_ALPHA, min_side=1))
    counts = sum(np.bincount(labels[labels >= 0], minlength=len(names)) for labels in maps)
    return panels, counts


def _legend(names, seen, pixels, width, size, ignored_left_out, most=60) -> Image.Image:
    """Draws swatches with names for the classes that have pixels: seen, then unseen ones."""
    present = np.flatnonzero(pixels)
    frequent = sorted(present, key=lambda index: -pixels[index])[:most]
    order = sorted(frequent, key=lambda index: (not seen[index], -pixels[index]))
    swatch = round(size * 1.2)
    texts = [shown_name(names[index], seen[index]) for index in order]
    widest = max((measure(text, size) for text in texts), default=0)
    columns = max(1, int(width // (swatch + widest + 2.5 * size)))
    line = round(size * 1.7)
    notes = [f"{UNSEEN_MARK} and hatching: unseen classes, whose labels no training uses"]
    if ignored_left_out:
        notes.append("Pixels without a label in the truth are not evaluated and left unchanged.")
    if len(present) > most:
        notes.append(f"{len(present) - most} classes with fewer pixels are not listed.")
    lines = math.ceil(len(texts) / columns)
    legend = Image.new("RGB", (width, round((lines + len(notes) + 0.5) * line)), PAPER)
    draw = ImageDraw.Draw(legend)
    for place, (index, text) in enumerate(zip(order, texts, strict=True)):
        left, top = (place % columns) * (width // columns), (place // columns) * line
        patch = np.full((swatch, swatch), index)
        blank = np.full((swatch, swatch, 3), 255, np.uint8)
        legend.paste(Image.fromarray(paint(blank, patch, np.asarray(seen), 1.0)), (left, top))
        write(draw, (left + 1.5 * swatch, top + swatch / 2), text, size, fill=INK)
    for place, note in enumerate(notes):
        top = round((lines + 0.5 + place) * line)
        fitting = fit_size(note, size, width) or SMALLEST
        write(draw, (0, top), note, fitting, fill=GREY, anchor="la")
    return legend
