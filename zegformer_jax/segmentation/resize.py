"""Bilinear resizing as small matrices.

Resizing is separable and linear: one matrix for the rows and one for the columns. Sample
positions are ratios of integers and are split into a pixel and a fraction in integer
arithmetic, so large images lose no precision to float32. `jax.image.resize` computes positions in
float32 and takes static sizes only; here one function serves static and traced sizes.

Axes: q query, h w input pixels, y x output pixels.
"""

import jax
import jax.numpy as jnp

Size = int | jax.Array
EXACT = jax.lax.Precision.HIGHEST  # accelerators would round the weights to 8 or 10 bits


def resize_taps(
    in_size: Size, out_size: Size, out_length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns for each output position its two source positions and the second one's weight.

    Bilinear with half-pixel centres and no antialiasing, as in PyTorch's
    `interpolate(align_corners=False)`: source = max((i + 0.5) * in / out - 0.5, 0).

    Args:
        in_size: True length of the input, int or int32 scalar, at least 1; may be traced.
        out_size: True length of the output, int or int32 scalar; may be traced; in_size * out_size
            is below 2**30.
        out_length: Static number of positions, at least `out_size`.

    Returns:
        low, high: int32 [out_length] in 0..in_size-1; weight of `high`: float32 in [0, 1).
        Positions from `out_size` on are clamped to the last pixel.
    """
    in_size, out_size = jnp.int32(in_size), jnp.int32(out_size)
    numerator = (2 * jnp.arange(out_length, dtype=jnp.int32) + 1) * in_size - out_size
    return split_position(jnp.maximum(numerator, 0), 2 * out_size, in_size)


def split_position(
    numerator: jax.Array, denominator: jax.Array, in_size: Size
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits positions numerator / denominator >= 0 into pixel, next pixel and fraction.

    Beyond the last pixel both pixels are the last one, whatever the fraction.
    """
    low = numerator // denominator
    fraction = (numerator % denominator).astype(jnp.float32) / denominator.astype(jnp.float32)
    last = jnp.int32(in_size - 1)
    return jnp.minimum(low, last), jnp.minimum(low + 1, last), fraction


def padded_resize_matrix(
    in_size: Size, out_size: Size, in_length: int, out_length: int
) -> jax.Array:
    """Returns the matrix of a bilinear resize whose true sizes may be traced; see `resize_taps`.

    Args:
        in_size: True input length, int or int32 scalar, at most `in_length`.
        out_size: True output length, int or int32 scalar, at most `out_length`.
        in_length: Static number of columns.
        out_length: Static number of rows.

    Returns:
        float32 [out_length, in_length]; the first `out_size` rows sum to 1 and do not touch
        columns from `in_size` on; the other rows are zero.
    """
    low, high, weight = resize_taps(in_size, out_size, out_length)
    columns = jnp.arange(in_length, dtype=jnp.int32)[None]
    matrix = jnp.where(columns == low[:, None], 1 - weight[:, None], 0.0)
    matrix += jnp.where(columns == high[:, None], weight[:, None], 0.0)
    return jnp.where(jnp.arange(out_length)[:, None] < out_size, matrix, 0.0)


def resize_matrix(in_size: int, out_size: int) -> jax.Array:
    """Returns the float32 [out_size, in_size] matrix of PyTorch's bilinear resize.

    Half-pixel centres (`align_corners=False`), no antialiasing; every row sums to 1.

    Raises:
        ValueError: A size is not positive.
    """
    if in_size < 1 or out_size < 1:
        raise ValueError(f"resize_matrix: sizes must be positive, not {in_size} -> {out_size}")
    return padded_resize_matrix(in_size, out_size, in_size, out_size)


def upsample_masks(mask_logits_qhw: jax.Array, height: int, width: int) -> jax.Array:
    """Returns mask logits resized bilinearly, float32 [q, height, width]; see `resize_matrix`.

    Args:
        mask_logits_qhw: float [q, h, w], any range.
        height: Rows of the result.
        width: Columns of the result.
    """
    _, in_height, in_width = mask_logits_qhw.shape
    return apply_matrices(
        resize_matrix(in_height, height),
        resize_matrix(in_width, width),
        mask_logits_qhw.astype(jnp.float32),
    )


def apply_matrices(rows_yh: jax.Array, columns_xw: jax.Array, maps_qhw: jax.Array) -> jax.Array:
    """Applies one matrix to the columns and one to the rows of maps: [q, h, w] -> [q, y, x]."""
    wide_qhx = jnp.einsum("qhw,xw->qhx", maps_qhw, columns_xw, precision=EXACT)
    return jnp.einsum("yh,qhx->qyx", rows_yh, wide_qhx, precision=EXACT)


def mix_rows(
    maps_qhw: jax.Array, low_y: jax.Array, high_y: jax.Array, weight_y: jax.Array
) -> jax.Array:
    """Mixes two rows of maps for each row of the result, in float32: [q, h, w] -> [q, y, w].

    Args:
        maps_qhw: float [q, h, w].
        low_y: First row, int32 [y] in 0..h-1.
        high_y: Second row, int32 [y] in 0..h-1.
        weight_y: Weight of the second row, float32 [y].
    """
    low_qyw = jnp.take(maps_qhw, low_y, axis=1).astype(jnp.float32)
    high_qyw = jnp.take(maps_qhw, high_y, axis=1).astype(jnp.float32)
    weight_1y1 = weight_y[None, :, None]
    return low_qyw * (1 - weight_1y1) + high_qyw * weight_1y1


def resample(rows_yh: jax.Array, columns_xw: jax.Array, image_hwc: jax.Array) -> jax.Array:
    """Applies one matrix to the columns and one to the rows of an image: [h, w, c] -> [y, x, c]."""
    tall_ywc = jnp.einsum("yh,hwc->ywc", rows_yh, image_hwc, precision=EXACT)
    return jnp.einsum("xw,ywc->yxc", columns_xw, tall_ywc, precision=EXACT)
