"""CLIP's ModifiedResNet image tower (Radford et al. 2021, section 2.4; openai/CLIP model.py).

It differs from a ResNet in its stem of three convolutions and an average pool, in average pools
before its strided 1x1 convolutions, and in attention instead of the last average pool.

Axes: b image, t token, h head, k width of a head, c channel, d joint embedding; in images h and w
are pixels.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from zegformer_jax.models.clip.vit import check_image_size

BATCH_NORM_EPSILON = 1e-5  # PyTorch's default
EXPANSION = 4  # of a bottleneck's channels; He et al. 2016
STRIDE = 32  # of the whole tower
WIDTH_FACTOR = 32  # its features have so many times the channels of its first stage
CONV_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default


class FrozenNorm(nn.Module):
    """Batch norm as at inference, by stored statistics.

    Mean and variance are leaves of ``params`` beside scale and bias, so that a CLIP is one tree.
    No gradient flows into them; whoever trains such a tower keeps the optimiser off them.
    """

    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        """Normalises [B, H, W, C]."""
        shape = (x_bhwc.shape[-1],)
        scale_c = self.param("scale", self.scale_init, shape)
        bias_c = self.param("bias", nn.initializers.zeros, shape)
        mean_c = jax.lax.stop_gradient(self.param("mean", nn.initializers.zeros, shape))
        var_c = jax.lax.stop_gradient(self.param("var", nn.initializers.ones, shape))
        factor_c = scale_c * jax.lax.rsqrt(var_c + BATCH_NORM_EPSILON)
        offset_c = bias_c - mean_c * factor_c
        factor_c, offset_c = factor_c.astype(self.dtype), offset_c.astype(self.dtype)
        return x_bhwc * factor_c[None, None, None] + offset_c[None, None, None]


class ConvNorm(nn.Module):
    """A convolution without bias, its norm, and a ReLU where asked."""

    channels: int
    kernel: int
    stride: int = 1
    relu: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, channels]."""
        x_bhwc = nn.Conv(
            self.channels,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=self.kernel // 2,
            use_bias=False,
            kernel_init=CONV_INIT,
            dtype=self.dtype,
            name="conv",
        )(x_bhwc)
        x_bhwc = FrozenNorm(self.scale_init, self.dtype, name="norm")(x_bhwc)
        return nn.relu(x_bhwc) if self.relu else x_bhwc


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride is an average pool's.

    ``channels`` is the 3x3's; the output has four times as many.
    """

    channels: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, 4 * channels]."""
        outputs = EXPANSION * self.channels
        y = ConvNorm(self.channels, 1, dtype=self.dtype, name="conv1")(x_bhwc)
        y = ConvNorm(self.channels, 3, dtype=self.dtype, name="conv2")(y)
        y = ConvNorm(
            outputs,
            1,
            relu=False,
            scale_init=nn.initializers.zeros,  # openai/CLIP model.py, initialize_parameters
            dtype=self.dtype,
            name="conv3",
        )(_average_pool(y, self.stride))
        if self.stride > 1 or x_bhwc.shape[-1] != outputs:
            x_bhwc = ConvNorm(outputs, 1, relu=False, dtype=self.dtype, name="shortcut")(
                _average_pool(x_bhwc, self.stride)
            )
        return nn.relu(x_bhwc + y)


class AttentionPool(nn.Module):
    """Multi-head attention from the mean over places to the mean and all places."""

    heads: int
    embed_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features_bhwc: jax.Array) -> jax.Array:
        """Pools [B, H, W, C] to [B, D]; the number of places fixes that of the positions."""
        batch, height, width, channels = features_bhwc.shape
        normal = nn.initializers.normal(channels**-0.5)
        position_tc = self.param("position_embedding", normal, (height * width + 1, channels))
        places_btc = features_bhwc.reshape(batch, height * width, channels)
        mean_b1c = jnp.mean(places_btc, axis=1, keepdims=True, dtype=jnp.float32)
        tokens_btc = jnp.concatenate([mean_b1c.astype(self.dtype), places_btc], axis=1)
        tokens_btc += position_tc[None].astype(self.dtype)

        def project(name: str, inputs: jax.Array) -> jax.Array:
            shape = (self.heads, channels // self.heads)
            return nn.DenseGeneral(shape, kernel_init=normal, dtype=self.dtype, name=name)(inputs)

        query_bqhk = project("query", tokens_btc[:, :1])
        key_bthk, value_bthk = project("key", tokens_btc), project("value", tokens_btc)
        logits_bhqt = jnp.einsum(
            "bqhk,bthk->bhqt", query_bqhk, key_bthk, preferred_element_type=jnp.float32
        ) / math.sqrt(channels // self.heads)
        weights_bhqt = jax.nn.softmax(logits_bhqt, axis=-1).astype(self.dtype)
        attended_bqhk = jnp.einsum("bhqt,bthk->bqhk", weights_bhqt, value_bthk)
        return nn.DenseGeneral(
            self.embed_dim, axis=(-2, -1), kernel_init=normal, dtype=self.dtype, name="out"
        )(attended_bqhk)[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's image tower: a ResNet read by attention.

    Attributes:
      image_size: side of the images in pixels, a multiple of 32.
      width: channels of the first stage's 3x3 convolutions.
      layers: bottlenecks of each of the four stages.
      heads: attention heads of the pool.
      embed_dim: size of the features.
      dtype: what to compute in.
    """

    image_size: int
    width: int
    layers: tuple[int, int, int, int]
    heads: int
    embed_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        """Encodes normalised images [B, S, S, 3] as float32 features [B, D], not normalised.

        Raises ValueError where the images are not of the size that the positions were made for.
        """
        check_image_size(images_bhwc, self.image_size)
        half = self.width // 2
        x = images_bhwc.astype(self.dtype)
        x = ConvNorm(half, 3, stride=2, dtype=self.dtype, name="stem1")(x)
        x = ConvNorm(half, 3, dtype=self.dtype, name="stem2")(x)
        x = ConvNorm(self.width, 3, dtype=self.dtype, name="stem3")(x)
        x = _average_pool(x, 2)
        for stage, blocks in enumerate(self.layers):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                x = Bottleneck(
                    self.width * 2**stage, stride, self.dtype, name=f"layer{stage + 1}_{i}"
                )(x)
        pool = AttentionPool(self.heads, self.embed_dim, self.dtype, name="attention_pool")
        return pool(x).astype(jnp.float32)


def _average_pool(x_bhwc: jax.Array, size: int) -> jax.Array:
    return nn.avg_pool(x_bhwc, (size, size), (size, size)) if size > 1 else x_bhwc
