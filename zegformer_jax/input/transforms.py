"""Resizing and training augmentation, on tensors inside tf.data.

Pictures are uint8 RGB [h, w, 3]; labels are integers [h, w]. Random functions take their random
numbers as arguments, so that an example's augmentation is a function of its seed alone.
"""

from collections.abc import Sequence

import tensorflow as tf

PAD_VALUE = 128  # grey levels, outside a training picture

# SSD's colour jitter (Liu et al., arXiv 1512.02325).
JITTER_PROBABILITY = 0.5
MAX_BRIGHTNESS = 32.0  # grey levels to either side
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
MAX_HUE = 18  # to either side, in OpenCV's units: 180 make a full turn
HUES = 180

FLIP_PROBABILITY = 0.5
NUM_RANDOM = 13  # uniform numbers that one training example takes


def resized_sides(
    height: tf.Tensor, width: tf.Tensor, short_side: tf.Tensor, max_long_side: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sides after scaling the shorter one to `short_side`, the longer at most `max_long_side`.

    Args:
      height: int scalar, pixels.
      width: int scalar, pixels.
      short_side: int scalar, the wished shorter side.
      max_long_side: where the longer side would exceed it, it becomes this.

    Returns:
      int32 (height, width), each `int(x + 0.5)` of the exact side x, at least 1.
    """
    height, width = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
    scale = tf.cast(short_side, tf.float64) / tf.minimum(height, width)
    height, width = height * scale, width * scale
    shrink = tf.minimum(tf.cast(max_long_side, tf.float64) / tf.maximum(height, width), 1.0)
    sides = [tf.maximum(tf.cast(side * shrink + 0.5, tf.int32), 1) for side in (height, width)]
    return sides[0], sides[1]


def resize_image(
    image_hw3: tf.Tensor, size: tf.Tensor, window: tuple[tf.Tensor, ...] | None = None
) -> tf.Tensor:
    """Resizes as Pillow's bilinear does: triangle filter, antialiased when shrinking.

    Args:
      image_hw3: uint8 [h, w, 3].
      size: int32 [2], the new height and width.
      window: (top, left, height, width) in the resized picture: only this part is computed and
        returned. None: all of it.

    Returns:
      uint8 [H, W, 3], or the window; within one grey level of Pillow.
    """
    top, left, out_height, out_width = window if window is not None else (0, 0, size[0], size[1])
    scale = tf.cast(size, tf.float32) / tf.cast(tf.shape(image_hw3)[:2], tf.float32)
    resized = tf.raw_ops.ScaleAndTranslate(
        images=image_hw3[None],
        size=tf.stack([out_height, out_width]),
        scale=scale,
        translation=-tf.cast(tf.stack([top, left]), tf.float32),
        kernel_type="triangle",
        antialias=True,
    )
    return tf.cast(tf.clip_by_value(resized[0] + 0.5, 0.0, 255.0), tf.uint8)


def resize_label(
    label_hw: tf.Tensor, size: tf.Tensor, window: tuple[tf.Tensor, ...] | None = None
) -> tf.Tensor:
    """Resizes as Pillow's nearest does: output pixel i takes `floor((i + 0.5) * in / out)`.

    Computed in whole numbers; where a centre falls exactly between two pixels, Pillow's own sum of
    floating-point steps may take the other one.

    Args:
      label_hw: integers [h, w].
      size: int32 [2], the new height and width.
      window: as in `resize_image`.

    Returns:
      Integers [H, W] of the same type, or the window.
    """
    top, left, out_height, out_width = window if window is not None else (0, 0, size[0], size[1])
    rows = _nearest(tf.shape(label_hw)[0], size[0], top, out_height)
    columns = _nearest(tf.shape(label_hw)[1], size[1], left, out_width)
    return tf.gather(tf.gather(label_hw, rows), columns, axis=1)


def _nearest(in_side: tf.Tensor, out_side: tf.Tensor, start: tf.Tensor, count: tf.Tensor):
    places = tf.cast(tf.range(start, start + count), tf.int64)
    numerator = (2 * places + 1) * tf.cast(in_side, tf.int64)
    return numerator // (2 * tf.cast(out_side, tf.int64))


def colour_jitter(image_hw3: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """SSD's colour jitter, step by step on uint8 as the published system does it.

    Brightness (plus or minus at most 32); then contrast before, or after, saturation and hue; each
    of the four with probability one half. Values are clipped to 0..255 and cut to whole numbers
    after each step; hue and saturation are OpenCV's (hue in 0..179, saturation in 0..255).

    Args:
      image_hw3: uint8 RGB [h, w, 3].
      uniform: float32 [9] in [0, 1): whether and how much for brightness, contrast, saturation
        and hue, and at index 2 the coin for contrast first.

    Returns:
      uint8 RGB [h, w, 3].
    """
    chance = [uniform[i] < JITTER_PROBABILITY for i in range(9)]
    brightness = MAX_BRIGHTNESS * (2 * uniform[1] - 1)
    contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * uniform[4]
    saturation = SATURATION[0] + (SATURATION[1] - SATURATION[0]) * uniform[6]
    hue = tf.cast(tf.floor(uniform[8] * (2 * MAX_HUE + 1)), tf.int32) - MAX_HUE

    def change_contrast(image, when):
        return tf.cond(chance[3] & when, lambda: _linear(image, contrast, 0.0), lambda: image)

    image = image_hw3
    image = tf.cond(chance[0], lambda: _linear(image, 1.0, brightness), lambda: image)
    image = change_contrast(image, chance[2])
    saturated = tf.cond(chance[5], lambda: change_saturation(image, saturation), lambda: image)
    hued = tf.cond(chance[7], lambda: change_hue(saturated, hue), lambda: saturated)
    return change_contrast(hued, ~chance[2])


def _linear(values: tf.Tensor, gain: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    changed = tf.cast(values, tf.float32) * gain + offset
    return tf.cast(tf.clip_by_value(changed, 0.0, 255.0), tf.uint8)


def change_saturation(image_hw3: tf.Tensor, gain: tf.Tensor) -> tf.Tensor:
    """Multiplies OpenCV's 8-bit saturation by `gain`; uint8 RGB [h, w, 3] in and out."""
    hue, saturation, value = _to_hsv(image_hw3)
    saturation = tf.floor(tf.clip_by_value(saturation * gain, 0.0, 255.0))
    return _to_rgb(hue, saturation, value)


def change_hue(image_hw3: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
    """Adds `turn` (int, 180 a full turn) to OpenCV's 8-bit hue; uint8 RGB [h, w, 3] in and out."""
    hue, saturation, value = _to_hsv(image_hw3)
    return _to_rgb(tf.math.floormod(hue + tf.cast(turn, tf.float32), HUES), saturation, value)


def _to_hsv(image_hw3: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """OpenCV's 8-bit HSV as whole float32 numbers [h, w]: hue 0..179, the others 0..255."""
    hsv = tf.image.rgb_to_hsv(tf.cast(image_hw3, tf.float32) / 255)
    hue, saturation, value = tf.unstack(hsv, axis=-1)
    hue = tf.math.floormod(tf.floor(hue * HUES + 0.5), HUES)
    return hue, tf.floor(saturation * 255 + 0.5), tf.floor(value * 255 + 0.5)


def _to_rgb(hue: tf.Tensor, saturation: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    hsv = tf.stack([hue / HUES, saturation / 255, value / 255], axis=-1)
    return tf.cast(tf.image.hsv_to_rgb(hsv) * 255 + 0.5, tf.uint8)


def augment(
    image_hw3: tf.Tensor,
    label_hw: tf.Tensor,
    uniform: tf.Tensor,
    *,
    crop_size: int,
    short_sides: Sequence[int],
    max_long_side: int,
    ignore_label: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Training augmentation: resize, crop, colour jitter, flip, pad (the published order).

    Args:
      image_hw3: uint8 RGB [h, w, 3].
      label_hw: integers [h, w].
      uniform: float32 [NUM_RANDOM] in [0, 1), the only source of randomness.
      crop_size: side s of the result.
      short_sides: the shorter side is drawn from these.
      max_long_side: limit of the longer side after resizing.
      ignore_label: padding of the label.

    Returns:
      image uint8 [s, s, 3], padded at the bottom and right with 128, and label [s, s].
    """
    choice = tf.cast(uniform[0] * len(short_sides), tf.int32)
    short_side = tf.gather(tf.constant(short_sides, tf.int32), choice)
    in_shape = tf.shape(image_hw3)
    size = tf.stack(resized_sides(in_shape[0], in_shape[1], short_side, max_long_side))
    crop_hw = tf.minimum(size, crop_size)
    free = tf.cast(size - crop_hw + 1, tf.float32)
    corner = tf.minimum(tf.cast(uniform[1:3] * free, tf.int32), size - crop_hw)
    window = (corner[0], corner[1], crop_hw[0], crop_hw[1])
    image = colour_jitter(resize_image(image_hw3, size, window), uniform[3:12])
    label = resize_label(label_hw, size, window)
    flip = uniform[12] < FLIP_PROBABILITY
    image = tf.cond(flip, lambda: image[:, ::-1], lambda: image)
    label = tf.cond(flip, lambda: label[:, ::-1], lambda: label)
    rest = crop_size - crop_hw
    padding = [[0, rest[0]], [0, rest[1]]]
    image = tf.pad(image, [*padding, [0, 0]], constant_values=PAD_VALUE)
    label = tf.pad(label, padding, constant_values=tf.cast(ignore_label, label.dtype))
    image = tf.ensure_shape(image, (crop_size, crop_size, 3))
    return image, tf.ensure_shape(label, (crop_size, crop_size))
