"""CLIP's ModifiedResNet image tower (Radford et al. 2021, section 2.4; openai/CLIP model.py).

It differs from a ResNet in its stem of three convolutions and an average pool, in average pools
before its strided 1x1 convolutions, and in attention instead of the last average pool.

Axes: b image, t token, h head, k width of a head, c channel, d joint embedding; in images h and w
are pixels.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from zegformer_jax.models.clip.attention import attend
from zegformer_jax.models.clip.vit import check_image_size
from zegformer_jax.models.layers import (
    PYTORCH_INIT,
    Bottleneck,
    ConvNorm,
    FrozenBatchNorm,
    average_pool,
)

EXPANSION = 4  # of a bottleneck's channels; He et al. 2016
STRIDE = 32  # of the whole tower
WIDTH_FACTOR = 32  # its features have so many times the channels of its first stage
# A CLIP is one tree: its statistics are in `params` too.
NORM = functools.partial(FrozenBatchNorm, collection="params")
# openai/CLIP model.py, initialize_parameters
LAST_NORM = functools.partial(NORM, scale_init=jnp.zeros)


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
        attended_bqhk = attend(query_bqhk, key_bthk, value_bthk)
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
        kind = {"norm": NORM, "kernel_init": PYTORCH_INIT, "dtype": self.dtype}
        x = images_bhwc.astype(self.dtype)
        for index, (width, stride) in enumerate(((half, 2), (half, 1), (self.width, 1)), 1):
            x = nn.relu(ConvNorm(width, 3, stride, **kind, name=f"stem{index}")(x))
        x = average_pool(x, 2)
        for stage, blocks in enumerate(self.layers):
            width = self.width * 2**stage
            for index in range(blocks):
                x = Bottleneck(
                    features=EXPANSION * width,
                    bottleneck=width,
                    stride=2 if stage > 0 and index == 0 else 1,
                    pools=True,
                    last_norm=LAST_NORM,
                    **kind,
                    name=f"layer{stage + 1}_{index}",
                )(x)
        pool = AttentionPool(self.heads, self.embed_dim, self.dtype, name="attention_pool")
        return pool(x).astype(jnp.float32)
