"""Segment classifier of the paper: CLIP sees one crop per segment (section 3.3).

Axes: q query, n segments at once, h w pixels, c colour or class, s t crop sides, d joint embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from zegformer_jax.models.clip.model import CLIP, CLIP_MEAN, CLIP_STD
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.target import target_device
from zegformer_jax.segmentation.augmentation import View
from zegformer_jax.segmentation.class_scores import clip_logits
from zegformer_jax.segmentation.resize import (
    apply_matrices,
    resample,
    resize_matrix,
    upsample_masks,
)
from zegformer_jax.segmentation.roi_align import roi_align_matrix
from zegformer_jax.segmentation.segments import boxes_from_masks, inside

STYLES = ("cropmask", "crop", "mask")  # the first is the default
CHUNK = 25  # segments that CLIP encodes at once
CHUNK_ON = {"cpu": 4}  # small chunks fit a CPU's cache: more than twice as fast
EMPTY = -100.0  # mask logit of an empty segment; no interpolation makes it positive


@dataclass(frozen=True)
class Crops:
    """CLIP on the crop of each segment.

    Attributes:
        clip: The Flax module.
        crop_style: How a segment is shown: `cropmask` blanks what is outside it and crops to
            its box, `crop` only crops, `mask` blanks and resizes the whole image.
        clip_chunk: Segments that are encoded at once; 0: a number that suits the device.

    Raises:
        UserError: The style is unknown or the chunk negative.
    """

    clip: CLIP
    crop_style: str = STYLES[0]
    clip_chunk: int = 0

    def __post_init__(self):
        """Checks the fields."""
        if self.crop_style not in STYLES:
            raise UserError(
                f"eval.crop_style '{self.crop_style}': choose one of {', '.join(STYLES)}"
            )
        if self.clip_chunk < 0:
            raise UserError(f"eval.clip_chunk {self.clip_chunk}: give a number of segments, or 0")

    def __call__(
        self,
        params: Any,
        view: View,
        mask_logits_qhw: jax.Array,
        text_cd: jax.Array,
        wanted_q: jax.Array,
    ) -> jax.Array:
        """Returns class logits, float32 [q, c]; see `SegmentClassifier`."""
        images_bhwc = normalise_images(view.image_hwc[None], view.size[None], CLIP_MEAN, CLIP_STD)
        features_qd = segment_features(
            lambda crops: self.clip.apply({"params": params}, crops, method=CLIP.encode_image),
            images_bhwc[0],
            mask_logits_qhw,
            style=self.crop_style,
            side=self.clip.config.image_size,
            chunk=self.clip_chunk or CHUNK_ON.get(target_device().platform, CHUNK),
            wanted_q=wanted_q,
        )
        return clip_logits(features_qd, text_cd, self.logit_scale(params))

    def logit_scale(self, params: Any) -> jax.Array:
        """Returns the logarithm of the largest possible logit, scalar."""
        return params["logit_scale"]


def segment_features(
    encode_images: Callable[[jax.Array], jax.Array],
    image_hwc: jax.Array,
    mask_logits_qhw: jax.Array,
    *,
    style: str = STYLES[0],
    side: int = 224,
    chunk: int = CHUNK,
    wanted_q: jax.Array | None = None,
) -> jax.Array:
    """Returns CLIP's features of the segments, [q, d] in the encoder's dtype, not normalised.

    Crops are made, encoded and dropped a chunk at a time, so memory does not grow with the number
    of queries. Empty segments share one encoding. Every chunk has the same size, so a feature's
    bits do not depend on the other segments.

    Args:
        encode_images: Maps float32 [n, side, side, 3] to float [n, d].
        image_hwc: float [h, w, 3], normalised with CLIP's mean and standard deviation and then
            padded with zeros at the bottom and right.
        mask_logits_qhw: float [q, h / 4, w / 4], or coarser.
        style: One of `STYLES`, see `Crops`.
        side: Side of CLIP's input in pixels.
        chunk: Number of segments encoded at once, at least 1.
        wanted_q: bool [q]; the others get the features of an empty segment. None: all are wanted.
    """
    chunk = min(chunk, len(mask_logits_qhw))
    # Where no logit is positive, none becomes so between pixels: such a segment is empty.
    shown_q = (mask_logits_qhw > 0).any((1, 2))
    shown_q = shown_q if wanted_q is None else shown_q & wanted_q

    def encode(index_n: jax.Array) -> jax.Array:
        shown_n = jnp.take(shown_q, index_n, mode="fill", fill_value=False)
        masks_nhw = jnp.take(mask_logits_qhw, index_n, axis=0, mode="clip")
        masks_nhw = jnp.where(shown_n[:, None, None], masks_nhw, EMPTY)
        return encode_images(segment_images(image_hwc, masks_nhw, style=style, side=side))

    first_empty = jnp.argmin(shown_q)  # 0 where there is none, and then not used
    index_q = jnp.arange(len(shown_q))
    features_qd = _map_chosen(encode, shown_q | (index_q == first_empty), chunk)
    return features_qd[jnp.where(shown_q, index_q, first_empty)]


def _map_chosen(
    function: Callable[[jax.Array], jax.Array], chosen_q: jax.Array, chunk: int
) -> jax.Array:
    """Applies a function to the chosen queries in full chunks; the others' results are zeros.

    The function takes indices, int32 [chunk]; indices from q on are padding.
    """
    queries = len(chosen_q)
    length = -(-queries // chunk) * chunk
    order_q = jnp.argsort(~chosen_q, stable=True)
    order = jnp.full(length, queries, jnp.int32).at[:queries].set(order_q)

    def apply(index: jax.Array) -> jax.Array:
        return function(jax.lax.dynamic_slice_in_dim(order, index * chunk, chunk))

    def add(index: jax.Array, results: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(results, apply(index), index * chunk, axis=0)

    one = jax.eval_shape(apply, jnp.int32(0))
    results = jnp.zeros((length, *one.shape[1:]), one.dtype)
    chunks, most = -(-chosen_q.sum() // chunk), length // chunk

    def is_left(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0] < chunks) & (state[0] < most)  # the constant tells estimates the length

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state[0] + 1, add(*state)

    _, results = jax.lax.while_loop(is_left, step, (jnp.int32(0), results))
    place_q = jnp.zeros(queries, jnp.int32).at[order_q].set(jnp.arange(queries, dtype=jnp.int32))
    return results[place_q]


def segment_images(
    image_hwc: jax.Array, mask_logits_qhw: jax.Array, *, style: str = STYLES[0], side: int = 224
) -> jax.Array:
    """Returns CLIP's input for each segment, float32 [q, side, side, 3].

    Holds float32 copies [q, h, w, 3] of the image: pass few queries at a time.

    Args:
        image_hwc: float [h, w, 3], normalised with CLIP's mean and standard deviation and then
            padded with zeros at the bottom and right.
        mask_logits_qhw: float [q, h / 4, w / 4], or coarser.
        style: One of `STYLES`, see `Crops`.
        side: Side of the result in pixels.
    """
    image_hwc = image_hwc.astype(jnp.float32)
    height, width, _ = image_hwc.shape
    logits_qyx = upsample_masks(mask_logits_qhw, height, width)
    if style == "mask":
        rows_sh, columns_sw = resize_matrix(height, side), resize_matrix(width, side)
        segments_qst = inside(apply_matrices(rows_sh, columns_sw, logits_qyx))
        return resample(rows_sh, columns_sw, image_hwc)[None] * segments_qst[..., None]

    segments_qyx = inside(logits_qyx)
    left, top, right, bottom = jnp.unstack(boxes_from_masks(segments_qyx), axis=-1)
    rows_qsh = jax.vmap(lambda a, b: roi_align_matrix(a, b, height, side))(top, bottom)
    columns_qsw = jax.vmap(lambda a, b: roi_align_matrix(a, b, width, side))(left, right)
    if style == "crop":
        return jax.vmap(resample, in_axes=(0, 0, None))(rows_qsh, columns_qsw, image_hwc)
    segment_images_qhwc = image_hwc[None] * segments_qyx[..., None]
    return jax.vmap(resample)(rows_qsh, columns_qsw, segment_images_qhwc)
