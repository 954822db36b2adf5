"""Folds another normalisation of pixels than OpenAI's into the weights of published CLIPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zegformer_jax.models.clip.model import CLIP_MEAN, CLIP_STD, ClipConfig
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.clip.configs import read_fields
from zegformer_jax.runtime import hugging_face
from zegformer_jax.runtime.errors import UserError

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
MAX_PIXEL = 255
MIN_STD, MAX_STD = 1e-3, 10  # of pixels 0..1; 1 is no scaling
TOLERANCE = 1e-3  # of pixels 0..255; published files round OpenAI's to 8 digits

Normalisation = tuple[np.ndarray, np.ndarray]


def from_hugging_face(directory: Path) -> Normalisation:
    """Reads the mean and standard deviation of a Hugging Face directory's image processor.

    Args:
        directory: The directory; without an image processor, the values are OpenAI's.

    Returns:
        Mean and standard deviation of RGB 0..255, two arrays [3].

    Raises:
        UserError: The file cannot be read.
    """
    if not any((directory / name).is_file() for name in PROCESSOR_FILES):
        return _normalisation(None, None)
    # CLIPImageProcessor needs torchvision; this class does not.
    reader = hugging_face.load_transformers().CLIPImageProcessorPil
    with hugging_face.errors_in_one_line(directory / PROCESSOR_FILES[0], "image processor"):
        processor = reader.from_pretrained(directory, local_files_only=True)
        return _normalisation(processor.image_mean, processor.image_std)


def from_open_clip(path: Path) -> Normalisation:
    """Reads the mean and standard deviation of OpenCLIP's config.

    Args:
        path: A file `open_clip_config.json`; without these fields, the values are OpenAI's.

    Returns:
        Mean and standard deviation of RGB 0..255, two arrays [3].

    Raises:
        UserError: The file cannot be read.
    """
    fields = read_fields(path).get("preprocess_cfg") or {}
    return _normalisation(fields.get("mean"), fields.get("std"))


def fold_normalisation(
    params: Mapping[str, Any],
    config: ClipConfig,
    mean: Sequence[float],
    std: Sequence[float],
    where: str,
) -> dict[str, Any]:
    """Converts a ViT trained on (p - mean) / std to inputs (p - CLIP_MEAN) / CLIP_STD, exactly.

    The patch embedding is linear: its kernel absorbs the ratio of the standard deviations, and the
    position embeddings of the patches absorb the constant from the difference of the means.

    Args:
        params: A CLIP's parameters.
        config: Its sizes.
        mean: Mean of RGB 0..255 in the CLIP's training.
        std: Standard deviation of RGB 0..255 in the CLIP's training.
        where: A file's name, for messages.

    Returns:
        The parameters; unchanged if the normalisations are equal.

    Raises:
        UserError: They differ and the CLIP is a ResNet, whose zero padding is another grey after
            the conversion.
    """
    mean, std, clip_mean, clip_std = (
        np.asarray(x, np.float64) for x in (mean, std, CLIP_MEAN, CLIP_STD)
    )
    if np.allclose((mean, std), (clip_mean, clip_std), rtol=0, atol=TOLERANCE):
        return dict(params)
    if config.is_resnet:
        raise UserError(
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


def _normalisation(mean: Any, std: Any) -> Normalisation:
    """Scales mean and standard deviation from 0..1 to 0..255; None takes OpenAI's.

    Raises:
        ValueError: They are not numbers in this range.
    """
    mean = np.divide(CLIP_MEAN, MAX_PIXEL) if mean is None else np.asarray(mean, np.float64)
    std = np.divide(CLIP_STD, MAX_PIXEL) if std is None else np.asarray(std, np.float64)
    if not (np.all((mean >= 0) & (mean <= 1)) and np.all((std >= MIN_STD) & (std <= MAX_STD))):
        raise ValueError(f"mean {mean.tolist()} and std {std.tolist()} of pixels are not in 0..1")
    return MAX_PIXEL * np.broadcast_to(mean, 3), MAX_PIXEL * np.broadcast_to(std, 3)
