"""Flax modules. They take plain values; `build` makes them from nested mappings of values."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from zegformer_jax.models.backbones import build_backbone
from zegformer_jax.models.classifier import Classifier
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.per_pixel import PerPixel
from zegformer_jax.models.pixel_decoder import PixelDecoder
from zegformer_jax.models.transformer import TransformerDecoder
from zegformer_jax.runtime.errors import UserError

# The modules that each kind of model is made of, and the values that it takes as they are.
PARTS = {"pixel_decoder": PixelDecoder, "transformer": TransformerDecoder}
MODELS = {
    "zegformer": (Grouper, ("pixel_decoder", "transformer"), ("memory",)),
    "per_pixel": (PerPixel, ("pixel_decoder",), ()),
    "classifier": (Classifier, (), ()),
}
KINDS = tuple(MODELS)


def build(
    kind: str,
    sizes: Mapping[str, Any],
    embed_dim: int,
    dtype: str = "float32",
    remat: bool = False,
) -> Grouper | PerPixel | Classifier:
    """Makes a grouper (`zegformer`), the baseline (`per_pixel`) or their start (`classifier`).

    Args:
        kind: One of `KINDS`.
        sizes: The modules' attributes by module: `backbone` (see `build_backbone`),
            `pixel_decoder`, `transformer`; and `memory`, the backbone's map that the transformer
            attends to.
        embed_dim: Size of the text embeddings.
        dtype: Compute dtype.
        remat: Computes the backbone's blocks again in the backward pass: less memory, more time.

    Raises:
        UserError: The kind, or the backbone's name, is not known.
    """
    if kind not in MODELS:
        raise UserError(f"model.kind '{kind}': choose one of {', '.join(KINDS)}")
    module, parts, values = MODELS[kind]
    compute = jnp.dtype(dtype)
    return module(
        backbone=build_backbone(sizes["backbone"], dtype, remat),
        embed_dim=embed_dim,
        dtype=compute,
        **{part: PARTS[part](**sizes[part], dtype=compute) for part in parts},
        **{value: sizes[value] for value in values},
    )
