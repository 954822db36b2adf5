"""Views of an image for test-time augmentation."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from zegformer_jax.segmentation import label_maps


class Version(NamedTuple):
    """One version of a picture that the models see.

    Attributes:
        image_hwc: RGB 0..255 [H, W, 3], padded at the bottom and right to multiples of 32.
        size: int [2], height and width before padding.
        mirrored: whether the columns are from right to left.
    """

    image_hwc: jax.Array
    size: jax.Array
    mirrored: bool = False


def make_versions(picture: Mapping[str, jax.Array], mirrored_too: bool) -> list[Version]:
    """The versions of a picture that test-time augmentation averages; the first is the plain one.

    Args:
        picture: `image` and `size`, `image_1` and `size_1`, ..., a row of what
            `input.pipeline.eval_batches` gives.
        mirrored_too: whether each is also seen mirrored.
    """
    names = sorted(name for name in picture if name.startswith("image"))
    plain = [Version(picture[name], picture[name.replace("image", "size")]) for name in names]
    if not mirrored_too:
        return plain
    return plain + [Version(label_maps.mirror(x.image_hwc, x.size), x.size, True) for x in plain]
