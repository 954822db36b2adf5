"""Label images whose colours are the classes."""

import functools
from pathlib import Path

import numpy as np

from zegformer_jax.input import decoding
from zegformer_jax.input.unknown import UnknownValues
from zegformer_jax.text.vocabulary import Vocabulary


def read_label(path: Path, classes: Vocabulary) -> np.ndarray:
    """Reads a label image in colour.

    Args:
        path: Path of the label image.
        classes: Classes with their colours.

    Returns:
        Label map, uint8 or uint16 [h, w]: indices of classes, or their ignore label.

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UnknownValues: A colour is neither a class's nor ignored; the message starts with the path.
        UserError: The file is no label image; the message starts with the path.
    """
    colours_hw3 = decoding.decode_colours(decoding.read_file(path), path)
    codes_n, labels_n = _table(classes)
    codes_hw = _encode(colours_hw3)
    places_hw = np.searchsorted(codes_n, codes_hw).clip(max=len(codes_n) - 1)
    unknown = np.argwhere(codes_n[places_hw] != codes_hw)
    if len(unknown):
        row, column = unknown[0]
        colours = np.unique(colours_hw3[tuple(unknown.T)], axis=0).tolist()
        raise UnknownValues(
            f"{path}: colour {colours_hw3[row, column].tolist()} at row {row}, column {column} is "
            f"neither a class's nor ignored ({len(unknown)} such pixels)",
            map(tuple, colours),
        )
    return labels_n[places_hw]


@functools.lru_cache(maxsize=8)
def _table(classes: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes of all known colours, rising, and their labels."""
    colours = np.array([*classes.colours, *classes.ignored_colours], np.uint8)
    labels = np.full(len(colours), classes.ignore_label, classes.label_dtype)
    labels[: len(classes)] = np.arange(len(classes))
    codes = _encode(colours)
    order = np.argsort(codes)
    return codes[order], labels[order]


def _encode(colours: np.ndarray) -> np.ndarray:
    """Returns colours [..., 3] as one number each, int32."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue
