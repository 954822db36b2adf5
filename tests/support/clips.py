"""Small CLIPs with random parameters, for the tests of their files."""

import numpy as np

from zegformer_jax.models.clip.model import ClipConfig
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.clip_tensors import parameter_shapes

# Every size differs from every other, so that no two axes can be swapped unseen.
VIT = ClipConfig(
    image_size=24,
    patch_size=8,
    vision_width=12,
    vision_layers=2,
    vision_heads=3,
    text_width=20,
    text_layers=3,
    text_heads=2,
    vocab_size=530,
    context_length=14,
    embed_dim=6,
    eos_token_id=529,
)
RESNET = ClipConfig(
    image_size=96,
    patch_size=None,
    vision_width=6,
    vision_layers=(1, 3, 1, 2),
    vision_heads=4,
    text_width=20,
    text_layers=2,
    text_heads=2,
    vocab_size=530,
    context_length=14,
    embed_dim=10,
)


def random_params(config: ClipConfig, seed: int = 1, std: float | None = 0.3) -> dict:
    """Random parameters; biases, scales and statistics too, so that none can be lost unseen.

    ``std`` None is that which keeps the size of what a kernel maps.
    """
    rng = np.random.default_rng(seed)
    arrays = {}
    for path, shape in parameter_shapes(config).items():
        size = 0.1 if len(shape) < 2 else _kernel_std(path, shape)
        array = rng.normal(0, size if std is None else std, shape)
        if path.endswith("/var"):
            array = rng.uniform(0.5, 1.5, shape)
        elif std is None and path.endswith("/scale"):
            array += 1
        arrays[path] = array.astype(np.float32)
    return tables.unflatten(arrays)


def _kernel_std(path: str, shape: tuple[int, ...]) -> float:
    if path.endswith("embedding"):
        return 0.1
    inputs = shape[:2] if path.endswith("out/kernel") else shape[:1]
    inputs = shape[:3] if path.endswith("conv/kernel") else inputs
    return np.prod(inputs) ** -0.5
