"""Swin Transformer backbones (Liu et al., 2021, arXiv 2103.14030), as dense prediction uses them.

Dense prediction's variant takes images of any size: it pads maps to whole windows, always at the
published window, and norms every output; the classifier's shrinks a window that exceeds its map.

Weights are read by the names that three publishers use. `microsoft`: the authors' classifiers,
where a stage ends with the next one's patch merging. `timm`: timm's since 0.9, where a stage
starts with it; older ones are `microsoft`. `detectron2`: dense prediction's, the authors' names
and a norm for every output.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from zegformer_jax.models.backbones.backbone import Absent, Backbone, Name, Published, Tensors
from zegformer_jax.models.backbones.windows import (
    LINEAR_INIT,
    WindowAttention,
    pad_to_multiple,
    relative_index,
)
from zegformer_jax.models.layers import PYTORCH_INIT, layer_norm
from zegformer_jax.runtime.errors import UserError

PATCH_SIZE = 4  # pixels of a side; section 3.1
LAYOUTS = ("microsoft", "timm", "detectron2")
LEFT_OUT = (
    (r"(.*\.)?attn_mask", "the masks of shifted windows are computed from the image's size"),
    (r"(.*\.)?relative_position_index", "the offsets are computed from the window's size"),
)
CLASSIFIER_LEFT_OUT = (
    (r"head\..*", "the classifier's head"),
    (r"norm\.(weight|bias)", "the classifier's final norm"),
)
PATCH_EMBEDDING = "patch_embed.proj.weight"
BIAS_TABLE = "attn.relative_position_bias_table"

# Section 3.3. The windows are those of the checkpoints that segmentation starts from: of 224
# pixels for tiny and small, of 384 for base and large (which also exist with 224 and 7).
SWIN = {
    "tiny": {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "window": 7},
    "small": {"width": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), "window": 7},
    "base": {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "window": 12},
    "large": {"width": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48), "window": 12},
}
# The authors' weights: tiny and small trained on ImageNet-1K, base and large on ImageNet-22K.
STORAGE = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_"
STARTS = {"tiny": "7_224", "small": "7_224", "base": "12_384_22k", "large": "12_384_22k"}


class SwinBlock(nn.Module):
    """Window attention and feed-forward, pre-norm, each dropped whole at the rate `drop_path`."""

    heads: int
    window: int
    shift: int
    mlp_ratio: float
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_bhwc: jax.Array, deterministic: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, C]."""
        channels = x_bhwc.shape[-1]

        def drop(branch: jax.Array) -> jax.Array:
            # One draw an image: stochastic depth (Huang et al., 2016).
            dropout = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3))
            return dropout(branch, deterministic=deterministic)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, kernel_init=LINEAR_INIT, dtype=self.dtype, name=name)

        attention = WindowAttention(
            self.heads, self.window, self.shift, self.dtype, name="attention"
        )
        x = x_bhwc + drop(attention(layer_norm("norm1", self.dtype)(x_bhwc)))
        y = dense(int(channels * self.mlp_ratio), "mlp_in")(layer_norm("norm2", self.dtype)(x))
        y = dense(channels, "mlp_out")(nn.gelu(y, approximate=False))
        return x + drop(y)


class PatchMerging(nn.Module):
    """Joins 2x2 pixels: half the resolution, twice the channels (section 3.1)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), 2 C]."""
        channels = x_bhwc.shape[-1]
        # The published order of the four pixels goes down the columns.
        x = rearrange(
            pad_to_multiple(x_bhwc, 2),
            "b (h down) (w right) c -> b h w (right down c)",
            down=2,
            right=2,
        )
        x = layer_norm("norm", self.dtype)(x)
        reduction = nn.Dense(
            2 * channels,
            use_bias=False,
            kernel_init=LINEAR_INIT,
            dtype=self.dtype,
            name="reduction",
        )
        return reduction(x)


class SwinTransformer(nn.Module):
    """A Swin Transformer that returns the normed feature maps of its stages.

    Attributes:
        width: Channels of the first stage; doubles every stage.
        depths: Blocks of each stage; every second one has shifted windows.
        heads: Attention heads of each stage.
        window: Side of an attention window in tokens.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of their inputs.
        drop_path: Stochastic depth of the last block, rising linearly from 0.
        dtype: Compute dtype; parameters are float32.
        remat: Computes the blocks again in the backward pass: less memory, more time.
    """

    width: int = 96
    depths: Sequence[int] = (2, 2, 6, 2)
    heads: Sequence[int] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    drop_path: float = 0.3  # of the authors' segmentation configs
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images_bhwc: jax.Array, deterministic: bool = True) -> dict[str, jax.Array]:
        """Computes res2..res5 (strides 4, 8, 16, 32) of normalised images [B, H, W, 3].

        Sides that the strides do not divide are padded with zeros at the bottom and right. Needs
        the random stream `dropout` where it is not deterministic.
        """
        x = pad_to_multiple(images_bhwc.astype(self.dtype), PATCH_SIZE)
        x = nn.Conv(
            self.width,
            (PATCH_SIZE, PATCH_SIZE),
            strides=PATCH_SIZE,
            padding="VALID",
            kernel_init=PYTORCH_INIT,
            dtype=self.dtype,
            name="patch_embedding",
        )(x)
        x = layer_norm("patch_norm", self.dtype)(x)
        rates = iter(np.linspace(0, self.drop_path, sum(self.depths)).tolist())
        maps = {}
        block = nn.remat(SwinBlock, static_argnums=2) if self.remat else SwinBlock
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            name = f"res{stage + 2}"
            if stage > 0:
                x = PatchMerging(self.dtype, name=f"{name}_merging")(x)
            for index in range(depth):
                x = block(
                    heads=heads,
                    window=self.window,
                    shift=self.window // 2 if index % 2 else 0,
                    mlp_ratio=self.mlp_ratio,
                    drop_path=next(rates),
                    dtype=self.dtype,
                    name=f"{name}_{index}",
                )(x, deterministic)
            maps[name] = layer_norm(f"{name}_norm", self.dtype)(x)
        return maps


