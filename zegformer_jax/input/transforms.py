"""Resizing and training augmentation, as the published system computes them: Pillow and OpenCV.

Images are uint8 RGB [h, w, 3]; labels are integers [h, w]. Random functions take their random
numbers as arguments, so that an image's augmentation is a function of its seed alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from zegformer_jax.runtime.errors import UserError

PAD_VALUE = 128  # grey level outside a training image
PAD_MULTIPLE = 32  # of the grouper's input sides: the backbone's largest stride
BITS_OF_SIDES = 3  # leading bits of a label map's padded side: four sizes per octave

# SSD's colour jitter (Liu et al., arXiv 1512.02325).
JITTER_PROBABILITY = 0.5
MAX_BRIGHTNESS = 32.0  # grey levels to either side
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
MAX_HUE = 18  # to either side, in OpenCV's units: 180 make a full turn
HUES = 180

FLIP_PROBABILITY = 0.5
NUM_RANDOM = 13  # uniform numbers that augment one image
LEVELS = np.arange(256)

cv2.setNumThreads(1)  # images are processed in parallel already


class Window(NamedTuple):
    """A part of an image: its first row and column, its height and width, in pixels."""

    top: int
    left: int
    height: int
    width: int


def resized_sides(height: int, width: int, short_side: int, max_long_side: int) -> tuple[int, int]:
    """Computes the sides after scaling the shorter one to `short_side`.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        short_side: The new shorter side, unless the longer one would exceed its limit.
        max_long_side: Limit of the longer side.

    Returns:
        (height, width), each `int(x + 0.5)` of the exact side x, at least 1.

    Raises:
        UserError: `short_side` or `max_long_side` is not an integer above 0.
    """
    for name, side in (("short side", short_side), ("longest side", max_long_side)):
        if not isinstance(side, int | np.integer) or side < 1:
            raise UserError(f"{name} of images {side!r}: give an integer above 0, in pixels")
    scale = float(short_side) / min(height, width)
    height, width = height * scale, width * scale
    shrink = min(max_long_side / max(height, width), 1.0)
    return max(int(height * shrink + 0.5), 1), max(int(width * shrink + 0.5), 1)


def padded_sides(height: int, width: int) -> tuple[int, int]:
    """Rounds the sides up to multiples of `PAD_MULTIPLE`, the grouper's input size."""
    return tuple(-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in (height, width))


def label_sides(height: int, width: int) -> tuple[int, int]:
    """Rounds the sides up to one of few sizes, at which label maps are computed.

    The sizes are multiples of `PAD_MULTIPLE`, or of an eighth of the next power of two if that is
    more: a program is compiled for each, and data sets have images of all sizes.
    """
    return tuple(_round_up(side) for side in (height, width))


def _round_up(side: int) -> int:
    step = max(PAD_MULTIPLE, 1 << max((side - 1).bit_length() - BITS_OF_SIDES, 0))
    return -(-side // step) * step


def resize_image(
    image_hw3: np.ndarray, size: tuple[int, int], window: Window | None = None
) -> np.ndarray:
    """Resizes an image by Pillow's bilinear filter, which is antialiased when shrinking.

    Args:
        image_hw3: uint8 [h, w, 3].
        size: The new height and width.
        window: Part of the resized image to compute and return; None: all of it.

    Returns:
        uint8 [H, W, 3], or the window.
    """
    top, left, height, width = window or Window(0, 0, *size)
    rows, columns = (old / new for old, new in zip(image_hw3.shape, size, strict=False))
    # The filter at the outermost pixels also reads pixels outside the box.
    box = (left * columns, top * rows, (left + width) * columns, (top + height) * rows)
    box = np.minimum(box, image_hw3.shape[1::-1] * 2)  # rounding may exceed the image
    image = Image.fromarray(image_hw3)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, tuple(box)))


def resize_label(
    label_hw: np.ndarray, size: tuple[int, int], window: Window | None = None
) -> np.ndarray:
    """Resizes a label map like Pillow's nearest: pixel i takes `floor((i + 0.5) * in / out)`.

    The indices are computed in integers; if a centre is exactly between two pixels, Pillow's
    floating-point sum may take the other one.

    Args:
        label_hw: Integers [h, w].
        size: The new height and width.
        window: Part of the resized label map to compute and return; None: all of it.

    Returns:
        Integers [H, W] of the same type, or the window.
    """
    top, left, height, width = window or Window(0, 0, *size)
    rows = _nearest(label_hw.shape[0], size[0], top, height)
    columns = _nearest(label_hw.shape[1], size[1], left, width)
    return label_hw[rows][:, columns]


