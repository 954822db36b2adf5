"""Label maps as pictures: overlays with class names, and sheets of scenes.

Axes: c class, h w pixels. Label maps hold indices of a vocabulary, 0..c-1; a pixel with any other
value has no label. No jax here.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

UNSEEN_MARK = "★"
NO_LABEL = -1
_SHEET_ALPHA = 0.7
_SMALLEST_NAMED = 1 / 1000  # Of the picture: a smaller region's name would only hide it.
_LABEL_SEARCH_SIDE = 512  # Where names go is worked out at this size: fast for any picture.
_INK, _PAPER, _GREY = (25, 25, 28), (255, 255, 255), (110, 110, 116)


@functools.lru_cache(maxsize=8)
def palette(n: int) -> np.ndarray:
    """Gives n colours that are far apart; the first ones are the same whatever n is.

    Each colour is the one farthest, in the OKLab space, from all before it (for n beyond 3,000
    or so the colours repeat).

    Args:
        n: number of colours, at least 0.

    Returns:
        uint8 [n, 3], RGB, read-only.

    Raises:
        ValueError: if n is negative.
    """
    if n < 0:
        raise ValueError(f"palette: {n} colours were asked for; give 0 or more")
    levels = np.linspace(0, 255, 18).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates / 255)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (lab[:, 0] > 0.42) & (lab[:, 0] < 0.9) & (chroma > 0.08) & (chroma < 0.21)
    candidates, lab = candidates[vivid], lab[vivid]
    lab = lab * [0.8, 1.0, 1.0]  # Hue tells classes apart better than lightness does.
    chosen = [int(np.argmin(np.abs(candidates - [230, 57, 70]).sum(axis=1)))]
    distance = np.full(len(lab), np.inf)
    for _ in range(min(n, len(lab)) - 1):
        distance = np.minimum(distance, np.square(lab - lab[chosen[-1]]).sum(axis=1))
        chosen.append(int(np.argmax(distance)))
    colours = candidates[np.resize(chosen, n)].astype(np.uint8)
    colours.flags.writeable = False
    return colours


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Converts sRGB in [0, 1] to OKLab (Ottosson 2020)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear @ np.transpose(to_lms)) @ np.transpose(to_lab)


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    seen: Sequence[bool] | None = None,
    ignore: int | None = None,
    alpha: float = 0.55,
    min_side: int = 384,
) -> Image.Image:
    """Draws a label map over its image: colours, thin borders, and the name of every class.

    A class's name (its first synonym) stands on its largest region, unless that is a mere speck
    or the name does not fit. Classes that were not seen in training are hatched, bordered in white
    and starred. A picture whose longer side is under
    ``min_side`` is enlarged by a whole factor.

    Args:
        image: uint8 [h, w, 3], RGB.
        labels: integer [h, w]; values outside 0..c-1 are left as they are in the image.
        names: c class names.
        seen: c flags; None means all seen.
        ignore: one more value that means no label.
        alpha: weight of the colours, 0..1.
        min_side: the least longer side of the result, in pixels.

    Returns:
        A picture, RGB, of the image's size times a whole factor.

    Raises:
        ValueError: if image, labels, names and seen do not fit together.
    """
    image, labels = _checked(image, labels, names, seen, ignore)
    seen = np.ones(len(names), bool) if seen is None else np.asarray(seen, bool)
    factor = max(1, math.ceil(min_side / max(labels.shape)))
    height, width = labels.shape[0] * factor, labels.shape[1] * factor
    picture = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    labels = labels.repeat(factor, axis=0).repeat(factor, axis=1)
    painted = Image.fromarray(_painted(picture, labels, seen, alpha))
    _write_names(painted, labels, names, seen)
    return painted


def _checked(image, labels, names, seen, ignore) -> tuple[np.ndarray, np.ndarray]:
    """Gives image and labels as arrays, int32 labels with NO_LABEL for all that has none."""
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


def _painted(image: np.ndarray, labels: np.ndarray, seen: np.ndarray, alpha: float) -> np.ndarray:
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
    weight = np.where(labelled, alpha, 0)[..., None]
    painted = (1 - weight) * image + weight * colours
    border = _border(labels, thickness)
    painted[border & labelled] *= 0.3
    painted[_border(np.where(unseen, labels, NO_LABEL), 2 * thickness) & unseen] = 255
    return painted.round().astype(np.uint8)


def _border(labels: np.ndarray, thickness: int) -> np.ndarray:
    """Marks the pixels within ``thickness`` of another label, across rows or columns."""
    border = np.zeros(labels.shape, bool)
    for step in range(1, thickness + 1):
        down, right = labels[step:] != labels[:-step], labels[:, step:] != labels[:, :-step]
        border[step:] |= down
        border[:-step] |= down
        border[:, step:] |= right
        border[:, :-step] |= right
    return border


def _shown_name(name: str, seen: bool) -> str:
    """Gives the first synonym, starred where the class is unseen."""
    first = name.split(",")[0].strip()
    return first if seen else f"{UNSEEN_MARK} {first}"


@functools.lru_cache(maxsize=64)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Loads DejaVu Sans, which matplotlib brings along: it has accents, Greek and Cyrillic."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def _region_centres(labels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Gives (class, row, column, depth) of the largest region of each class, larger ones first.

    The point is the one farthest from the region's edge, and the depth is how far that is.
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
    picture: Image.Image, labels: np.ndarray, names: Sequence[str], seen: np.ndarray
) -> None:
    """Writes the names of the classes onto the picture, moved apart where they would overlap."""
    size = round(min(max(math.sqrt(picture.width * picture.height) / 34, 13), 64))
    colours = palette(len(names))
    draw = ImageDraw.Draw(picture, "RGBA")
    taken: list[tuple[int, int, int, int]] = []
    for index, *centre in _region_centres(labels):
        text = _shown_name(names[index], seen[index])
        font = _fitting_font(text, size, picture.width)
        if font is None:
            continue
        box = _free_box(font, text, centre, picture.size, taken)
        if box is not None:
            taken.append(box)
            _draw_tag(draw, box, text, font, tuple(map(int, colours[index])), bool(seen[index]))


def _fitting_font(text: str, size: int, width: int) -> ImageFont.FreeTypeFont | None:
    """Gives the font at the size, or smaller so that the text fits the width; None under 8."""
    for smaller in range(size, 7, -1):
        if _font(smaller, bold=True).getlength(text) + smaller <= width:
            return _font(smaller, bold=True)
    return None


def _free_box(font, text, centre, picture_size, taken) -> tuple[int, int, int, int] | None:
    """Finds a box (left, top, right, bottom) for a text that touches no taken one.

    It lies on the region's centre, or below or above it where it would hide a small region.
    """
    row, column, depth = centre
    width, height = round(font.getlength(text) + font.size * 0.8), round(font.size * 1.45)
    last_left, last_top = picture_size[0] - width - 1, picture_size[1] - height - 1
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


def _draw_tag(draw, box, text, font, colour, seen) -> None:
    """Draws a name in a rounded box: dark for a seen class, white for an unseen one."""
    fill, ink = ((*_INK, 205), _PAPER) if seen else ((*_PAPER, 235), _INK)
    draw.rounded_rectangle(box, radius=(box[3] - box[1]) // 4, fill=fill, outline=colour)
    centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    draw.text(centre, text, fill=ink, font=font, anchor="mm")


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
    """Draws scenes as rows of image, truth and predictions, with a legend of the classes in them.

    Args:
        rows: each (image uint8 [h, w, 3], truth integer [h, w], prediction [h, w], ...), with the
            same number of label maps in every row.
        names: c class names.
        seen: c flags; None means all seen.
        titles: of the columns, at least one for each.
        ignore: one more value that means no label.
        show_ignored: draw predictions also where the truth has no label.
        cell: longer side of one picture, in pixels.

    Returns:
        A picture, RGB.

    Raises:
        ValueError: if there are no rows, rows differ in length or their arrays do not fit.
    """
    if not rows or len({len(row) for row in rows}) != 1 or not 2 <= len(rows[0]) <= len(titles):
        raise ValueError(
            f"sheet: rows have {sorted({len(row) for row in rows})} pictures for the titles "
            f"{list(titles)}; every row needs an image and at least one label map, all alike"
        )
    seen = [True] * len(names) if seen is None else list(seen)
    scenes = [_scene(row, names, seen, ignore, show_ignored, cell) for row in rows]
    gap, title_height = cell // 24, cell // 9
    width = gap + len(rows[0]) * (cell + gap)
    heights = [max(panel.height for panel in panels) for panels, _ in scenes]
    shown = sum((counts for _, counts in scenes), np.zeros(len(names), np.int64))
    legend = _legend(names, seen, shown, width - 2 * gap, cell // 18, not show_ignored)
    below = title_height + sum(height + gap for height in heights)
    page = Image.new("RGB", (width, below + legend.height + gap), _PAPER)
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles[: len(rows[0])]):
        centre = gap + column * (cell + gap) + cell // 2, title_height // 2
        font = _fitting_font(title, cell // 17, cell)
        if font is not None:
            draw.text(centre, title, fill=_INK, font=font, anchor="mm")
    top = title_height
    for (panels, _), height in zip(scenes, heights, strict=True):
        for column, panel in enumerate(panels):
            page.paste(panel, (gap + column * (cell + gap) + (cell - panel.width) // 2, top))
        top += height + gap
    page.paste(legend, (gap, below))
    return page


def _scene(row, names, seen, ignore, show_ignored, cell) -> tuple[list[Image.Image], np.ndarray]:
    """Draws one row of a sheet; gives its pictures and how many pixels each class has in them."""
    image, *maps = row
    maps = [_checked(image, labels, names, seen, ignore)[1] for labels in maps]
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
    font, swatch = _font(size), round(size * 1.2)
    texts = [_shown_name(names[index], seen[index]) for index in order]
    widest = max((font.getlength(text) for text in texts), default=0)
    columns = max(1, int(width // (swatch + widest + 2.5 * size)))
    line = round(size * 1.7)
    notes = [f"{UNSEEN_MARK} and hatching: unseen classes, whose labels no training uses"]
    if ignored_left_out:
        notes.append("Pixels without a label in the truth are not evaluated and left as they are.")
    if len(present) > most:
        notes.append(f"{len(present) - most} classes with fewer pixels are not listed.")
    lines = math.ceil(len(texts) / columns)
    legend = Image.new("RGB", (width, round((lines + len(notes) + 0.5) * line)), _PAPER)
    draw = ImageDraw.Draw(legend)
    for place, (index, text) in enumerate(zip(order, texts, strict=True)):
        left, top = (place % columns) * (width // columns), (place // columns) * line
        patch = np.full((swatch, swatch), index)
        blank = np.full((swatch, swatch, 3), 255, np.uint8)
        legend.paste(Image.fromarray(_painted(blank, patch, np.asarray(seen), 1.0)), (left, top))
        draw.text((left + 1.5 * swatch, top + swatch / 2), text, fill=_INK, font=font, anchor="lm")
    for place, note in enumerate(notes):
        top = round((lines + 0.5 + place) * line)
        fitting = next((s for s in range(size, 7, -1) if _font(s).getlength(note) <= width), 8)
        draw.text((0, top), note, fill=_GREY, font=_font(fitting))
    return legend
