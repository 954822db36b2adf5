"""Segment classifier: one pass of CLIP over the image, with one token per segment.

In the last layers a segment's token attends to that segment's patches only.

Ding et al., "Open-Vocabulary Universal Image Segmentation with MaskCLIP", 2023. Far less work than
a crop per segment; results differ from the published system's.

Axes: q query, h w pixels, c colour or class, s t sides of CLIP's input, p patch, g side of the
grid of patches, d joint embedding.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from zegformer_jax.models.clip.model import CLIP, CLIP_MEAN, CLIP_STD
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.segmentation.augmentation import View
from zegformer_jax.segmentation.class_scores import clip_logits
from zegformer_jax.segmentation.resize import (
    EXACT,
    apply_matrices,
    padded_resize_matrix,
    resample,
    resize_matrix,
)
from zegformer_jax.segmentation.segments import inside


@dataclass(frozen=True)
class OnePass:
    """One pass of CLIP over the image, resized to CLIP's square input.

    Attributes:
        clip: The Flax module; its image tower is a ViT.
        one_pass_layers: Number of the tower's last layers in which the segments are apart.

    Raises:
        UserError: CLIP's image tower is no ViT.
    """

    clip: CLIP
    one_pass_layers: int = 4

    def __post_init__(self):
        """Checks the image tower."""
        if self.clip.config.is_resnet:
            raise UserError("eval.segment_classifier 'one_pass': needs a CLIP with a ViT")

    def __call__(
        self,
        params: Any,
        view: View,
        mask_logits_qhw: jax.Array,
        text_cd: jax.Array,
        wanted_q: jax.Array,
    ) -> jax.Array:
        """Returns class logits, float32 [q, c]; see `SegmentClassifier`.

        All queries take part in the one pass, whatever `wanted_q` says.
        """
        del wanted_q
        images_bhwc = normalise_images(view.image_hwc[None], view.size[None], CLIP_MEAN, CLIP_STD)
        features_qd = encode_in_one_pass(
            self.clip, params, images_bhwc[0], view.size, mask_logits_qhw, self.one_pass_layers
        )
        return clip_logits(features_qd, text_cd, self.logit_scale(params))

    def logit_scale(self, params: Any) -> jax.Array:
        """Returns the logarithm of the largest possible logit, scalar."""
        return params["logit_scale"]


def encode_in_one_pass(
    clip: CLIP,
    params: Any,
    image_hwc: jax.Array,
    size: jax.Array,
    mask_logits_qhw: jax.Array,
    layers: int,
) -> jax.Array:
    """Returns CLIP's features of every segment, [q, d].

    Args:
        clip: The Flax module.
        params: Its parameters.
        image_hwc: float [h, w, 3], normalised with CLIP's mean and standard deviation and then
            padded with zeros at the bottom and right.
        size: int [2], rows and columns before padding; may be traced.
        mask_logits_qhw: float [q, h / 4, w / 4].
        layers: Number of the image tower's last layers in which the segments are apart.
    """
    side, grid = clip.config.image_size, clip.config.grid_size
    square_stc, coverage_qgg = squeeze(image_hwc, mask_logits_qhw, size, side, grid)
    coverage_qp = coverage_qgg.reshape(len(mask_logits_qhw), -1)
    return clip.apply(
        {"params": params}, square_stc[None], coverage_qp[None], layers, method=CLIP.encode_segments
    )[0]


def squeeze(
    image_hwc: jax.Array, mask_logits_qhw: jax.Array, size: jax.Array, side: int, grid: int
) -> tuple[jax.Array, jax.Array]:
    """Resizes an image to CLIP's square and computes which patches each segment covers.

    Args:
        image_hwc: float [h, w, 3], zero in the padding.
        mask_logits_qhw: float [q, h / 4, w / 4].
        size: int32 [2], rows and columns before padding; may be traced.
        side: Side of the square in pixels.
        grid: Patches on its side.

    Returns:
        The square, float32 [side, side, 3], and the share of each patch that is in each segment,
        float32 [q, grid, grid] in [0, 1].
    """
    image_hwc = image_hwc.astype(jnp.float32)
    height, width, _ = image_hwc.shape
    rows_sh = padded_resize_matrix(size[0], side, height, side)
    columns_tw = padded_resize_matrix(size[1], side, width, side)
    _, mask_height, mask_width = mask_logits_qhw.shape
    # Both resizes in one matrix, so no mask is held at the image's size.
    rows_sm = jnp.matmul(rows_sh, resize_matrix(mask_height, height), precision=EXACT)
    columns_tm = jnp.matmul(columns_tw, resize_matrix(mask_width, width), precision=EXACT)
    inside_qst = inside(apply_matrices(rows_sm, columns_tm, mask_logits_qhw.astype(jnp.float32)))
    patch = side // grid
    patches = inside_qst.reshape(-1, grid, patch, grid, patch).astype(jnp.float32)
    return resample(rows_sh, columns_tw, image_hwc), patches.mean((2, 4))
