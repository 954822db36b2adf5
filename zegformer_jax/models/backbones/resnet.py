"""ResNet backbones (He et al., 2016) with frozen batch norm or group norm."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.layers import (
    NORM_GROUPS,
    Bottleneck,
    ConvNorm,
    FrozenBatchNorm,
    Norm,
    group_norm,
)
from zegformer_jax.runtime.errors import UserError

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # He et al., table 1


def max_pool(x_bhwc: jax.Array) -> jax.Array:
    """Pools 3x3 windows at stride 2 with padding 1: [B, H, W, C] to [B, H/2, W/2, C], even H, W.

    As maxima of slices: the gradient of `reduce_window` took 18 times as long on a CPU.
    """
    _, height, width, _ = x_bhwc.shape
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jnp.pad(x_bhwc, padding, constant_values=-jnp.inf)
    top, middle, bottom = (x[:, i : i + height - 1 : 2] for i in range(3))
    x = jnp.maximum(jnp.maximum(top, middle), bottom)
    left, centre, right = (x[:, :, i : i + width - 1 : 2] for i in range(3))
    return jnp.maximum(jnp.maximum(left, centre), right)


class ResNet(nn.Module):
    """A ResNet that gives the feature maps of its four stages.

    Attributes:
        blocks: bottleneck blocks in each stage, `BLOCKS[50]` for ResNet-50.
        stem_width: channels of the 7x7 stem (64 in the paper).
        bottleneck_width: channels inside the blocks of the first stage (64); doubles every stage.
        stage_width: channels that come out of the first stage (256); doubles every stage.
        norm: `frozen_batch` (a pretrained backbone) or `group` (training from nothing).
        norm_groups: of the group norm. Few channels want few groups: a group of one channel is
            blown up to unit variance where it has nothing to say.
        dtype: what to compute in; parameters are float32.
        remat: whether blocks are computed again in the backward pass: less memory, more time.
    """

    blocks: Sequence[int] = BLOCKS[50]
    stem_width: int = 64
    bottleneck_width: int = 64
    stage_width: int = 256
    norm: str = "frozen_batch"
    norm_groups: int = NORM_GROUPS
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images_bhwc: jax.Array, deterministic: bool = True) -> dict[str, jax.Array]:
        """Computes res2..res5 (strides 4, 8, 16, 32) of normalised images [B, H, W, 3].

        H and W are multiples of 32. Nothing here is random: `deterministic` is taken so that
        every backbone is called alike.
        """
        del deterministic
        kind = {"norm": self._norm(), "dtype": self.dtype}
        stem = ConvNorm(self.stem_width, 7, 2, **kind, name="stem")
        x = nn.relu(stem(images_bhwc.astype(self.dtype)))
        x = max_pool(x)
        maps = {}
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for stage, blocks in enumerate(self.blocks):
            for index in range(blocks):
                x = block(
                    features=self.stage_width * 2**stage,
                    bottleneck=self.bottleneck_width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    **kind,
                    name=f"res{stage + 2}_{index}",
                )(x)
            maps[f"res{stage + 2}"] = x
        return maps

    def _norm(self) -> Norm:
        if self.norm == "frozen_batch":
            return FrozenBatchNorm
        if self.norm == "group":
            return functools.partial(group_norm, self.norm_groups)
        raise UserError(f"backbone norm '{self.norm}': choose 'frozen_batch' or 'group'")
