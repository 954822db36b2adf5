"""Interpolates the position embeddings of a CLIP for another image size than in training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from zegformer_jax.models.clip.model import ClipConfig
from zegformer_jax.pretrained import tables

CUBIC_SLOPE = -0.75  # PyTorch's; Keys 1981, equation 15, calls it alpha
CUBIC_REACH = 2  # the kernel is zero at this distance and beyond


def resize_positions(
    params: Mapping[str, Any], config: ClipConfig, image_size: int
) -> tuple[ClipConfig, dict[str, Any]]:
    """Interpolates a CLIP's position embeddings for another image size.

    The method is that of transformers' `interpolate_pos_encoding`: bicubic, half-pixel centres, no
    antialiasing; the position of the class token (of a ResNet's mean token) is unchanged.

    Args:
        params: A CLIP's parameters.
        config: Its sizes.
        image_size: Side of the images in pixels, a multiple of the patch (of 32 for a ResNet).

    Returns:
        The sizes and the parameters; all arrays but the positions are shared with `params`.

    Raises:
        UserError: The image is not a multiple of the patch.
    """
    resized = dataclasses.replace(config, image_size=image_size)
    arrays = dict(tables.flatten(params))
    parent = "attention_pool/" if config.is_resnet else ""
    path = f"visual/{parent}position_embedding"
    position_tw = np.asarray(arrays[path], np.float32)
    if resized.grid_size != config.grid_size:
        old = config.grid_size
        grid_hww = position_tw[1:].reshape(old, old, -1)
        matrix = cubic_matrix(old, resized.grid_size)
        grid_hww = np.einsum("iy,jx,yxw->ijw", matrix, matrix, grid_hww, optimize=True)
        rows = grid_hww.reshape(-1, position_tw.shape[1])
        arrays[path] = np.concatenate([position_tw[:1], rows]).astype(np.float32)
    return resized, tables.unflatten(arrays)


def cubic_matrix(old: int, new: int) -> np.ndarray:
    """Returns the matrix that interpolates a line of `old` samples to `new` samples.

    Centres are at half pixels, and samples beyond the ends repeat the ends. `jax.image.resize` has
    another kernel (a = -0.5).

    Args:
        old: The number of samples.
        new: The number of interpolated samples.

    Returns:
        float64 [new, old].
    """
    centre_n1 = ((np.arange(new) + 0.5) * old / new - 0.5)[:, None]
    first_n1 = np.floor(centre_n1).astype(int) - CUBIC_REACH + 1
    taps_nk = first_n1 + np.arange(2 * CUBIC_REACH)[None]
    weights_nk = _cubic_kernel(np.abs(centre_n1 - taps_nk))
    matrix = np.zeros((new, old))
    rows_nk = np.broadcast_to(np.arange(new)[:, None], taps_nk.shape)
    np.add.at(matrix, (rows_nk, np.clip(taps_nk, 0, old - 1)), weights_nk)
    return matrix


def _cubic_kernel(distance: np.ndarray) -> np.ndarray:
    """Returns Keys' cubic convolution kernel at distances >= 0, in samples."""
    a, x = CUBIC_SLOPE, distance
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < CUBIC_REACH, far, 0))
