"""CLIP's ViT image tower, and the transformer block that both towers are made of.

Axes: b image or text, t token (q the one that attends), w width, h head, k width of a head,
d joint embedding; in images h and w are pixels.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

LAYER_NORM_EPSILON = 1e-5  # PyTorch's default, which CLIP uses; flax's is 1e-6
MLP_RATIO = 4  # openai/CLIP model.py, ResidualAttentionBlock

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # openai/CLIP model.py, QuickGELU
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def layer_norm(name: str, dtype: jnp.dtype) -> nn.LayerNorm:
    """Layer norm with PyTorch's epsilon."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=dtype, name=name)


def check_image_size(images_bhwc: jax.Array, size: int) -> None:
    """Raises ValueError where images are not [B, size, size, 3]."""
    if images_bhwc.ndim != 4 or images_bhwc.shape[1:] != (size, size, 3):
        raise ValueError(
            f"CLIP's image tower takes [B, {size}, {size}, 3], "
            f"got {list(images_bhwc.shape)}: resize the images"
        )


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection; softmax in float32."""

    heads: int
    in_std: float
    out_std: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens_btw: jax.Array, mask_tt: jax.Array | None = None) -> jax.Array:
        """Attends from every token to those that ``mask_tt`` (bool [T, T]; None: all) admits."""
        width = tokens_btw.shape[-1]
        qkv = nn.DenseGeneral(
            (3, self.heads, width // self.heads),
            kernel_init=nn.initializers.normal(self.in_std),
            dtype=self.dtype,
            name="qkv",
        )(tokens_btw)
        query, key, value = (qkv[:, :, i] for i in range(3))
        logits_bhqt = jnp.einsum(
            "bqhk,bthk->bhqt", query, key, preferred_element_type=jnp.float32
        ) / math.sqrt(query.shape[-1])
        if mask_tt is not None:
            logits_bhqt = jnp.where(mask_tt[None, None], logits_bhqt, jnp.finfo(jnp.float32).min)
        weights_bhqt = jax.nn.softmax(logits_bhqt, axis=-1).astype(self.dtype)
        attended = jnp.einsum("bhqt,bthk->bqhk", weights_bhqt, value)
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            kernel_init=nn.initializers.normal(self.out_std),
            dtype=self.dtype,
            name="out",
        )(attended)


class TransformerBlock(nn.Module):
    """A pre-norm residual block: attention, then an MLP.

    ``layers`` is the depth of the stack it stands in, for CLIP's initialisation (openai/CLIP
    model.py, initialize_parameters, used here for both towers as transformers does).
    ``mlp_width`` None is four times the width.
    """

    heads: int
    layers: int
    activation: str = "quick_gelu"
    mlp_width: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens_btw: jax.Array, mask_tt: jax.Array | None = None) -> jax.Array:
        """Maps tokens [B, T, W] to tokens [B, T, W]."""
        width = tokens_btw.shape[-1]
        in_std = width**-0.5
        out_std = in_std * (2 * self.layers) ** -0.5
        hidden = layer_norm("ln_1", self.dtype)(tokens_btw)
        tokens_btw += Attention(self.heads, in_std, out_std, self.dtype, name="attention")(
            hidden, mask_tt
        )
        hidden = layer_norm("ln_2", self.dtype)(tokens_btw)
        hidden = nn.Dense(
            self.mlp_width or MLP_RATIO * width,
            kernel_init=nn.initializers.normal((2 * width) ** -0.5),
            dtype=self.dtype,
            name="mlp_in",
        )(hidden)
        hidden = ACTIVATIONS[self.activation](hidden)
        hidden = nn.Dense(
            width, kernel_init=nn.initializers.normal(out_std), dtype=self.dtype, name="mlp_out"
        )(hidden)
        return tokens_btw + hidden


class VisionTransformer(nn.Module):
    """CLIP's image tower: a ViT read at its class token.

    A patch is embedded by one matrix product over its pixels, ordered (row, column, channel).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    activation: str = "quick_gelu"
    mlp_width: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        """Encodes normalised images [B, S, S, 3] as float32 features [B, D], not normalised.

        Raises ValueError where the images are not of the size that the positions were made for.
        """
        check_image_size(images_bhwc, self.image_size)
        normal = nn.initializers.normal(self.width**-0.5)
        patches_btw = nn.Dense(
            self.width,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=self.dtype,
            name="patch_embedding",
        )(_split_patches(images_bhwc, self.patch_size))
        class_w = self.param("class_embedding", normal, (self.width,))
        count = patches_btw.shape[1] + 1
        position_tw = self.param("position_embedding", normal, (count, self.width))

        class_b1w = jnp.broadcast_to(class_w[None, None], (len(images_bhwc), 1, self.width))
        tokens = jnp.concatenate([class_b1w.astype(self.dtype), patches_btw], axis=1)
        tokens = layer_norm("ln_pre", self.dtype)(tokens + position_tw[None].astype(self.dtype))
        for i in range(self.layers):
            tokens = TransformerBlock(
                self.heads,
                self.layers,
                self.activation,
                self.mlp_width,
                self.dtype,
                name=f"block_{i}",
            )(tokens)
        feature_bw = layer_norm("ln_post", self.dtype)(tokens[:, 0])
        projection = self.param("projection", normal, (self.width, self.embed_dim))
        return (feature_bw @ projection.astype(self.dtype)).astype(jnp.float32)


def _split_patches(images_bhwc: jax.Array, size: int) -> jax.Array:
    """Cuts [B, H, W, C] into [B, H/size * W/size, size * size * C]."""
    batch, height, width, channels = images_bhwc.shape
    rows, columns = height // size, width // size
    patches = images_bhwc.reshape(batch, rows, size, columns, size, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, rows * columns, size * size * channels)