def _nearest(in_side: int, out_side: int, start: int, count: int) -> np.ndarray:
    return (2 * np.arange(start, start + count) + 1) * in_side // (2 * out_side)


def colour_jitter(image_hw3: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Applies SSD's colour jitter, step by step on uint8 like the published system.

    Brightness (plus or minus at most 32); then contrast before, or after, saturation and hue; each
    of the four with probability one half. Values are clipped to 0..255 and truncated to integers
    after each step; hue and saturation are OpenCV's (hue in 0..179, saturation in 0..255).

    Args:
        image_hw3: uint8 RGB [h, w, 3].
        uniform: float [9] in [0, 1): probability and amount of brightness, contrast, saturation and
            hue; index 2 decides if contrast comes first.

    Returns:
        uint8 RGB [h, w, 3].
    """
    chance = uniform < JITTER_PROBABILITY
    brightness = MAX_BRIGHTNESS * (2 * uniform[1] - 1)
    contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * uniform[4]
    saturation = SATURATION[0] + (SATURATION[1] - SATURATION[0]) * uniform[6]
    hue = int(uniform[8] * (2 * MAX_HUE + 1)) - MAX_HUE
    image = image_hw3
    if chance[0]:
        image = _linear(image, 1.0, brightness)
    if chance[3] and chance[2]:
        image = _linear(image, contrast, 0.0)
    if chance[5]:
        image = change_saturation(image, saturation)
    if chance[7]:
        image = change_hue(image, hue)
    if chance[3] and not chance[2]:
        image = _linear(image, contrast, 0.0)
    return image


def _linear(image_hw3: np.ndarray, gain: float, offset: float) -> np.ndarray:
    return cv2.LUT(image_hw3, np.clip(LEVELS * gain + offset, 0, 255).astype(np.uint8))


def change_saturation(image_hw3: np.ndarray, gain: float) -> np.ndarray:
    """Multiplies OpenCV's 8-bit saturation of a uint8 RGB image [h, w, 3] by `gain`."""
    return _change_hsv(image_hw3, 1, np.clip(LEVELS * gain, 0, 255))


def change_hue(image_hw3: np.ndarray, turn: int) -> np.ndarray:
    """Adds `turn` (180: a full turn) to OpenCV's 8-bit hue of a uint8 RGB image [h, w, 3]."""
    return _change_hsv(image_hw3, 0, (LEVELS + turn) % HUES)


def _change_hsv(image_hw3: np.ndarray, channel: int, new_values: np.ndarray) -> np.ndarray:
    """Maps one channel of OpenCV's 8-bit HSV by a table [256]."""
    table = np.stack([LEVELS, LEVELS, LEVELS], axis=-1)
    table[:, channel] = new_values
    hsv = cv2.LUT(cv2.cvtColor(image_hw3, cv2.COLOR_RGB2HSV), table.astype(np.uint8)[None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def augment(
    image_hw3: np.ndarray,
    label_hw: np.ndarray,
    uniform: np.ndarray,
    *,
    crop_size: int,
    short_sides: Sequence[int],
    max_long_side: int,
    ignore_label: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Augments a training image: resize, crop, colour jitter, flip, pad (the published order).

    Args:
        image_hw3: uint8 RGB [h, w, 3].
        label_hw: Integers [h, w].
        uniform: float [NUM_RANDOM] in [0, 1), the source of all randomness.
        crop_size: Side s of the result.
        short_sides: Lengths that the shorter side is drawn from.
        max_long_side: Limit of the longer side after resizing.
        ignore_label: Padding of the label.

    Returns:
        Image uint8 [s, s, 3], padded at the bottom and right with 128, and label [s, s].
    """
    short_side = short_sides[int(uniform[0] * len(short_sides))]
    size = resized_sides(*label_hw.shape, short_side, max_long_side)
    height, width = (min(side, crop_size) for side in size)
    top = int(uniform[1] * (size[0] - height + 1))
    left = int(uniform[2] * (size[1] - width + 1))
    window = Window(top, left, height, width)
    image = colour_jitter(resize_image(image_hw3, size, window), uniform[3:12])
    label = resize_label(label_hw, size, window)
    if uniform[12] < FLIP_PROBABILITY:
        image, label = image[:, ::-1], label[:, ::-1]
    padded_image = np.full((crop_size, crop_size, 3), PAD_VALUE, np.uint8)
    padded_label = np.full((crop_size, crop_size), ignore_label, label.dtype)
    padded_image[:height, :width], padded_label[:height, :width] = image, label
    return padded_image, padded_label
