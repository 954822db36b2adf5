"""Segment classifier: CLIP on one crop per segment.

Crops are made and encoded a few at a time, and none twice.

Axes: q query, h w pixels, c colour, s crop side, d joint embedding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from zegformer_jax.segmentation.resize import EXACT, apply_matrices, resize_matrix, upsample_masks
from zegformer_jax.segmentation.roi_align import roi_align_matrix
from zegformer_jax.segmentation.segments import boxes_from_masks, inside

STYLES = ("cropmask", "crop", "mask")  # the first is the default


def segment_images(
    image_hwc: jax.Array, mask_logits_qhw: jax.Array, *, style: str = STYLES[0], side: int = 224
) -> jax.Array:
    """Makes the CLIP input of each query's segment.

    Holds float32 copies [q, h, w, 3] of the image: pass few queries at a time, as
    ``segment_encoding.segment_features`` does.

    Args:
        image_hwc: float [h, w, 3], normalised with CLIP's mean and standard deviation and then
            padded with zeros at the bottom and right.
        mask_logits_qhw: float [q, h / 4, w / 4] (any lower resolution works).
        style: "cropmask" crops image x segment to the segment's box, "crop" crops the
            image, "mask" resizes the whole image and blanks what is outside the segment.
        side: side of the result in pixels.

    Returns:
        float32 [q, side, side, 3].

    Raises:
        ValueError: if ``style`` is unknown.
    """
    check_style(style)
    image_hwc = image_hwc.astype(jnp.float32)
    height, width, _ = image_hwc.shape
    segments_qyx = _segments(mask_logits_qhw, (height, width), style, side)
    if style == "mask":
        rows_sh, columns_sw = resize_matrix(height, side), resize_matrix(width, side)
        return resample(rows_sh, columns_sw, image_hwc)[None] * segments_qyx[..., None]

    left, top, right, bottom = jnp.unstack(boxes_from_masks(segments_qyx), axis=-1)
    rows_qsh = jax.vmap(lambda a, b: roi_align_matrix(a, b, height, side))(top, bottom)
    columns_qsw = jax.vmap(lambda a, b: roi_align_matrix(a, b, width, side))(left, right)
    if style == "crop":
        return jax.vmap(resample, in_axes=(0, 0, None))(rows_qsh, columns_qsw, image_hwc)
    segment_images_qhwc = image_hwc[None] * segments_qyx[..., None]
    return jax.vmap(resample)(rows_qsh, columns_qsw, segment_images_qhwc)


def segment_keys(
    mask_logits_qhw: jax.Array, size: tuple[int, int], *, style: str = STYLES[0], side: int = 224
) -> jax.Array:
    """Gives all that tells the CLIP inputs of one picture's segments apart.

    Args:
        mask_logits_qhw: as for ``segment_images``, and so are the others.
        size: rows and columns of the padded picture.
        style: see there.
        side: see there.

    Returns:
        uint8 [q, n]: segments with equal rows have equal inputs.

    Raises:
        ValueError: if ``style`` is unknown.
    """
    check_style(style)
    segments_qyx = _segments(mask_logits_qhw, size, style, side)
    if style == "crop":
        boxes_q4 = boxes_from_masks(segments_qyx)
        return jax.lax.bitcast_convert_type(boxes_q4, jnp.uint8).reshape(len(boxes_q4), -1)
    return jnp.packbits(segments_qyx.reshape(len(segments_qyx), -1), axis=1)


def _segments(
    mask_logits_qhw: jax.Array, size: tuple[int, int], style: str, side: int
) -> jax.Array:
    """The pixels of each segment, bool, of the padded picture; in style "mask" of CLIP's input."""
    height, width = size
    logits_qyx = upsample_masks(mask_logits_qhw, height, width)
    if style == "mask":
        matrices = resize_matrix(height, side), resize_matrix(width, side)
        logits_qyx = apply_matrices(*matrices, logits_qyx)
    return inside(logits_qyx)


def check_style(style: str) -> None:
    """Raises ValueError unless ``style`` is one of ``STYLES``."""
    if style not in STYLES:
        raise ValueError(f"segment style {style!r} is unknown; choose one of {', '.join(STYLES)}")


def resample(rows_sh: jax.Array, columns_sw: jax.Array, image_hwc: jax.Array) -> jax.Array:
    """Resamples an image by one matrix for its rows and one for its columns."""
    tall_swc = jnp.einsum("sh,hwc->swc", rows_sh, image_hwc, precision=EXACT)
    return jnp.einsum("tw,swc->stc", columns_sw, tall_swc, precision=EXACT)


NOTHING = -100.0  # a mask logit of no segment, wherever it is interpolated


