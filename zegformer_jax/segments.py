"""From mask logits to the images that CLIP sees: resizing, boxes, RoIAlign, crops.

Resizing and RoIAlign are separable and linear, so each is two small matrices, one for the rows and
one for the columns. Sample positions are ratios of integers and are split into a pixel and
a fraction in integer arithmetic, so that large pictures lose no precision to float32.

Axes: b image, q query, h w pixels, c colour, s crop side, d joint embedding.
"""

import jax
import jax.numpy as jnp

STYLES = ("cropmask", "crop", "mask")  # the first is the default
SEGMENT_THRESHOLD = 0.5  # a pixel belongs to a segment where sigmoid(mask logit) exceeds this

Size = int | jax.Array
_EXACT = jax.lax.Precision.HIGHEST  # accelerators would round the weights to 8 or 10 bits


def resize_taps(
    in_size: Size, out_size: Size, out_length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gives, for each output position, its two source positions and the second one's weight.

    Bilinear with half-pixel centres and no antialiasing, as in PyTorch's
    ``interpolate(align_corners=False)``: source = max((i + 0.5) * in / out - 0.5, 0).

    Args:
        in_size: true length of the input, int or int32 scalar (may be traced), at least 1.
        out_size: true length of the output, likewise; in_size * out_size below 2**30.
        out_length: static number of positions to give, at least ``out_size``.

    Returns:
        low, high: int32 [out_length] in 0..in_size-1; weight of ``high``: float32 in [0, 1).
        Positions from ``out_size`` on repeat the edge.
    """
    in_size, out_size = jnp.int32(in_size), jnp.int32(out_size)
    numerator = (2 * jnp.arange(out_length, dtype=jnp.int32) + 1) * in_size - out_size
    return _split_position(jnp.maximum(numerator, 0), 2 * out_size, in_size)


def _split_position(
    numerator: jax.Array, denominator: jax.Array, in_size: Size
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits positions numerator / denominator >= 0 into pixel, next pixel, fraction.

    Beyond the last pixel both pixels are the last one, whatever the fraction.
    """
    low = numerator // denominator
    fraction = (numerator % denominator).astype(jnp.float32) / denominator.astype(jnp.float32)
    last = jnp.int32(in_size - 1)
    return jnp.minimum(low, last), jnp.minimum(low + 1, last), fraction


def padded_resize_matrix(
    in_size: Size, out_size: Size, in_length: int, out_length: int
) -> jax.Array:
    """Gives the matrix of a bilinear resize whose true sizes may be traced.

    Args:
        in_size: true input length, int or int32 scalar, at most ``in_length``.
        out_size: true output length, int or int32 scalar, at most ``out_length``.
        in_length: static number of columns.
        out_length: static number of rows.

    Returns:
        float32 [out_length, in_length]; the first ``out_size`` rows sum to 1 and do not touch
        columns from ``in_size`` on; the other rows are zero. Convention as in ``resize_taps``.
    """
    low, high, weight = resize_taps(in_size, out_size, out_length)
    columns = jnp.arange(in_length, dtype=jnp.int32)[None]
    matrix = jnp.where(columns == low[:, None], 1 - weight[:, None], 0.0)
    matrix += jnp.where(columns == high[:, None], weight[:, None], 0.0)
    return jnp.where(jnp.arange(out_length)[:, None] < out_size, matrix, 0.0)


def resize_matrix(in_size: int, out_size: int) -> jax.Array:
    """Gives the float32 [out_size, in_size] matrix of PyTorch's bilinear resize.

    Half-pixel centres (``align_corners=False``), no antialiasing; every row sums to 1.

    Raises:
        ValueError: if a size is not positive.
    """
    if in_size < 1 or out_size < 1:
        raise ValueError(f"resize_matrix: sizes must be positive, not {in_size} -> {out_size}")
    return padded_resize_matrix(in_size, out_size, in_size, out_size)


def upsample_masks(mask_logits_qhw: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes mask logits bilinearly (see ``resize_matrix``), in float32.

    Args:
        mask_logits_qhw: float [q, h, w], any range.
        height: rows of the result.
        width: columns of the result.

    Returns:
        float32 [q, height, width].
    """
    _, in_height, in_width = mask_logits_qhw.shape
    return apply_matrices(
        resize_matrix(in_height, height),
        resize_matrix(in_width, width),
        mask_logits_qhw.astype(jnp.float32),
    )


def apply_matrices(rows_yh: jax.Array, columns_xw: jax.Array, maps_qhw: jax.Array) -> jax.Array:
    """Applies one matrix to the columns and one to the rows of maps: [q, h, w] -> [q, y, x]."""
    wide_qhx = jnp.einsum("qhw,xw->qhx", maps_qhw, columns_xw, precision=_EXACT)
    return jnp.einsum("yh,qhx->qyx", rows_yh, wide_qhx, precision=_EXACT)


def mix_rows(
    maps_qhw: jax.Array, low_y: jax.Array, high_y: jax.Array, weight_y: jax.Array
) -> jax.Array:
    """Mixes two rows of maps for each row of the result, in float32: [q, h, w] -> [q, y, w].

    Args:
        maps_qhw: float [q, h, w].
        low_y: int32 [y], the first row, in 0..h-1.
        high_y: int32 [y], the second row, in 0..h-1.
        weight_y: float32 [y], of the second row.
    """
    low_qyw = jnp.take(maps_qhw, low_y, axis=1).astype(jnp.float32)
    high_qyw = jnp.take(maps_qhw, high_y, axis=1).astype(jnp.float32)
    weight_1y1 = weight_y[None, :, None]
    return low_qyw * (1 - weight_1y1) + high_qyw * weight_1y1


def boxes_from_masks(masks_qhw: jax.Array) -> jax.Array:
    """Gives the box of each segment.

    Args:
        masks_qhw: bool [q, h, w], True inside the segment.

    Returns:
        int32 [q, 4]: first column, first row, last column, last row, as pixel indices. A box
        of zero area (one column, one row or no pixel at all) becomes (0, 0, w, h).
    """
    _, height, width = masks_qhw.shape
    left, right = _first_and_last(masks_qhw.any(axis=1))
    top, bottom = _first_and_last(masks_qhw.any(axis=2))
    boxes_q4 = jnp.stack([left, top, right, bottom], axis=-1)
    has_area_q = (right > left) & (bottom > top)
    whole_4 = jnp.array([0, 0, width, height], jnp.int32)
    return jnp.where(has_area_q[:, None], boxes_q4, whole_4[None])


def _first_and_last(occupied_qn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives the first and last True index of each row; both 0-wide where there is none."""
    first_q = jnp.argmax(occupied_qn, axis=-1).astype(jnp.int32)
    from_end_q = jnp.argmax(occupied_qn[:, ::-1], axis=-1).astype(jnp.int32)
    last_q = occupied_qn.shape[-1] - 1 - from_end_q
    return first_q, jnp.where(occupied_qn.any(axis=-1), last_q, first_q)


def roi_align_matrix(start: Size, end: Size, in_size: int, out_size: int) -> jax.Array:
    """Gives one axis of torchvision's RoIAlign (``aligned=True``, adaptive sampling) as a matrix.

    Bin p averages g = ceil((end - start) / out_size) bilinear samples at
    start - 0.5 + (end - start) * (p + (k + 0.5) / g) / out_size, k = 0..g-1. Samples
    outside [-1, in_size] count as 0, the others are clamped to [0, in_size - 1].

    Args:
        start: first pixel index of the box, int or int32 scalar (may be traced).
        end: last pixel index, likewise; end - start must be in 0..in_size.
        in_size: number of pixels on the axis.
        out_size: number of bins.

    Returns:
        float32 [out_size, in_size]; all zero where end equals start, as in torchvision.
    """
    side = jnp.int32(end) - jnp.int32(start)
    max_samples = -(-in_size // out_size)
    samples = -(-side // out_size)
    denominator = 2 * out_size * jnp.maximum(samples, 1)
    k = jnp.arange(max_samples, dtype=jnp.int32)[None, :]
    fine_pk = jnp.arange(out_size, dtype=jnp.int32)[:, None] * samples + k
    numerator_pk = side * (2 * fine_pk + 1) + (2 * jnp.int32(start) - 1) * (denominator // 2)
    counted_pk = (k < samples) & (numerator_pk >= -denominator)
    counted_pk &= numerator_pk <= in_size * denominator
    low, high, fraction = _split_position(jnp.maximum(numerator_pk, 0), denominator, in_size)

    columns = jnp.arange(in_size, dtype=jnp.int32)[None, None]
    low, high, fraction = low[..., None], high[..., None], fraction[..., None]
    weights_pkw = jnp.where(columns == low, 1 - fraction, 0.0)
    weights_pkw += jnp.where(columns == high, fraction, 0.0)
    total_pw = jnp.where(counted_pk[..., None], weights_pkw, 0.0).sum(axis=1)
    return total_pw / jnp.maximum(samples, 1)


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
        return _crop(rows_sh, columns_sw, image_hwc)[None] * segments_qyx[..., None]

    left, top, right, bottom = jnp.unstack(boxes_from_masks(segments_qyx), axis=-1)
    rows_qsh = jax.vmap(lambda a, b: roi_align_matrix(a, b, height, side))(top, bottom)
    columns_qsw = jax.vmap(lambda a, b: roi_align_matrix(a, b, width, side))(left, right)
    if style == "crop":
        return jax.vmap(_crop, in_axes=(0, 0, None))(rows_qsh, columns_qsw, image_hwc)
    segment_images_qhwc = image_hwc[None] * segments_qyx[..., None]
    return jax.vmap(_crop)(rows_qsh, columns_qsw, segment_images_qhwc)


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


def inside(mask_logits: jax.Array) -> jax.Array:
    """Tells which pixels are in a segment, bool, from mask logits of any shape."""
    return jax.nn.sigmoid(mask_logits) > SEGMENT_THRESHOLD


def _crop(rows_sh: jax.Array, columns_sw: jax.Array, image_hwc: jax.Array) -> jax.Array:
    """Resamples an image by one matrix for its rows and one for its columns."""
    tall_swc = jnp.einsum("sh,hwc->swc", rows_sh, image_hwc, precision=_EXACT)
    return jnp.einsum("tw,swc->stc", columns_sw, tall_swc, precision=_EXACT)


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
    rows_sm = jnp.matmul(rows_sh, resize_matrix(mask_height, height), precision=_EXACT)
    columns_sm = jnp.matmul(columns_sw, resize_matrix(mask_width, width), precision=_EXACT)
    inside_qss = inside(apply_matrices(rows_sm, columns_sm, mask_logits_qhw.astype(jnp.float32)))
    patch = side // grid
    patches = inside_qss.reshape(-1, grid, patch, grid, patch).astype(jnp.float32)
    return _crop(rows_sh, columns_sw, image_hwc), patches.mean((2, 4))
