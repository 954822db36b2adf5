"""Tables of names that convert the tensors of published CLIPs to parameters and back.

Every published tensor is used or has a reason in `LEFT_OUT`, and every parameter is filled.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from zegformer_jax.models.clip.model import CLIP, ClipConfig
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.tables import (
    CONV,
    FLAT,
    LINEAR,
    LINEAR_HEADS_IN,
    SAME,
    Entry,
    Layout,
    entry,
)

# Tensors that hold no parameter (regular expressions), and why they are left out.
LEFT_OUT = (
    (r"(text|vision)_model\.embeddings\.position_ids", "the constant 0, 1, 2, ..."),
    (r"input_resolution|context_length|vocab_size", "a size, known from another tensor's shape"),
    (r"(.*\.)?attn_mask", "the constant causal mask"),
    (r".*\.num_batches_tracked", "a count of training steps, which inference does not use"),
)

# Our matrix [inputs, W] has inputs (row, column, channel); published is [W, 3, row, column].
PATCH = Layout(
    lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
    lambda x: x.reshape(*[math.isqrt(len(x) // 3)] * 2, 3, -1).transpose(3, 2, 0, 1),
)

# Columns: parameter, OpenAI's name, Hugging Face's name, layout. {x} is q, k and v; the three are
# joined.
_BLOCK = (
    ("ln_1/scale", "ln_1.weight", "layer_norm1.weight", SAME),
    ("ln_1/bias", "ln_1.bias", "layer_norm1.bias", SAME),
    ("attention/qkv/kernel", "attn.in_proj_weight", "self_attn.{x}_proj.weight", LINEAR),
    ("attention/qkv/bias", "attn.in_proj_bias", "self_attn.{x}_proj.bias", FLAT),
    (
        "attention/out/kernel",
        "attn.out_proj.weight",
        "self_attn.out_proj.weight",
        LINEAR_HEADS_IN,
    ),
    ("attention/out/bias", "attn.out_proj.bias", "self_attn.out_proj.bias", SAME),
    ("ln_2/scale", "ln_2.weight", "layer_norm2.weight", SAME),
    ("ln_2/bias", "ln_2.bias", "layer_norm2.bias", SAME),
    ("mlp_in/kernel", "mlp.c_fc.weight", "mlp.fc1.weight", LINEAR),
    ("mlp_in/bias", "mlp.c_fc.bias", "mlp.fc1.bias", SAME),
    ("mlp_out/kernel", "mlp.c_proj.weight", "mlp.fc2.weight", LINEAR),
    ("mlp_out/bias", "mlp.c_proj.bias", "mlp.fc2.bias", SAME),
)
# The ViT: under visual/, "visual." and "vision_model."; projections are in Naming.
_VIT = (
    ("class_embedding", "class_embedding", "embeddings.class_embedding", SAME),
    ("position_embedding", "positional_embedding", "embeddings.position_embedding.weight", SAME),
    ("patch_embedding/kernel", "conv1.weight", "embeddings.patch_embedding.weight", PATCH),
    ("ln_pre/scale", "ln_pre.weight", "pre_layrnorm.weight", SAME),
    ("ln_pre/bias", "ln_pre.bias", "pre_layrnorm.bias", SAME),
    ("ln_post/scale", "ln_post.weight", "post_layernorm.weight", SAME),
    ("ln_post/bias", "ln_post.bias", "post_layernorm.bias", SAME),
)
# The text tower: under text/, "" and "text_model.".
_TEXT = (
    (
        "token_embedding/embedding",
        "token_embedding.weight",
        "embeddings.token_embedding.weight",
        SAME,
    ),
    ("position_embedding", "positional_embedding", "embeddings.position_embedding.weight", SAME),
    ("ln_final/scale", "ln_final.weight", "final_layer_norm.weight", SAME),
    ("ln_final/bias", "ln_final.bias", "final_layer_norm.bias", SAME),
)
_NORM = (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var"))
# A ResNet's block: our convolution, its published name, its norm's published name.
_CONVS = tuple((f"conv{i}", f"conv{i}", f"bn{i}") for i in (1, 2, 3))
_SHORTCUT = ("shortcut", "downsample.0", "downsample.1")
_POOL = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "c_proj"))


class Naming(NamedTuple):
    """A publisher's names of tensors.

    Attributes:
        column: Index of the publisher's names in the rows of the tables above.
        visual: Prefix of the image tower's names.
        visual_blocks: Prefix of the image tower's numbered blocks.
        visual_projection: Name of the image tower's projection.
        text: Prefix of the text tower's names.
        text_blocks: Prefix of the text tower's numbered blocks.
        text_projection: Name of the text tower's projection.
        projection: Layout of the projections: SAME for [W, D], LINEAR for [D, W].
    """

    column: int
    visual: str
    visual_blocks: str
    visual_projection: str
    text: str
    text_blocks: str
    text_projection: str
    projection: Layout


# OpenCLIP has OpenAI's names, too.
OPENAI = Naming(
    column=1,
    visual="visual.",
    visual_blocks="visual.transformer.resblocks",
    visual_projection="visual.proj",
    text="",
    text_blocks="transformer.resblocks",
    text_projection="text_projection",
    projection=SAME,
)
HUGGING_FACE = Naming(
    column=2,
    visual="vision_model.",
    visual_blocks="vision_model.encoder.layers",
    visual_projection="visual_projection.weight",
    text="text_model.",
    text_blocks="text_model.encoder.layers",
    text_projection="text_projection.weight",
    projection=LINEAR,
)


def table(config: ClipConfig, naming: Naming) -> list[Entry]:
    """Lists the published name of each parameter of a CLIP, by its path (`visual/projection`).

    Args:
        config: The CLIP's sizes.
        naming: The publisher's names.

    Raises:
        ValueError: The CLIP has a ResNet, for which the publisher has no names.
    """
    rows = [entry("logit_scale", "logit_scale")]
    if not config.is_resnet:
        rows += _rows(_VIT, "visual/", naming.visual, naming.column)
        rows += _blocks("visual", naming.visual_blocks, config.vision_layers, naming.column)
        rows += [entry("visual/projection", naming.visual_projection, naming.projection)]
    elif naming is HUGGING_FACE:
        raise ValueError("transformers has no CLIP with a ResNet, hence no names for its tensors")
    else:
        rows += _resnet(config.vision_layers)
    rows += _rows(_TEXT, "text/", naming.text, naming.column)
    rows += _blocks("text", naming.text_blocks, config.text_layers, naming.column)
    rows += [entry("text/projection", naming.text_projection, naming.projection)]
    return rows


def read_parameters(
    tensors: Mapping[str, np.ndarray], config: ClipConfig, naming: Naming, where: str
) -> dict:
    """Converts published tensors to CLIP's parameter tree of float32 NumPy arrays.

    Args:
        tensors: Arrays by their published names.
        config: The CLIP's sizes.
        naming: The publisher's names.
        where: A file's name, for messages.

    Raises:
        UserError: The named tensor is missing, unknown in a model of this config, or of another
            shape.
    """
    arrays, _ = tables.read(
        table(config, naming), tensors, parameter_shapes(config), where, left_out=LEFT_OUT
    )
    return tables.unflatten(arrays)


def published_tensors(
    params: Mapping[str, Any], config: ClipConfig, naming: Naming
) -> dict[str, np.ndarray]:
    """Converts CLIP's parameters to published float32 tensors: the inverse of `read_parameters`.

    Args:
        params: The CLIP's parameters.
        config: Its sizes.
        naming: The publisher's names.

    Raises:
        ValueError: The named parameter does not fit the config.
    """
    arrays = tables.flatten(params)
    shapes = parameter_shapes(config)
    if odd := sorted(set(arrays) ^ set(shapes)):
        raise ValueError(f"CLIP's parameters: '{odd[0]}' is missing or has no place in {config}")
    for path, array in arrays.items():
        if np.shape(array) != shapes[path]:
            raise ValueError(
                f"CLIP's parameters: '{path}' is {list(np.shape(array))}, "
                f"the config needs {list(shapes[path])}"
            )
    return tables.write(table(config, naming), arrays)


@functools.lru_cache(maxsize=8)  # a fifth of a second each
def parameter_shapes(config: ClipConfig) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of a CLIP's parameters by their paths, without allocating them."""
    side = config.image_size
    variables = jax.eval_shape(
        CLIP(config).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, side, side, 3), np.float32),
        jax.ShapeDtypeStruct((1, config.context_length), np.int32),
    )
    return tables.shapes_of(variables["params"])


