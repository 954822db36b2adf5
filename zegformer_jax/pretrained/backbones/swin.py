"""Swin backbones' weights: the names that three publishers use, and ours.

`microsoft`: the authors' classifiers, where a stage ends with the next one's patch merging.
`timm`: timm's since 0.9, where a stage starts with it; older ones are `microsoft`.
`detectron2`: dense prediction's, the authors' names and a norm for every output, as a rule after
`backbone.`.
"""

import math
import re

import jax
import numpy as np

from zegformer_jax.models.backbones.swin import SwinSizes, SwinTransformer
from zegformer_jax.pretrained.tables import (
    CONV,
    LINEAR,
    Entry,
    Layout,
    Summary,
    Tensors,
    entry,
    read,
    shapes_of,
)
from zegformer_jax.runtime.errors import UserError

LAYOUTS = ("microsoft", "timm", "detectron2")
PREFIXES = ("", "backbone.")  # that stand before the names, of any layout
BACKBONE = "params/backbone"  # where our arrays are
LEFT_OUT = [
    (r"(.*\.)?attn_mask", "the masks of shifted windows are computed from the image's size"),
    (r"(.*\.)?relative_position_index", "the offsets are computed from the window's size"),
    (r"head\..*", "the classifier's head"),
    (r"norm\.(weight|bias)", "the classifier's final norm"),
]
NEW = [(rf"{BACKBONE}/res\d_norm/.*", "a classifier has no norms of the outputs")]
PATCH_EMBEDDING = "patch_embed.proj.weight"
BIAS_TABLE = "attn.relative_position_bias_table"


def table(sizes: SwinSizes, layout: str, prefix: str = "") -> list[Entry]:
    """Gives the entries of a backbone, under `params/backbone`.

    Only `detectron2` has the norms of the outputs, `res2_norm` to `res5_norm`.

    Args:
        sizes: of the model.
        layout: one of `LAYOUTS`.
        prefix: what stands before the published names, `backbone.`.

    Raises:
        ValueError: the layout is not known.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout '{layout}': choose one of {', '.join(LAYOUTS)}")
    rows = _linear(f"{BACKBONE}/patch_embedding", f"{prefix}patch_embed.proj", CONV)
    rows += _norm(f"{BACKBONE}/patch_norm", f"{prefix}patch_embed.norm")
    for stage, depth in enumerate(sizes.depths):
        path = f"{BACKBONE}/res{stage + 2}"
        for index in range(depth):
            rows += _block(f"{path}_{index}", f"{prefix}layers.{stage}.blocks.{index}")
        if stage > 0:
            holder = stage if layout == "timm" else stage - 1
            name = f"{prefix}layers.{holder}.downsample"
            rows += _norm(f"{path}_merging/norm", f"{name}.norm")
            rows += _linear(f"{path}_merging/reduction", f"{name}.reduction", bias=False)
        if layout == "detectron2":
            rows += _norm(f"{path}_norm", f"{prefix}norm{stage}")
    return rows


def find_layout(tensors: Tensors, where: str) -> tuple[str, str]:
    """Tells the layout and the prefix of a backbone's names.

    Raises:
        ValueError: there is no Swin backbone.
    """
    prefix = next((prefix for prefix in PREFIXES if prefix + PATCH_EMBEDDING in tensors), None)
    if prefix is None:
        raise UserError(
            f"{where}: no tensor '{PATCH_EMBEDDING}' or 'backbone.{PATCH_EMBEDDING}': "
            "there is no Swin backbone"
        )
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    if any(re.match(r"norm\d\.", name) for name in names):
        return "detectron2", prefix
    merges_at_end = any(name.startswith("layers.0.downsample.") for name in names)
    return ("microsoft" if merges_at_end else "timm"), prefix


def infer_sizes(tensors: Tensors, where: str, prefix: str = "") -> SwinSizes:
    """Reads a backbone's sizes off its tensors' names and shapes.

    Raises:
        ValueError: a tensor that tells a size is missing or has an impossible shape.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if prefix + name not in tensors:
            hint = ", which a Swin has and a Swin V2 has not" if name.endswith(BIAS_TABLE) else ""
            raise UserError(f"{where}: no tensor '{prefix}{name}'{hint}")
        found = tuple(tensors[prefix + name].shape)
        if len(found) != axes:
            raise UserError(
                f"{where}: tensor '{prefix}{name}' is {list(found)}, it should have {axes} axes"
            )
        return found

    width = shape(PATCH_EMBEDDING, 4)[0]
    pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.blocks\.(\d+)\.")
    blocks = [(int(m[1]), int(m[2])) for m in map(pattern.match, tensors) if m]
    stages = range(1 + max((stage for stage, _ in blocks), default=0))
    tables = [shape(f"layers.{stage}.blocks.0.{BIAS_TABLE}", 2) for stage in stages]
    depths = tuple(1 + max(block for s, block in blocks if s == stage) for stage in stages)
    offsets = tables[0][0]
    window = (math.isqrt(offsets) + 1) // 2
    if (2 * window - 1) ** 2 != offsets:
        raise UserError(
            f"{where}: tensor '{prefix}layers.0.blocks.0.{BIAS_TABLE}' has {offsets} rows; "
            "for a window of side w it has (2 w - 1)^2"
        )
    return SwinSizes(width, depths, tuple(heads for _, heads in tables), window)


def read_swin(tensors: Tensors, where: str) -> tuple[SwinSizes, dict[str, np.ndarray], Summary]:
    """Reads a backbone of any layout, from a file that holds it alone or with other parts.

    Args:
        tensors: all that the file holds; `{"model": ...}` and the like are unwrapped.
        where: the file's name, for messages.

    Returns:
        the model's sizes; its arrays, float32, by their paths under `params/backbone`, without
        the norms of the outputs where the file has none; and what became of every tensor.

    Raises:
        ValueError: a tensor is missing, has no place or has another shape; it is named.
    """
    layout, prefix = find_layout(tensors, where)
    sizes = infer_sizes(tensors, where, prefix)
    model = SwinTransformer(**sizes._asdict())
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    parameters = {"params": {"backbone": variables["params"]}}
    others = [(f"(?!{re.escape(prefix)}).*", "not of the backbone")] if prefix else []
    arrays, summary = read(
        table(sizes, layout, prefix),
        tensors,
        shapes_of(parameters),
        where,
        left_out=LEFT_OUT + others,
        new=() if layout == "detectron2" else NEW,
    )
    return sizes, arrays, summary


def _block(path: str, name: str) -> list[Entry]:
    bias_table = entry(f"{path}/attention/relative_position_bias", f"{name}.{BIAS_TABLE}")
    return [
        *_norm(f"{path}/norm1", f"{name}.norm1"),
        *_linear(f"{path}/attention/qkv", f"{name}.attn.qkv"),
        bias_table,
        *_linear(f"{path}/attention/out", f"{name}.attn.proj"),
        *_norm(f"{path}/norm2", f"{name}.norm2"),
        *_linear(f"{path}/mlp_in", f"{name}.mlp.fc1"),
        *_linear(f"{path}/mlp_out", f"{name}.mlp.fc2"),
    ]


def _norm(path: str, name: str) -> list[Entry]:
    return [entry(f"{path}/scale", f"{name}.weight"), entry(f"{path}/bias", f"{name}.bias")]


def _linear(path: str, name: str, layout: Layout = LINEAR, bias: bool = True) -> list[Entry]:
    rows = [entry(f"{path}/kernel", f"{name}.weight", layout)]
    return rows + [entry(f"{path}/bias", f"{name}.bias")] * bias
