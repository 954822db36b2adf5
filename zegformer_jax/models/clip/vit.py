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
    def __call__(
        self, tokens_btw: jax.Array, bias_btt: jax.Array | None = None, first: int | None = None
    ) -> jax.Array:
        """Attends to every token, from every one or only from the ``first``.

        ``bias_btt`` (float32 [B or 1, T, T]) is added to the logits of its first T, the one that
        attends, for the second; what is -inf is not attended to.
        """
        width = tokens_btw.shape[-1]
        qkv = nn.DenseGeneral(
            (3, self.heads, width // self.heads),
            kernel_init=nn.initializers.normal(self.in_std),
            dtype=self.dtype,
            name="qkv",
        )(tokens_btw)
        query, key, value = qkv[:, :first, 0], qkv[:, :, 1], qkv[:, :, 2]
        logits_bhqt = jnp.einsum(
            "bqhk,bthk->bhqt", query, key, preferred_element_type=jnp.float32
        ) / math.sqrt(query.shape[-1])
        if bias_btt is not None:
            logits_bhqt += bias_btt[:, None, :first]
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
    def __call__(
        self, tokens_btw: jax.Array, bias_btt: jax.Array | None = None, first: int | None = None
    ) -> jax.Array:
        """Maps tokens [B, T, W] to all of them or to the ``first``; see ``Attention``."""
        width = tokens_btw.shape[-1]
        in_std = width**-0.5
        out_std = in_std * (2 * self.layers) ** -0.5
        hidden = layer_norm("ln_1", self.dtype)(tokens_btw)
        attend = Attention(self.heads, in_std, out_std, self.dtype, name="attention")
        tokens_btw = tokens_btw[:, :first] + attend(hidden, bias_btt, first)
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
    """CLIP's image tower: a ViT read at its class token, or at one for each segment.

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
    def __call__(
        self,
        images_bhwc: jax.Array,
        coverage_bqp: jax.Array | None = None,
        segment_layers: int = 0,
    ) -> jax.Array:
        """Encodes normalised images as float32 features [B, D], or their segments as [B, Q, D].

        The features are not normalised. For segments the class token is copied before the last
        blocks, once for each; a copy attends to itself and to its own patches there, to each in
        proportion to its coverage, and nothing attends to it.

        Args:
            images_bhwc: [B, S, S, 3].
            coverage_bqp: [B, Q, P], the share of each patch that is in each segment.
            segment_layers: number of the last blocks in which the segments are apart.

        Raises:
            ValueError: the images are not of the size that the positions were made for, or the
                tower has not so many blocks.
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
        first_apart, bias_btt, read = self.layers, None, 1
        if coverage_bqp is not None:
            if not 1 <= segment_layers <= self.layers:
                raise ValueError(
                    f"segments are apart in {segment_layers} blocks of CLIP's image tower "
                    f"(eval.one_pass_layers): choose 1 to {self.layers}"
                )
            first_apart, read = self.layers - segment_layers, coverage_bqp.shape[1]
        for i in range(self.layers):
            if i == first_apart:
                copies_bqw = jnp.repeat(tokens[:, :1], coverage_bqp.shape[1], axis=1)
                tokens = jnp.concatenate([copies_bqw, tokens], axis=1)
                bias_btt = _segment_bias(coverage_bqp)
            tokens = TransformerBlock(
                self.heads,
                self.layers,
                self.activation,
                self.mlp_width,
                self.dtype,
                name=f"block_{i}",
            )(tokens, bias_btt, read if i == self.layers - 1 else None)  # the others end there
        feature = layer_norm("ln_post", self.dtype)(tokens)
        projection = self.param("projection", normal, (self.width, self.embed_dim))
        feature = (feature @ projection.astype(self.dtype)).astype(jnp.float32)
        return feature[:, 0] if coverage_bqp is None else feature


def _segment_bias(coverage_bqp: jax.Array) -> jax.Array:
    """Attention's bias where tokens are Q segments', the class's and P patches'."""
    batch, queries, patches = coverage_bqp.shape
    # A segment smaller than a patch weighs its patches as a large one does.
    largest_bq1 = coverage_bqp.max(-1, keepdims=True)
    own_bqp = jnp.log(coverage_bqp / jnp.where(largest_bq1 > 0, largest_bq1, 1.0))
    itself_qq = jnp.where(jnp.eye(queries, dtype=bool), 0.0, -jnp.inf)
    itself_bqq = jnp.broadcast_to(itself_qq, (batch, queries, queries))
    class_bq1 = jnp.full((batch, queries, 1), -jnp.inf)
    of_segments = jnp.concatenate([itself_bqq, class_bq1, own_bqp], axis=-1)
    others = jnp.where(jnp.arange(queries + 1 + patches) < queries, -jnp.inf, 0.0)
    of_others = jnp.broadcast_to(others, (batch, 1 + patches, len(others)))
    return jnp.concatenate([of_segments, of_others], axis=1)


def _split_patches(images_bhwc: jax.Array, size: int) -> jax.Array:
    """Cuts [B, H, W, C] into [B, H/size * W/size, size * size * C]."""
    batch, height, width, channels = images_bhwc.shape
    rows, columns = height // size, width // size
    patches = images_bhwc.reshape(batch, rows, size, columns, size, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, rows * columns, size * size * channels)
