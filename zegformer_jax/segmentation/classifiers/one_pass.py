"""Segment classifier: one pass of CLIP over the whole image."""

from typing import Any

import jax
import jax.numpy as jnp

from zegformer_jax.models.clip.model import CLIP
from zegformer_jax.segmentation.classifiers.crops import resample
from zegformer_jax.segmentation.resize import (
    EXACT,
    apply_matrices,
    padded_resize_matrix,
    resize_matrix,
)
from zegformer_jax.segmentation.segments import inside

ONE_PASS = "one_pass"  # a way to show segments to CLIP, without crops


def encode_in_one_pass(
    clip: CLIP,
    clip_params: Any,
    image_hwc: jax.Array,
    size: jax.Array,
    mask_logits_qhw: jax.Array,
    layers: int,
) -> jax.Array:
    """CLIP's features of every segment from one look at the whole picture, [Q, D].

    The picture is squeezed into CLIP's square; see `VisionTransformer` for how segments are told
    apart there (Ding et al., "Open-Vocabulary Universal Image Segmentation with MaskCLIP", 2023).

    Args:
        clip: the module.
        clip_params: its parameters.
        image_hwc: normalised and then padded [H, W, 3].
        size: int [2], before padding.
        mask_logits_qhw: [Q, H/4, W/4].
        layers: of CLIP's image tower, the last ones, in which segments are told apart.
    """
    side, grid = clip.config.image_size, clip.config.grid_size
    square_ssc, coverage_qgg = whole_picture(image_hwc, mask_logits_qhw, size, side, grid)
    return clip.apply(
        {"params": clip_params},
        square_ssc[None],
        coverage_qgg.reshape(1, len(mask_logits_qhw), -1),
        layers,
        method=CLIP.encode_segments,
    )[0]


def whole_picture(
    image_hwc: jax.Array, mask_logits_qhw: jax.Array, size: jax.Array, side: int, grid: int
) -> tuple[jax.Array, jax.Array]:
    """Squeezes a picture into CLIP's square, and says where in it each segment is.

    Args:
        image_hwc: as for ``segment_images``.
        mask_logits_qhw: as for ``segment_images``.
        size: int32 [2], rows and columns before padding; may be traced.
        side: of the square in pixels.
        grid: patches on its side.

    Returns:
        the square, float32 [side, side, 3]; the share of each patch that is in each segment,
        float32 [q, grid, grid] in [0, 1].
    """
    image_hwc = image_hwc.astype(jnp.float32)
    height, width, _ = image_hwc.shape
    rows_sh = padded_resize_matrix(size[0], side, height, side)
    columns_sw = padded_resize_matrix(size[1], side, width, side)
    _, mask_height, mask_width = mask_logits_qhw.shape
    # Both resizings at once, so that no mask is held at the picture's size.
    rows_sm = jnp.matmul(rows_sh, resize_matrix(mask_height, height), precision=EXACT)
    columns_sm = jnp.matmul(columns_sw, resize_matrix(mask_width, width), precision=EXACT)
    inside_qss = inside(apply_matrices(rows_sm, columns_sm, mask_logits_qhw.astype(jnp.float32)))
    patch = side // grid
    patches = inside_qss.reshape(-1, grid, patch, grid, patch).astype(jnp.float32)
    return resample(rows_sh, columns_sw, image_hwc), patches.mean((2, 4))
