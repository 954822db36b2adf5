"""CLIPs that were trained with another mean and deviation of pixels than OpenAI's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zegformer_jax.models.clip.model import CLIP_MEAN, CLIP_STD, ClipConfig
from zegformer_jax.pretrained import tables

# What a file holds of the mean and the deviation, on the scale 0..1: the section, the keys.
PREPROCESSING = {
    "preprocessor_config.json": (None, "image_mean", "image_std"),
    "open_clip_config.json": ("preprocess_cfg", "mean", "std"),
}
MAX_PIXEL = 255


def read_normalisation(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Reads the mean and the deviation, of RGB 0..255, from a file of PREPROCESSING.

    Gives OpenAI's where the file or its fields are absent.
    """
    section, mean_key, std_key = PREPROCESSING[path.name]
    fields = json.loads(path.read_text()) if path.is_file() else {}
    fields = (fields.get(section) or {}) if section else fields
    mean, std = fields.get(mean_key), fields.get(std_key)
    return (
        CLIP_MEAN if mean is None else [MAX_PIXEL * x for x in mean],
        CLIP_STD if std is None else [MAX_PIXEL * x for x in std],
    )


def fold_normalisation(
    params: Mapping[str, Any],
    config: ClipConfig,
    mean: Sequence[float],
    std: Sequence[float],
    where: str,
) -> dict[str, Any]:
    """Makes a ViT CLIP, trained on (p - mean) / std, take (p - CLIP_MEAN) / CLIP_STD, exactly.

    The patches' embedding is linear: its kernel takes the ratio of the deviations, and the
    positions of the patches what the means add. Gives ``params`` where nothing differs.

    Args:
      params: a CLIP's parameters.
      config: its sizes.
      mean: of RGB 0..255, in training.
      std: of RGB 0..255, in training.
      where: a file's name, for messages.

    Raises ValueError where they differ for a ResNet, whose padding is not at the same grey.
    """
    mean, std, clip_mean, clip_std = (
        np.asarray(x, np.float64) for x in (mean, std, CLIP_MEAN, CLIP_STD)
    )
    if np.allclose(mean, clip_mean, rtol=0, atol=1e-3) and np.allclose(
        std, clip_std, rtol=0, atol=1e-3
    ):
        return dict(params)
    if config.is_resnet:
        raise ValueError(
            f"{where}: mean {mean.tolist()} and std {std.tolist()} of pixels differ from OpenAI's; "
            "that is supported for ViTs only"
        )
    arrays = dict(tables.flatten(params))
    kernel_path, position_path = "visual/patch_embedding/kernel", "visual/position_embedding"
    kernel_pcw = np.asarray(arrays[kernel_path], np.float64).reshape(-1, 3, config.vision_width)
    bias_w = np.einsum("pcw,c->w", kernel_pcw, (clip_mean - mean) / std)
    scaled_pcw = kernel_pcw * (clip_std / std)[None, :, None]
    position_tw = np.array(arrays[position_path], np.float64)
    position_tw[1:] += bias_w[None]
    arrays[kernel_path] = scaled_pcw.reshape(-1, config.vision_width).astype(np.float32)
    arrays[position_path] = position_tw.astype(np.float32)
    return tables.unflatten(arrays)
