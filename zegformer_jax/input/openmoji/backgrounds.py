"""Plain, varied backgrounds for generated images: flat colours and low-frequency textures.

The colours are muted, like those of most photographs: on saturated backgrounds, the drawings are
hard to see.
"""

import numpy as np
from PIL import Image

BRIGHTNESS = (90, 235)  # grey levels of a colour's mean
MAX_CHROMA = 35  # grey levels between a channel and that mean
GRAIN_PROBABILITY = 0.5
MAX_GRAIN = 12  # grey levels to either side


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws a background of a random kind in random colours.

    Args:
        rng: Source of all randomness.
        height: Number of rows, at least 1.
        width: Number of columns, at least 1.

    Returns:
        uint8 RGB [h, w, 3].
    """
    kind = rng.integers(6)
    if kind == 0:
        image_hw3 = np.broadcast_to(_colour(rng), (height, width, 3)).astype(np.float32)
    elif kind == 1:
        noise_hw3 = _smooth_noise(rng, height, width, "RGB")
        image_hw3 = _colour(rng) + (noise_hw3 - 128) * np.float32(MAX_CHROMA / 128)
    else:
        draw = (_gradient, _stripes, _checkers, _blobs)[kind - 2]
        mix_hw1 = draw(rng, height, width)[..., None]
        first, second = _colour(rng), _colour(rng)
        image_hw3 = first + (second - first) * mix_hw1
    if rng.random() < GRAIN_PROBABILITY:
        grain = int(rng.integers(1, MAX_GRAIN + 1))
        image_hw3 = image_hw3 + rng.integers(-grain, grain + 1, image_hw3.shape, np.int8)
    return np.minimum(np.maximum(image_hw3, 0), 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> np.ndarray:
    chroma_3 = rng.uniform(-MAX_CHROMA, MAX_CHROMA, 3)
    return np.clip(rng.uniform(*BRIGHTNESS) + chroma_3, 0, 255).astype(np.float32)


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns the distance in pixels along a random direction: float32 [h, w]."""
    angle = rng.random() * 2 * np.pi
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    return rows[:, None] * np.float32(np.sin(angle)) + columns[None] * np.float32(np.cos(angle))


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    ramp = _ramp(rng, height, width)
    low, high = ramp.min(), ramp.max()
    return (ramp - low) / max(high - low, 1.0)


def _waves(rng: np.random.Generator, ramp: np.ndarray, side: int) -> np.ndarray:
    period = side * rng.uniform(0.15, 0.6)
    return np.sin(ramp * np.float32(2 * np.pi / period) + np.float32(rng.random() * 6.0))


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    waves = _waves(rng, _ramp(rng, height, width), max(height, width))
    sharpness = np.float32(rng.choice((0.5, 2.0, 20.0)))
    return np.clip(0.5 + sharpness * waves, 0, 1)


def _checkers(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    side = max(height, width)
    rows = _waves(rng, np.arange(height, dtype=np.float32), side)
    columns = _waves(rng, np.arange(width, dtype=np.float32), side)
    return (rows[:, None] * columns[None] > 0).astype(np.float32)


def _blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = _smooth_noise(rng, height, width, "L")
    return np.clip((noise - 128) * np.float32(rng.uniform(0.02, 0.2)) + 0.5, 0, 1)


def _smooth_noise(rng: np.random.Generator, height: int, width: int, mode: str) -> np.ndarray:
    """Enlarges uniform noise of a coarse grid: float32 [h, w] or [h, w, 3] in 0..255."""
    rows, columns = rng.integers(2, 7, 2)
    shape = (rows, columns, 3) if mode == "RGB" else (rows, columns)
    coarse = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
