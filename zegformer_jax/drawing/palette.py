"""Colours that are easy to tell apart."""

import functools

import numpy as np


@functools.lru_cache(maxsize=8)
def palette(n: int) -> np.ndarray:
    """Returns n colours that are far apart; a larger n only adds colours at the end.

    Each colour is the one farthest, in the OKLab space, from all before it. Beyond about 3,000
    colours they repeat.

    Args:
        n: Number of colours, at least 0.

    Returns:
        uint8 [n, 3], RGB, read-only.

    Raises:
        ValueError: If n is negative.
    """
    if n < 0:
        raise ValueError(f"palette: {n} colours requested; pass 0 or more")
    levels = np.linspace(0, 255, 18).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates / 255)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (lab[:, 0] > 0.42) & (lab[:, 0] < 0.9) & (chroma > 0.08) & (chroma < 0.21)
    candidates, lab = candidates[vivid], lab[vivid]
    lab = lab * [0.8, 1.0, 1.0]  # Hue tells classes apart better than lightness does.
    chosen = [int(np.argmin(np.abs(candidates - [230, 57, 70]).sum(axis=1)))]
    distance = np.full(len(lab), np.inf)
    for _ in range(min(n, len(lab)) - 1):
        distance = np.minimum(distance, np.square(lab - lab[chosen[-1]]).sum(axis=1))
        chosen.append(int(np.argmax(distance)))
    colours = candidates[np.resize(chosen, n)].astype(np.uint8)
    colours.flags.writeable = False
    return colours


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Converts sRGB in [0, 1] to OKLab (Ottosson 2020)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear @ np.transpose(to_lms)) @ np.transpose(to_lab)
