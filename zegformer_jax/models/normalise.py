"""Normalisation of images by mean and deviation, and of vectors by length."""

import jax
import jax.numpy as jnp

PIXEL_MEAN = (123.675, 116.280, 103.530)  # ImageNet, RGB 0..255
PIXEL_STD = (58.395, 57.120, 57.375)
MIN_LENGTH = 1e-12  # PyTorch's default in normalize


def normalise_images(
    images_bhwc: jax.Array,
    sizes_b2: jax.Array | None = None,
    mean: tuple[float, ...] = PIXEL_MEAN,
    std: tuple[float, ...] = PIXEL_STD,
) -> jax.Array:
    """Normalises RGB images and sets what lies outside their true size to 0.

    Args:
        images_bhwc: [B, H, W, 3], 0..255, any dtype.
        sizes_b2: int [B, 2], true height and width; None where the whole images count.
        mean: Of every channel, on the scale 0..255.
        std: Of every channel, on the scale 0..255.

    Returns:
        float32 [B, H, W, 3].
    """
    mean_c, std_c = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    x = (images_bhwc.astype(jnp.float32) - mean_c[None, None, None]) / std_c[None, None, None]
    if sizes_b2 is None:
        return x
    inside_bh = jnp.arange(x.shape[1])[None] < sizes_b2[:, :1]
    inside_bw = jnp.arange(x.shape[2])[None] < sizes_b2[:, 1:]
    return x * (inside_bh[:, :, None] & inside_bw[:, None])[..., None]


def unit_length(x: jax.Array) -> jax.Array:
    """Scales the last axis to length 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), MIN_LENGTH)
