"""ResNet backbones (He et al., 2016) with frozen batch norm or group norm."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

NORM_EPSILON = 1e-5  # PyTorch's default for batch and group norm
NORM_GROUPS = 32  # Wu & He, 2018
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # He et al., table 1


class FrozenBatchNorm(nn.Module):
    """Batch norm whose scale, bias, mean and variance are constants.

    They live in the collection `constants`, so that no optimiser and no gradient ever sees them.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., C] by the stored statistics."""
        shape = (x.shape[-1],)
        scale = self.variable("constants", "scale", jnp.ones, shape).value
        bias = self.variable("constants", "bias", jnp.zeros, shape).value
        mean = self.variable("constants", "mean", jnp.zeros, shape).value
        variance = self.variable("constants", "var", jnp.ones, shape).value
        factor = scale * jax.lax.rsqrt(variance + NORM_EPSILON)
        offset = bias - mean * factor
        leading = (1,) * (x.ndim - 1)
        return x * factor.astype(self.dtype).reshape(leading + shape) + offset.astype(
            self.dtype
        ).reshape(leading + shape)


def group_norm(groups: int, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    """Group norm with PyTorch's epsilon."""
    return nn.GroupNorm(
        num_groups=groups,
        epsilon=NORM_EPSILON,
        use_fast_variance=False,
        dtype=dtype,
        name=name,
    )


def multiply(
    x_bhwc: jax.Array, kernel_11cd: jax.Array, strides: Sequence[int], *_: Any, **__: Any
) -> jax.Array:
    """A 1x1 convolution as one matrix product; a whole training step took 0.9 times as long on CPU.

    Args:
        x_bhwc: the maps.
        kernel_11cd: the convolution's kernel.
        strides: rows and columns from one output to the next.
        *_: what else `flax.linen.Conv` passes to a convolution.
        **__: likewise.
    """
    rows, columns = strides
    return x_bhwc[:, ::rows, ::columns] @ kernel_11cd[0, 0]


class ConvNorm(nn.Module):
    """A convolution without bias and its norm (`frozen_batch` or `group`)."""

    features: int
    kernel: int
    stride: int = 1
    norm: str = "frozen_batch"
    norm_groups: int = NORM_GROUPS
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=self.kernel // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
            conv_general_dilated=multiply if self.kernel == 1 else None,
            name="conv",
        )(x)
        if self.norm == "frozen_batch":
            return FrozenBatchNorm(self.dtype, name="norm")(x)
        if self.norm == "group":
            return group_norm(self.norm_groups, self.dtype, "norm")(x)
        raise ValueError(f"backbone norm '{self.norm}': choose 'frozen_batch' or 'group'")


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


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut; the stride is in the 3x3."""

    features: int
    bottleneck: int
    stride: int
    norm: str
    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / stride, W / stride, features]."""
        kind = {"norm": self.norm, "norm_groups": self.norm_groups, "dtype": self.dtype}
        y = nn.relu(ConvNorm(self.bottleneck, 1, **kind, name="conv1")(x))
        y = nn.relu(ConvNorm(self.bottleneck, 3, self.stride, **kind, name="conv2")(y))
        y = ConvNorm(self.features, 1, **kind, name="conv3")(y)
        if x.shape != y.shape:
            x = ConvNorm(self.features, 1, self.stride, **kind, name="shortcut")(x)
        return nn.relu(x + y)


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
        x = images_bhwc.astype(self.dtype)
        stem = ConvNorm(self.stem_width, 7, 2, self.norm, self.norm_groups, self.dtype, name="stem")
        x = nn.relu(stem(x))
        x = max_pool(x)
        maps = {}
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for stage, blocks in enumerate(self.blocks):
            for index in range(blocks):
                x = block(
                    features=self.stage_width * 2**stage,
                    bottleneck=self.bottleneck_width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    norm=self.norm,
                    norm_groups=self.norm_groups,
                    dtype=self.dtype,
                    name=f"res{stage + 2}_{index}",
                )(x)
            maps[f"res{stage + 2}"] = x
        return maps