def names(module: SwinTransformer, layout: str = "detectron2") -> list[Name]:
    """Names of a Swin's arrays.

    Args:
        module: Of the file's sizes.
        layout: One of `LAYOUTS`; only `detectron2` has the norms of the outputs, `res2_norm` to
            `res5_norm`.

    Raises:
        UserError: The layout is not known.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout '{layout}': choose one of {', '.join(LAYOUTS)}")
    found = _linear("patch_embedding", "patch_embed.proj", "conv")
    found += _norm("patch_norm", "patch_embed.norm")
    for stage, depth in enumerate(module.depths):
        path = f"res{stage + 2}"
        for index in range(depth):
            found += _block(f"{path}_{index}", f"layers.{stage}.blocks.{index}")
        if stage > 0:
            name = f"layers.{stage if layout == 'timm' else stage - 1}.downsample"
            found += _norm(f"{path}_merging/norm", f"{name}.norm")
            found += _linear(f"{path}_merging/reduction", f"{name}.reduction", bias=False)
        if layout == "detectron2":
            found += _norm(f"{path}_norm", f"norm{stage}")
    return found


def infer_sizes(tensors: Tensors) -> dict[str, Any]:
    """Reads a Swin's attributes off its tensors' names and shapes.

    Raises:
        UserError: A tensor that tells a size is missing or has an impossible shape.
    """
    width = tensors.shape(PATCH_EMBEDDING, 4)[0]
    depths = tuple(
        tensors.count(f"layers.{stage}.blocks.") for stage in range(tensors.count("layers."))
    )
    hint = ", which a Swin has and a Swin V2 has not"
    tables = [
        tensors.shape(f"layers.{stage}.blocks.0.{BIAS_TABLE}", 2, hint)
        for stage in range(max(1, len(depths)))
    ]
    offsets = tables[0][0]
    window = (math.isqrt(offsets) + 1) // 2
    if (2 * window - 1) ** 2 != offsets:
        raise UserError(
            f"{tensors.where}: tensor '{tensors.prefix}layers.0.blocks.0.{BIAS_TABLE}' has "
            f"{offsets} rows; for a window of side w it has (2 w - 1)^2"
        )
    heads = tuple(heads for _, heads in tables)
    return {"width": width, "depths": depths, "heads": heads, "window": window}


def recognise(tensors: Tensors) -> Published:
    """Recognises a file with a Swin, in any of `LAYOUTS`.

    Raises:
        UserError: A tensor that tells a size is missing or has an impossible shape.
    """
    sizes = infer_sizes(tensors)
    module = SwinTransformer(**sizes)
    found = names(module, _find_layout(tensors.names()))
    norms = {row.path for row in names(module)} - {row.path for row in found}
    absent = [Absent(path, "a classifier has no norms of the outputs") for path in sorted(norms)]
    return Published(sizes, found, LEFT_OUT + CLASSIFIER_LEFT_OUT, absent)


def constants(module: SwinTransformer) -> dict[str, np.ndarray]:
    """The published module's indices of offsets, int64."""
    index = relative_index(module.window).astype(np.int64)
    return {
        f"layers.{stage}.blocks.{block}.attn.relative_position_index": index
        for stage, depth in enumerate(module.depths)
        for block in range(depth)
    }


def _find_layout(found: Sequence[str]) -> str:
    if any(re.match(r"norm\d\.", name) for name in found):
        return "detectron2"
    merges_at_end = any(name.startswith("layers.0.downsample.") for name in found)
    return "microsoft" if merges_at_end else "timm"


def _block(path: str, name: str) -> list[Name]:
    table = Name(f"params/{path}/attention/relative_position_bias", f"{name}.{BIAS_TABLE}")
    return [
        *_norm(f"{path}/norm1", f"{name}.norm1"),
        *_linear(f"{path}/attention/qkv", f"{name}.attn.qkv"),
        table,
        *_linear(f"{path}/attention/out", f"{name}.attn.proj"),
        *_norm(f"{path}/norm2", f"{name}.norm2"),
        *_linear(f"{path}/mlp_in", f"{name}.mlp.fc1"),
        *_linear(f"{path}/mlp_out", f"{name}.mlp.fc2"),
    ]


def _norm(path: str, name: str) -> list[Name]:
    leaves = (("scale", "weight"), ("bias", "bias"))
    return [Name(f"params/{path}/{ours}", f"{name}.{theirs}") for ours, theirs in leaves]


def _linear(path: str, name: str, layout: str = "linear", bias: bool = True) -> list[Name]:
    kernel = Name(f"params/{path}/kernel", f"{name}.weight", layout)
    return [kernel] + [Name(f"params/{path}/bias", f"{name}.bias")] * bias


BACKBONE = Backbone(
    module=SwinTransformer,
    variants={f"swin_{size[0]}": sizes for size, sizes in SWIN.items()},
    marks=(PATCH_EMBEDDING,),
    names=names,
    infer_sizes=infer_sizes,
    recognise=recognise,
    constants=constants,
    left_out=LEFT_OUT,
    optimiser_groups=((".*relative_position_bias", {"weight_decay": 0.0}),),
    starts={f"swin_{x[0]}": f"{STORAGE}{x}_patch4_window{end}.pth" for x, end in STARTS.items()},
)
