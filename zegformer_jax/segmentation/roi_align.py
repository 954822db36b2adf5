"""RoIAlign (He et al., "Mask R-CNN", 2017) as one matrix per axis.

Axes: p bin, k sample, w input pixels.
"""

import jax
import jax.numpy as jnp

from zegformer_jax.segmentation.resize import Size, split_position


def roi_align_matrix(start: Size, end: Size, in_size: int, out_size: int) -> jax.Array:
    """Returns one axis of torchvision's RoIAlign as a matrix (`aligned=True`, adaptive sampling).

    Bin p averages g = ceil((end - start) / out_size) bilinear samples at
    start - 0.5 + (end - start) * (p + (k + 0.5) / g) / out_size, k = 0..g-1. Samples
    outside [-1, in_size] count as 0, the others are clamped to [0, in_size - 1].

    Args:
        start: First pixel index of the box, int or int32 scalar; may be traced.
        end: Last pixel index, int or int32 scalar; may be traced; end - start is in 0..in_size.
        in_size: Number of pixels on the axis.
        out_size: Number of bins.

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
    low, high, fraction = split_position(jnp.maximum(numerator_pk, 0), denominator, in_size)

    columns = jnp.arange(in_size, dtype=jnp.int32)[None, None]
    low, high, fraction = low[..., None], high[..., None], fraction[..., None]
    weights_pkw = jnp.where(columns == low, 1 - fraction, 0.0)
    weights_pkw += jnp.where(columns == high, fraction, 0.0)
    total_pw = jnp.where(counted_pk[..., None], weights_pkw, 0.0).sum(axis=1)
    return total_pw / jnp.maximum(samples, 1)
