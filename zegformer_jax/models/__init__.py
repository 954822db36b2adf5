"""Flax modules. They take plain values; `build` makes them from nested mappings of values."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from zegformer_jax.models.classifier import Classifier
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.per_pixel import PerPixel
from zegformer_jax.models.pixel_decoder import PixelDecoder
from zegformer_jax.models.resnet import ResNet
from zegformer_jax.models.transformer import TransformerDecoder

KINDS = ("zegformer", "per_pixel", "classifier")


def build(
    kind: str, sizes: Mapping[str, Any], embed_dim: int, dtype: str = "float32"
) -> Grouper | PerPixel | Classifier:
    """Makes a grouper (`zegformer`), the baseline (`per_pixel`) or their start (`classifier`).

    Args:
        kind: one of `KINDS`.
        sizes: the modules' attributes by module: `backbone`, `pixel_decoder`, `transformer`;
            and `memory`, the backbone's map that the transformer attends to.
        embed_dim: size of the text embeddings.
        dtype: what to compute in.

    Raises:
        ValueError: the kind is not known.
    """
    compute = jnp.dtype(dtype)
    backbone = dict(sizes["backbone"])
    parts = {
        "backbone": ResNet(**backbone | {"blocks": tuple(backbone["blocks"])}, dtype=compute),
        "embed_dim": embed_dim,
        "dtype": compute,
    }
    if kind == "classifier":
        return Classifier(**parts)
    parts["pixel_decoder"] = PixelDecoder(**sizes["pixel_decoder"], dtype=compute)
    if kind == "per_pixel":
        return PerPixel(**parts)
    if kind == "zegformer":
        transformer = TransformerDecoder(**sizes["transformer"], dtype=compute)
        return Grouper(**parts, transformer=transformer, memory=sizes["memory"])
    raise ValueError(f"model.kind '{kind}': choose one of {', '.join(KINDS)}")
