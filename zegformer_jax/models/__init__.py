"""Flax modules. They take plain values; `build` makes them from nested mappings of values."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from zegformer_jax.models.backbones.resnet import ResNet
from zegformer_jax.models.backbones.swin import SwinTransformer
from zegformer_jax.models.classifier import Classifier
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.per_pixel import PerPixel
from zegformer_jax.models.pixel_decoder import PixelDecoder
from zegformer_jax.models.transformer import TransformerDecoder
from zegformer_jax.runtime.errors import UserError

KINDS = ("zegformer", "per_pixel", "classifier")
BACKBONES = {"resnet": ResNet, "swin": SwinTransformer}


def build(
    kind: str,
    sizes: Mapping[str, Any],
    embed_dim: int,
    dtype: str = "float32",
    remat: bool = False,
) -> Grouper | PerPixel | Classifier:
    """Makes a grouper (`zegformer`), the baseline (`per_pixel`) or their start (`classifier`).

    Args:
        kind: one of `KINDS`.
        sizes: the modules' attributes by module: `backbone` (see `build_backbone`),
            `pixel_decoder`, `transformer`; and `memory`, the backbone's map that the transformer
            attends to.
        embed_dim: size of the text embeddings.
        dtype: what to compute in.
        remat: whether the backbone's blocks are computed again in the backward pass.

    Raises:
        UserError: the kind, or the backbone's, is not known.
    """
    compute = jnp.dtype(dtype)
    parts = {
        "backbone": build_backbone(sizes["backbone"], dtype, remat),
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
    raise UserError(f"model.kind '{kind}': choose one of {', '.join(KINDS)}")


def build_backbone(
    sizes: Mapping[str, Any], dtype: str = "float32", remat: bool = False
) -> nn.Module:
    """Makes a backbone.

    Args:
        sizes: the module's attributes, and `kind`, one of `BACKBONES` (`resnet` where absent).
        dtype: what to compute in.
        remat: as in `build`.

    Raises:
        UserError: the kind is not known.
    """
    attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    kind = attributes.pop("kind", "resnet")
    if kind not in BACKBONES:
        raise UserError(f"model.backbone.kind '{kind}': choose one of {', '.join(BACKBONES)}")
    return BACKBONES[kind](**attributes, dtype=jnp.dtype(dtype), remat=remat)
