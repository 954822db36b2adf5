"""CLIP's parameters from and to published tensors: the table of names, and strict reading.

No PyTorch. Every published tensor is used or left out for a reason that stands in ``LEFT_OUT``,
and every parameter is filled.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from zegformer_jax.models.clip import CLIP, ClipConfig

# Tensors that hold no parameter, and why they are left out.
LEFT_OUT = {
    "text_model.embeddings.position_ids": "the constant 0, 1, 2, ...",
    "vision_model.embeddings.position_ids": "the constant 0, 1, 2, ...",
    "input_resolution": "a size, known from the positional embedding",
    "context_length": "a size, known from the positional embedding",
    "vocab_size": "a size, known from the token embedding",
}

# Parameter, OpenAI's name, Hugging Face's name. {x} stands for q, k and v, one after the other.
_BLOCK_NAMES = (
    ("ln_1/scale", "ln_1.weight", "layer_norm1.weight"),
    ("ln_1/bias", "ln_1.bias", "layer_norm1.bias"),
    ("attention/qkv/kernel", "attn.in_proj_weight", "self_attn.{x}_proj.weight"),
    ("attention/qkv/bias", "attn.in_proj_bias", "self_attn.{x}_proj.bias"),
    ("attention/out/kernel", "attn.out_proj.weight", "self_attn.out_proj.weight"),
    ("attention/out/bias", "attn.out_proj.bias", "self_attn.out_proj.bias"),
    ("ln_2/scale", "ln_2.weight", "layer_norm2.weight"),
    ("ln_2/bias", "ln_2.bias", "layer_norm2.bias"),
    ("mlp_in/kernel", "mlp.c_fc.weight", "mlp.fc1.weight"),
    ("mlp_in/bias", "mlp.c_fc.bias", "mlp.fc1.bias"),
    ("mlp_out/kernel", "mlp.c_proj.weight", "mlp.fc2.weight"),
    ("mlp_out/bias", "mlp.c_proj.bias", "mlp.fc2.bias"),
)
_TOWER_NAMES = (
    ("logit_scale", "logit_scale", "logit_scale"),
    (
        "visual/class_embedding",
        "visual.class_embedding",
        "vision_model.embeddings.class_embedding",
    ),
    (
        "visual/position_embedding",
        "visual.positional_embedding",
        "vision_model.embeddings.position_embedding.weight",
    ),
    (
        "visual/patch_embedding/kernel",
        "visual.conv1.weight",
        "vision_model.embeddings.patch_embedding.weight",
    ),
    ("visual/ln_pre/scale", "visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
    ("visual/ln_pre/bias", "visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    ("visual/ln_post/scale", "visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    ("visual/ln_post/bias", "visual.ln_post.bias", "vision_model.post_layernorm.bias"),
    ("visual/projection", "visual.proj", "visual_projection.weight"),
    (
        "text/token_embedding/embedding",
        "token_embedding.weight",
        "text_model.embeddings.token_embedding.weight",
    ),
    (
        "text/position_embedding",
        "positional_embedding",
        "text_model.embeddings.position_embedding.weight",
    ),
    ("text/ln_final/scale", "ln_final.weight", "text_model.final_layer_norm.weight"),
    ("text/ln_final/bias", "ln_final.bias", "text_model.final_layer_norm.bias"),
    ("text/projection", "text_projection", "text_projection.weight"),
)


class Naming(NamedTuple):
    """How a publisher names tensors.

    ``column`` is the place of its names in the tables above; ``visual`` and ``text`` stand before
    the number of a block; ``transposed_projections``: its projections are [D, W], not [W, D].
    """

    column: int
    visual: str
    text: str
    transposed_projections: bool


OPENAI = Naming(1, "visual.transformer.resblocks", "transformer.resblocks", False)
HUGGING_FACE = Naming(2, "vision_model.encoder.layers", "text_model.encoder.layers", True)


class _Entry(NamedTuple):
    """Where a parameter comes from: published tensors (joined along their first axis)."""

    path: str
    names: tuple[str, ...]
    transposed: bool


def read_parameters(
    tensors: Mapping[str, np.ndarray], config: ClipConfig, naming: Naming, where: str
) -> dict:
    """Makes CLIP's parameter tree, float32 NumPy arrays, of published tensors by their names.

    ``where`` (a file's name) stands in error messages. Raises ValueError that names the tensor
    where one is missing, has no place in a model of this config, or is of another shape.
    """
    entries = _entries(config, naming)
    tensors = {name: x for name, x in tensors.items() if name not in LEFT_OUT}
    wanted = [name for entry in entries for name in entry.names]
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(f"{where}: no tensor '{missing[0]}' ({len(missing)} missing in all)")
    if surplus := sorted(set(tensors) - set(wanted)):
        raise ValueError(
            f"{where}: tensor '{surplus[0]}' has no place in this model "
            f"({len(surplus)} such in all): is it a ViT CLIP of {config}?"
        )
    shapes = _parameter_shapes(config)
    flat = {}
    for entry in entries:
        shape = shapes[entry.path]
        published = _published_shape(shape, entry, config.patch_size)
        flat[entry.path] = _to_flax(tensors, entry, published, where).reshape(shape)
    return traverse_util.unflatten_dict(flat, sep="/")


def published_tensors(
    params: Mapping[str, Any], config: ClipConfig, naming: Naming
) -> dict[str, np.ndarray]:
    """Gives the published tensors of CLIP's parameters, float32: read_parameters' inverse.

    Raises ValueError that names the parameter which does not fit the config.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    shapes = _parameter_shapes(config)
    if odd := sorted(set(flat) ^ set(shapes)):
        raise ValueError(f"CLIP's parameters: '{odd[0]}' is missing or has no place in {config}")
    tensors = {}
    for entry in _entries(config, naming):
        array = np.asarray(flat[entry.path], np.float32)
        if array.shape != shapes[entry.path]:
            raise ValueError(
                f"CLIP's parameters: '{entry.path}' is {list(array.shape)}, "
                f"the config needs {list(shapes[entry.path])}"
            )
        published = _published_shape(array.shape, entry, config.patch_size)
        if len(published) == 4:
            out, channels, rows, columns = published
            array = array.reshape(rows, columns, channels, out).transpose(3, 2, 0, 1)
        elif entry.transposed:
            array = array.reshape(published[::-1]).T
        array = array.reshape(published)
        parts = np.split(array, len(entry.names)) if len(entry.names) > 1 else [array]
        tensors |= {n: np.asarray(x, order="C") for n, x in zip(entry.names, parts, strict=True)}
    return tensors


def _entries(config: ClipConfig, naming: Naming) -> list[_Entry]:
    rows = [(row[0], row[naming.column]) for row in _TOWER_NAMES]
    for tower, layers in (("visual", config.vision_layers), ("text", config.text_layers)):
        for i in range(layers):
            prefix = f"{getattr(naming, tower)}.{i}"
            rows += [
                (f"{tower}/block_{i}/{row[0]}", f"{prefix}.{row[naming.column]}")
                for row in _BLOCK_NAMES
            ]
    entries = []
    for path, name in rows:
        names = tuple(name.format(x=x) for x in "qkv") if "{x}" in name else (name,)
        is_projection = path.endswith("projection")
        transposed = naming.transposed_projections if is_projection else path.endswith("kernel")
        entries.append(_Entry(path, names, transposed))
    return entries


def _parameter_shapes(config: ClipConfig) -> dict[str, tuple[int, ...]]:
    side = config.image_size
    shapes = jax.eval_shape(
        CLIP(config).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, side, side, 3), np.float32),
        jax.ShapeDtypeStruct((1, config.context_length), np.int32),
    )["params"]
    flat = traverse_util.flatten_dict(shapes, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def _published_shape(shape: tuple[int, ...], entry: _Entry, patch_size: int) -> tuple[int, ...]:
    """Gives the shape of the published tensor (joined, where there are several)."""
    if entry.path.endswith("patch_embedding/kernel"):
        return (shape[1], 3, patch_size, patch_size)
    if entry.path.endswith("qkv/bias"):
        return (int(np.prod(shape)),)
    if not entry.transposed:
        return shape
    inputs = shape[0] * shape[1] if len(shape) == 3 else shape[0]  # out/kernel: [heads, k, W]
    return (int(np.prod(shape)) // inputs, inputs)


def _to_flax(
    tensors: Mapping[str, np.ndarray], entry: _Entry, published: tuple[int, ...], where: str
) -> np.ndarray:
    part = (published[0] // len(entry.names), *published[1:]) if published else ()
    for name in entry.names:
        if tensors[name].shape != part:
            raise ValueError(
                f"{where}: tensor '{name}' is {list(tensors[name].shape)}, "
                f"the model needs {list(part)}"
            )
    parts = [np.asarray(tensors[name], np.float32) for name in entry.names]
    array = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if array.ndim == 4:  # a convolution, [out, in, row, column]
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.T) if entry.transposed else array