def _rows(rows: tuple, path: str, prefix: str, column: int) -> Iterator[Entry]:
    for row in rows:
        name = prefix + row[column]
        names = tuple(name.format(x=x) for x in "qkv") if "{x}" in name else (name,)
        yield Entry((path + row[0],), names, row[3])


def _blocks(tower: str, prefix: str, count: int, column: int) -> Iterator[Entry]:
    for i in range(count):
        yield from _rows(_BLOCK, f"{tower}/block_{i}/", f"{prefix}.{i}.", column)


def _resnet(layers: tuple[int, ...]) -> Iterator[Entry]:
    for i in (1, 2, 3):
        yield from _conv_norm(f"visual/stem{i}", f"visual.conv{i}", f"visual.bn{i}")
    for stage, count in enumerate(layers, start=1):
        for i in range(count):
            path, prefix = f"visual/layer{stage}_{i}", f"visual.layer{stage}.{i}"
            for ours, conv, norm in (*_CONVS, _SHORTCUT) if i == 0 else _CONVS:
                yield from _conv_norm(f"{path}/{ours}", f"{prefix}.{conv}", f"{prefix}.{norm}")
    path, prefix = "visual/attention_pool", "visual.attnpool"
    yield entry(f"{path}/position_embedding", f"{prefix}.positional_embedding")
    for ours, theirs in _POOL:
        kernel, bias = (LINEAR_HEADS_IN, SAME) if ours == "out" else (LINEAR, FLAT)
        yield entry(f"{path}/{ours}/kernel", f"{prefix}.{theirs}.weight", kernel)
        yield entry(f"{path}/{ours}/bias", f"{prefix}.{theirs}.bias", bias)


def _conv_norm(path: str, conv: str, norm: str) -> Iterator[Entry]:
    yield entry(f"{path}/conv/kernel", f"{conv}.weight", CONV)
    for ours, theirs in _NORM:
        yield entry(f"{path}/norm/{ours}", f"{norm}.{theirs}")
