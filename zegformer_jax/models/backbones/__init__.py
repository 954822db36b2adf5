"""The backbones by their names in a config, and their sections of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from zegformer_jax.models.backbones import resnet, swin
from zegformer_jax.models.backbones.backbone import Backbone
from zegformer_jax.runtime.errors import UserError

BACKBONES = {"resnet": resnet.BACKBONE, "swin": swin.BACKBONE}
NOT_FIELDS = ("dtype", "remat", "parent", "name")  # attributes that other fields of a config tell


def backbone_fields(name: str, **sizes: Any) -> dict[str, Any]:
    """Returns a config's section `model.backbone`.

    Args:
        name: One of `BACKBONES`.
        **sizes: Attributes of its module; the others have their defaults.

    Raises:
        UserError: The name or an attribute is not known.
    """
    attributes = dataclasses.fields(find_backbone(name).module)
    fields = {x.name: x.default for x in attributes if x.name not in NOT_FIELDS}
    if unknown := sorted(sizes.keys() - fields):
        raise UserError(
            f"model.backbone: {name} has no field '{unknown[0]}' but {', '.join(fields)}: choose "
            "another backbone by the config's variant"
        )
    return {"name": name} | fields | sizes


def backbone_variants() -> dict[str, dict[str, Any]]:
    """Returns the published sizes of all backbones by the names that follow a config's colon."""
    return {
        variant: {"name": name} | dict(sizes)
        for name, backbone in BACKBONES.items()
        for variant, sizes in backbone.variants.items()
    }


def build_backbone(
    sizes: Mapping[str, Any], dtype: str = "float32", remat: bool = False
) -> nn.Module:
    """Makes a backbone.

    Args:
        sizes: `name`, one of `BACKBONES`, and attributes of its module; the others have their
            defaults.
        dtype: Compute dtype.
        remat: Computes the blocks again in the backward pass: less memory, more time.

    Raises:
        UserError: The name or an attribute is not known.
    """
    fields = backbone_fields(**sizes)
    name = fields.pop("name")
    attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return BACKBONES[name].module(**attributes, dtype=jnp.dtype(dtype), remat=remat)


def find_backbone(name: str) -> Backbone:
    """Returns a backbone by its name; raises UserError if there is none."""
    if name not in BACKBONES:
        raise UserError(f"model.backbone.name '{name}': choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name]