def segment_features(
    encode_image: Callable[[jax.Array], jax.Array],
    image_hwc: jax.Array,
    mask_logits_qhw: jax.Array,
    *,
    style: str = STYLES[0],
    side: int = 224,
    chunk: int = 25,
    wanted_q: jax.Array | None = None,
) -> jax.Array:
    """Encodes the queries' segments with CLIP, a few at a time.

    Memory grows with ``chunk``, not with the number of queries: crops are made, encoded
    and dropped chunk by chunk. Segments that look alike, such as all the empty ones, are encoded
    once; the time falls with their number. Chunks are always full, so that the bits of a feature
    do not depend on the other segments. For a batch of images wrap this in ``jax.lax.map``.

    Args:
        encode_image: float32 [n, side, side, 3] -> float [n, d], for example a bound CLIP tower.
        image_hwc: as for ``segments.segment_images``.
        mask_logits_qhw: likewise.
        style: likewise.
        side: side of CLIP's input.
        chunk: number of segments encoded at once, if there are as many.
        wanted_q: bool [q], the others get an empty segment's features. None: all are.

    Returns:
        [q, d], as ``encode_image`` gives them (its dtype, not normalised here).

    Raises:
        ValueError: if ``style`` is unknown or ``chunk`` is not positive.
    """
    check_style(style)
    if chunk < 1:
        raise ValueError(f"segment_features: chunk must be at least 1, not {chunk}")
    chunk = min(chunk, len(mask_logits_qhw))
    # Where no logit is positive, none becomes so between pixels: such a segment is empty.
    there_q = (mask_logits_qhw > 0).any((1, 2))
    there_q = there_q if wanted_q is None else there_q & wanted_q

    def masks_of(index_n: jax.Array) -> jax.Array:
        there_n = jnp.take(there_q, index_n, mode="fill", fill_value=False)
        masks_nhw = jnp.take(mask_logits_qhw, index_n, axis=0, mode="clip")
        return jnp.where(there_n[:, None, None], masks_nhw, NOTHING)

    def keys_of(index_n: jax.Array) -> jax.Array:
        return segment_keys(masks_of(index_n), image_hwc.shape[:2], style=style, side=side)

    def encode(index_n: jax.Array) -> jax.Array:
        images = segment_images(image_hwc, masks_of(index_n), style=style, side=side)
        return encode_image(images)

    first_q = _first_alike(keys_of, there_q, chunk)
    distinct_q = jnp.zeros(len(there_q), bool).at[first_q].set(True)
    return _map_chosen(encode, distinct_q, chunk)[first_q]


def _map_chosen(
    function: Callable[[jax.Array], jax.Array], chosen_q: jax.Array, chunk: int
) -> jax.Array:
    """Applies a function to the chosen queries in full chunks; the others' results are zeros.

    The function takes places, int32 [chunk]; those that fill the last chunk are beyond the queries.
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
    results = jax.lax.fori_loop(0, -(-chosen_q.sum() // chunk), add, results)
    place_q = jnp.zeros(queries, jnp.int32).at[order_q].set(jnp.arange(queries, dtype=jnp.int32))
    return results[place_q]


def _first_alike(
    keys_of: Callable[[jax.Array], jax.Array], there_q: jax.Array, chunk: int
) -> jax.Array:
    """Gives for each query the place of the first whose segment looks alike, int32 [q].

    Hashes say which it may be, so that no keys are kept; those of the two are then compared.

    Args:
        keys_of: places, int32 [n], to keys uint8 [n, bytes], see ``segments.segment_keys``.
        there_q: bool [q]; the others look alike, one of them stands for all.
        chunk: keys that are made at once.
    """
    own_q = jnp.arange(len(there_q), dtype=jnp.int32)
    nothing = jnp.argmin(there_q)
    compared_q = there_q | (own_q == nothing)
    hashes_q2 = _map_chosen(lambda index_n: _hash(keys_of(index_n)), compared_q, chunk)
    equal_qq = (hashes_q2[:, None] == hashes_q2[None]).all(-1) & compared_q[None]
    may_be_q = jnp.argmax(equal_qq, axis=1).astype(jnp.int32)

    def are_alike(index_n: jax.Array) -> jax.Array:
        others_n = jnp.take(may_be_q, index_n, mode="clip")
        return (keys_of(index_n) == keys_of(others_n)).all(1)

    alike_q = _map_chosen(are_alike, compared_q & (may_be_q != own_q), chunk)
    first_q = jnp.where(alike_q, may_be_q, own_q)
    return jnp.where(compared_q, first_q, first_q[nothing])


def _hash(keys_nb: jax.Array) -> jax.Array:
    """Hashes keys uint8 [n, bytes] to uint32 [n, 2]."""
    factors_2b = jax.random.bits(jax.random.key(0), (2, keys_nb.shape[1]), jnp.uint32)
    return (keys_nb[:, None].astype(jnp.uint32) * factors_2b[None]).sum(-1)
