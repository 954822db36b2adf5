"""Text in images: in DejaVu Sans, and in the system's fonts where that lacks the letters."""

import functools
import logging
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator, Sequence

from PIL import ImageDraw, ImageFont, features

SMALLEST = 8  # pixels; smaller letters cannot be read
FONTCONFIG = "fc-match"
PLACEHOLDERS = "LastResort"  # the font of macOS that has a box for every letter
FontFile = tuple[str, int]  # a path, and the font's index in the file
Run = tuple[str, ImageFont.FreeTypeFont]


def fit_size(text: str, size: int, width: int, bold: bool = False) -> int | None:
    """Returns the largest size up to `size` at which a text fits the width; None if none does."""
    for smaller in range(size, SMALLEST - 1, -1):
        if measure(text, smaller, bold) + smaller <= width:
            return smaller
    return None


def measure(text: str, size: int, bold: bool = False) -> float:
    """Returns the width of a text in pixels."""
    return sum(font.getlength(part) for part, font in _runs(text, size, bold))


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    *,
    fill: tuple[int, ...],
    bold: bool = False,
    anchor: str = "lm",
) -> None:
    """Writes a text.

    Args:
        draw: The image to write into.
        place: Pixels from the left and from the top.
        text: One line, whose letters have fonts, see `writable`; others become boxes.
        size: Height of the letters in pixels.
        fill: Colour.
        bold: Prefers bold letters.
        anchor: Of Pillow: `lm`, the place is the middle of the left end; `mm`, the middle;
            `la`, the upper left corner.
    """
    runs, (left, top) = _runs(text, size, bold), place
    if len(runs) > 1 and anchor[0] == "m":
        left, anchor = left - measure(text, size, bold) / 2, f"l{anchor[1]}"
    for part, font in runs:
        draw.text((left, top), part, fill=fill, font=font, anchor=anchor)
        left += font.getlength(part)


def writable(names: Sequence[str], indices: Sequence[int]) -> list[str]:
    """Returns class names, with its number in place of a name that no font here can write.

    Args:
        names: The class names.
        indices: The classes whose names are written; a warning lists their numbers.
    """
    shown = list(names)
    lacking = [i for i in indices if not all(_find(word, True) for word in names[i].split())]
    for index in lacking:
        shown[index] = str(index)
    if lacking:
        legend = ", ".join(f"{index} is {names[index]}" for index in lacking)
        _warn(
            f"overlay: no font here has the letters of some names, so the labels' numbers are "
            f"drawn: {legend}; to see the names, install a font such as Noto Sans"
        )
    return shown


@functools.cache
def _warn(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def _runs(text: str, size: int, bold: bool) -> list[Run]:
    """Divides a text into parts, of words with the same font."""
    parts: list[tuple[str, FontFile]] = []
    for word in text.split(" "):
        file = _find(word, bold) or _own_font(bold)
        if parts and parts[-1][1] == file:
            parts[-1] = f"{parts[-1][0]} {word}", file
        else:
            parts.append((f" {word}" if parts else word, file))
    return [(part, _load(file, size)) for part, file in parts]


@functools.lru_cache(maxsize=256)
def _load(file: FontFile, size: int) -> ImageFont.FreeTypeFont:
    path, index = file
    return ImageFont.truetype(path, size, index)


@functools.cache
def _own_font(bold: bool) -> FontFile:
    """Returns DejaVu Sans, which is part of matplotlib and has accents, Greek and Cyrillic."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return f"{matplotlib.get_data_path()}/fonts/ttf/{name}", 0


@functools.lru_cache(maxsize=4096)
def _find(word: str, bold: bool) -> FontFile | None:
    """Finds a font with all letters of a word."""
    letters = {x for x in word if unicodedata.category(x) != "Cf" and not x.isspace()}
    if any(_is_shaped(letter) for letter in letters) and not features.check("raqm"):
        return None  # Pillow would write them one by one, from the left
    if letters <= _letters(_own_font(bold)):
        return _own_font(bold)
    return next((file for file in _candidates(letters) if letters <= _letters(file)), None)


def _is_shaped(letter: str) -> bool:
    """Returns whether a letter is written from the right, or joins the one before."""
    right_to_left = unicodedata.bidirectional(letter) in ("R", "AL")
    return right_to_left or unicodedata.category(letter) in ("Mn", "Mc")


def _candidates(letters: set[str]) -> Iterator[FontFile]:
    """Yields the system's fonts that may have the letters: fontconfig's choice, or all."""
    if shutil.which(FONTCONFIG):
        numbers = " ".join(f"{ord(letter):x}" for letter in sorted(letters))
        pattern = f"sans:bold:charset={numbers}"
        command = [FONTCONFIG, "--format=%{file}\n%{index}", pattern]
        found = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        if len(found) == 2 and found[1].isdecimal():
            yield found[0], int(found[1])
        return
    from matplotlib import font_manager

    for path in sorted(font_manager.findSystemFonts()):
        if PLACEHOLDERS not in path:
            yield path, 0


@functools.lru_cache(maxsize=64)
def _letters(file: FontFile) -> frozenset[str]:
    """Returns the letters that a font has; none if it cannot be read or scaled."""
    from matplotlib.ft2font import FT2Font

    try:
        _load(file, SMALLEST)
        return frozenset(map(chr, FT2Font(file[0]).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
