"""Infers the sizes of OpenAI's CLIPs, published without a config, from their tensors' shapes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from zegformer_jax.models.clip.model import ClipConfig
from zegformer_jax.models.clip.resnet import STRIDE, WIDTH_FACTOR
from zegformer_jax.pretrained.clip.tensors import OPENAI
from zegformer_jax.runtime.errors import UserError

HEAD_WIDTH = 64  # openai/CLIP model.py, build_model: heads = width // 64


def from_shapes(arrays: Mapping[str, np.ndarray], where: str) -> ClipConfig:
    """Infers the sizes of OpenAI's CLIP from its tensors, as OpenAI's build_model does.

    Args:
        arrays: Tensors by their published names.
        where: A file's name, for messages.

    Raises:
        UserError: The named tensor is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays:
            raise UserError(f"{where}: no tensor '{name}': not a CLIP in OpenAI's naming")
        return arrays[name].shape

    vocab_size, text_width = shape("token_embedding.weight")
    context_length, _ = shape("positional_embedding")
    _, embed_dim = shape("text_projection")
    if "visual.attnpool.positional_embedding" in arrays:
        vision = _resnet_shapes(arrays, shape)
    else:
        vision_width, _ = shape("visual.proj")
        patch_size = shape("visual.conv1.weight")[-1]
        side = round((shape("visual.positional_embedding")[0] - 1) ** 0.5)
        vision = {
            "image_size": side * patch_size,
            "patch_size": patch_size,
            "vision_width": vision_width,
            "vision_layers": _count(arrays, OPENAI.visual_blocks),
            "vision_heads": max(1, vision_width // HEAD_WIDTH),
        }
    return ClipConfig(
        **vision,
        text_width=text_width,
        text_layers=_count(arrays, OPENAI.text_blocks),
        text_heads=max(1, text_width // HEAD_WIDTH),
        vocab_size=vocab_size,
        context_length=context_length,
        embed_dim=embed_dim,
    )


def _resnet_shapes(arrays: Mapping[str, np.ndarray], shape: Any) -> dict[str, Any]:
    width = shape("visual.layer1.0.conv1.weight")[0]
    side = round((shape("visual.attnpool.positional_embedding")[0] - 1) ** 0.5)
    return {
        "image_size": side * STRIDE,
        "patch_size": None,
        "vision_width": width,
        "vision_layers": tuple(_count(arrays, f"visual.layer{i}") for i in (1, 2, 3, 4)),
        "vision_heads": max(1, width * WIDTH_FACTOR // HEAD_WIDTH),
    }


def _count(arrays: Mapping[str, np.ndarray], prefix: str) -> int:
    """Counts the blocks: the distinct numbers after `prefix.` in the tensors' names."""
    start = len(prefix) + 1
    return len({name[start:].split(".")[0] for name in arrays if name.startswith(f"{prefix}.")})
