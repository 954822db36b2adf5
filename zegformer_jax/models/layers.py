"""Layers that several models are made of: norms, and convolutions with their norms."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

NORM_EPSILON = 1e-5  # PyTorch's default for batch, group and layer norm; flax's is 1e-6
NORM_GROUPS = 32  # Wu & He, 2018
# PyTorch's default for convolutions.
PYTORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

Norm = Callable[..., nn.Module]  # makes a norm, given its `dtype` and `name`


class FrozenBatchNorm(nn.Module):
    """Batch norm by stored statistics, as at inference.

    Attributes:
        collection: Holds scale, bias, mean and variance. No optimiser and no gradient sees
            `constants`. In `params` scale and bias are trained and no gradient reaches mean and
            variance; the optimiser must be kept off them.
        scale_init: Makes the initial scale of a shape.
        dtype: Compute dtype; the arrays are float32.
    """

    collection: str = "constants"
    scale_init: Callable[[tuple[int, ...]], jax.Array] = jnp.ones
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., C] by the stored statistics."""
        shape = (x.shape[-1],)

        def stored(name: str, init: Callable[[tuple[int, ...]], jax.Array]) -> jax.Array:
            return self.variable(self.collection, name, init, shape).value

        scale_c, bias_c = stored("scale", self.scale_init), stored("bias", jnp.zeros)
        mean_c = jax.lax.stop_gradient(stored("mean", jnp.zeros))
        variance_c = jax.lax.stop_gradient(stored("var", jnp.ones))
        factor_c = scale_c * jax.lax.rsqrt(variance_c + NORM_EPSILON)
        offset_c = bias_c - mean_c * factor_c
        last_axis = (1,) * (x.ndim - 1) + shape
        factor, offset = (
            each.astype(self.dtype).reshape(last_axis) for each in (factor_c, offset_c)
        )
        return x * factor + offset


def group_norm(groups: int, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    """Group norm with PyTorch's epsilon."""
    return nn.GroupNorm(
        num_groups=groups,
        epsilon=NORM_EPSILON,
        use_fast_variance=False,
        dtype=dtype,
        name=name,
    )


def layer_norm(name: str | None, dtype: jnp.dtype, fast_variance: bool = False) -> nn.LayerNorm:
    """Layer norm with PyTorch's epsilon.

    Args:
        name: The module's name; None in `setup`, where the attribute's is taken.
        dtype: Compute dtype.
        fast_variance: Computes the variance as the mean square less the squared mean: other
            rounding, the same speed.
    """
    return nn.LayerNorm(
        epsilon=NORM_EPSILON, use_fast_variance=fast_variance, dtype=dtype, name=name
    )


def multiply(
    x_bhwc: jax.Array, kernel_11cd: jax.Array, strides: Sequence[int], *_: Any, **__: Any
) -> jax.Array:
    """Computes a 1x1 convolution as one matrix product: 0.9 of a training step's time on a CPU.

    Args:
        x_bhwc: The maps.
        kernel_11cd: The convolution's kernel.
        strides: Rows and columns from one output to the next.
        *_: Other arguments of `flax.linen.Conv`'s convolution, unused.
        **__: Its other keyword arguments, unused.
    """
    rows, columns = strides
    return x_bhwc[:, ::rows, ::columns] @ kernel_11cd[0, 0]


class ConvNorm(nn.Module):
    """A convolution without bias and its norm."""

    features: int
    kernel: int
    stride: int = 1
    norm: Norm = FrozenBatchNorm
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
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
            kernel_init=self.kernel_init,
            conv_general_dilated=multiply if self.kernel == 1 else None,
            name="conv",
        )(x)
        return self.norm(dtype=self.dtype, name="norm")(x)


def average_pool(x_bhwc: jax.Array, size: int) -> jax.Array:
    """Averages windows of `size` x `size` pixels, without overlap."""
    return nn.avg_pool(x_bhwc, (size, size), (size, size)) if size > 1 else x_bhwc


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut (He et al., 2016).

    Attributes:
        features: Output channels.
        bottleneck: Channels of the 3x3 convolution.
        stride: Pixels of the input from one of the output to the next.
        pools: Whether the stride is an average pool's, before the last convolution and the
            shortcut's, as in CLIP; else the 3x3 convolution has it.
        norm: Of the convolutions.
        last_norm: Of the last convolution; None for `norm`.
        kernel_init: Of the convolutions.
        dtype: Compute dtype.
    """

    features: int
    bottleneck: int
    stride: int = 1
    pools: bool = False
    norm: Norm = FrozenBatchNorm
    last_norm: Norm | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, features]."""
        conv = functools.partial(
            ConvNorm, norm=self.norm, kernel_init=self.kernel_init, dtype=self.dtype
        )
        stride, pool = (1, self.stride) if self.pools else (self.stride, 1)
        y = nn.relu(conv(self.bottleneck, 1, name="conv1")(x_bhwc))
        y = nn.relu(conv(self.bottleneck, 3, stride, name="conv2")(y))
        last = conv(self.features, 1, norm=self.last_norm or self.norm, name="conv3")
        y = last(average_pool(y, pool))
        if x_bhwc.shape != y.shape:
            shortcut = conv(self.features, 1, stride, name="shortcut")
            x_bhwc = shortcut(average_pool(x_bhwc, pool))
        return nn.relu(x_bhwc + y)
