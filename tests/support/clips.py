"""Small CLIPs with random parameters, and the sizes of those that are published."""

import dataclasses

import numpy as np

from zegformer_jax.models.clip.model import ClipConfig
from zegformer_jax.models.clip.resnet import WIDTH_FACTOR
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.clip.tensors import parameter_shapes

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


def _resnet(image_size: int, width: int, layers: tuple[int, ...], embed_dim: int, text_width: int):
    return ClipConfig(
        image_size=image_size,
        patch_size=None,
        vision_width=width,
        vision_layers=layers,
        vision_heads=width * WIDTH_FACTOR // 64,
        text_width=text_width,
        text_heads=text_width // 64,
        embed_dim=embed_dim,
    )


_VIT_L14 = ClipConfig(
    patch_size=14,
    vision_width=1024,
    vision_layers=24,
    vision_heads=16,
    text_width=768,
    text_heads=12,
    embed_dim=768,
)
_VIT_H14 = ClipConfig(
    patch_size=14,
    vision_width=1280,
    vision_layers=32,
    vision_heads=16,
    text_width=1024,
    text_layers=24,
    text_heads=16,
    embed_dim=1024,
    activation="gelu",
)

# Every CLIP of OpenAI (their table 20), and the ViTs that only OpenCLIP has (its model_configs).
# OpenCLIP's other ViTs have the sizes of OpenAI's and activation="gelu".
CLIPS = {
    "RN50": _resnet(224, 64, (3, 4, 6, 3), 1024, 512),
    "RN101": _resnet(224, 64, (3, 4, 23, 3), 512, 512),
    "RN50x4": _resnet(288, 80, (4, 6, 10, 6), 640, 640),
    "RN50x16": _resnet(384, 96, (6, 8, 18, 8), 768, 768),
    "RN50x64": _resnet(448, 128, (3, 15, 36, 10), 1024, 1024),
    "ViT-B/32": ClipConfig(patch_size=32),
    "ViT-B/16": ClipConfig(),
    "ViT-L/14": _VIT_L14,
    "ViT-L/14@336px": dataclasses.replace(_VIT_L14, image_size=336),
    "ViT-H/14": _VIT_H14,
    "ViT-g/14": dataclasses.replace(
        _VIT_H14, vision_width=1408, vision_layers=40, vision_mlp_width=6144
    ),
    "ViT-bigG/14": dataclasses.replace(
        _VIT_H14,
        vision_width=1664,
        vision_layers=48,
        vision_mlp_width=8192,
        text_width=1280,
        text_layers=32,
        text_heads=20,
        embed_dim=1280,
    ),
}


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
