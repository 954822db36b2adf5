"""Views of an image: as it is, at other sizes, mirrored (test-time augmentation).

Axes: h w pixels, c colour.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class View(NamedTuple):
    """One view of an image, as the models take it.

    Attributes:
        image_hwc: RGB 0..255 [H, W, 3], padded at the bottom and right to multiples of 32.
        size: int [2], height and width before padding; may be traced.
        mirrored: Static; True if mirrored left-right.
    """

    image_hwc: jax.Array
    size: jax.Array
    mirrored: bool = False


def make_views(images: Sequence[tuple[jax.Array, jax.Array]], mirrored_too: bool) -> list[View]:
    """Returns the views that are averaged; the first is the plain one.

    Args:
        images: The image at one or more sizes: padded pixels [H, W, 3] and int [2], the height
            and width before padding.
        mirrored_too: Whether each is also seen mirrored.
    """
    views = [View(*image) for image in images]
    if mirrored_too:
        views += [View(mirror(image, size), size, True) for image, size in images]
    return views


def mirror(image_hwc: jax.Array, size: jax.Array) -> jax.Array:
    """Returns a padded image with its columns from right to left; the padding stays in place.

    Args:
        image_hwc: [H, W, 3], padded at the bottom and right.
        size: int [2], height and width before padding; may be traced.
    """
    return image_hwc[:, mirrored_columns(image_hwc.shape[1], size[1])]


def mirrored_columns(length: int, width: jax.Array) -> jax.Array:
    """Returns int32 [length]: the columns 0..width-1 in reverse order, then the others.

    Args:
        length: Number of columns, padding included.
        width: Number of columns before padding, scalar; may be traced.
    """
    columns = jnp.arange(length)
    return jnp.where(columns < width, width - 1 - columns, columns)
