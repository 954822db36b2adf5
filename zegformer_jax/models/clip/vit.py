"""CLIP's ViT image tower, and the transformer block that both towers are made of.

Axes: b image or text, t token (q the one that attends), w width, h head, k width of a head,
d joint embedding; in images h and w are pixels.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from zegformer_jax.models.clip.attention import attend
from zegformer_jax.models.layers import PYTORCH_INIT, layer_norm
from zegformer_jax.runtime.errors import UserError

MLP_RATIO = 4  # openai/CLIP model.py, ResidualAttentionBlock
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # openai/CLIP model.py, QuickGELU
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def check_image_size(images_bhwc: jax.Array, size: int) -> None:
    """Raises ValueError where images are not [B, size, size, 3]."""
    if images_bhwc.ndim != 4 or images_bhwc.shape[1:] != (size, size, 3):
        raise ValueError(
            f"CLIP's image tower takes [B, {size}, {size}, 3], "
            f"got {list(images_bhwc.shape)}: resize the images"
        )


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection."""

    heads: int
    in_std: float
    out_std: float
    is_causal: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens_btw: jax.Array, bias_btt: jax.Array | None = None, first: int | None = None
    ) -> jax.Array:
        """Attends to every token, from every one or only from the `first`.

        `bias_btt` (float32 [B or 1, T, T]) is added to the logits of its first T, the one that
        attends, for the second; what is -inf is not attended to.
        """
        width = tokens_btw.shape[-1]
        qkv = nn.DenseGeneral(
            (3, self.heads, width // self.heads),
            kernel_init=nn.initializers.normal(self.in_std),
            dtype=self.dtype,
            name="qkv",
        )(tokens_btw)
        bias = None if bias_btt is None else bias_btt[:, None, :first]
        attended = attend(qkv[:, :first, 0], qkv[:, :, 1], qkv[:, :, 2], bias, self.is_causal)
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            kernel_init=nn.initializers.normal(self.out_std),
            dtype=self.dtype,
            name="out",
        )(attended)


class TransformerBlock(nn.Module):
    """A pre-norm residual block: attention, then an MLP.

    Attributes:
        heads: Attention heads.
        layers: Blocks of the whole stack, for CLIP's initialisation (openai/CLIP model.py,
            initialize_parameters, used here for both towers as transformers does).
        activation: Of the MLP, one of `ACTIVATIONS`.
        mlp_width: Hidden channels of the MLP; None for four times the width.
        is_causal: Hides later tokens from each token.
        dtype: Compute dtype.
    """

    heads: int
    layers: int
    activation: str = "quick_gelu"
    mlp_width: int | None = None
    is_causal: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens_btw: jax.Array, bias_btt: jax.Array | None = None, first: int | None = None
    ) -> jax.Array:
        """Maps tokens [B, T, W] to all of them or to the `first`; see `Attention`."""
        width = tokens_btw.shape[-1]
        in_std = width**-0.5
        out_std = in_std * (2 * self.layers) ** -0.5
        hidden = layer_norm("ln_1", self.dtype, fast_variance=True)(tokens_btw)
        attention = Attention(
            self.heads, in_std, out_std, self.is_causal, self.dtype, name="attention"
        )
        tokens_btw = tokens_btw[:, :first] + attention(hidden, bias_btt, first)
        hidden = layer_norm("ln_2", self.dtype, fast_variance=True)(tokens_btw)
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
    """CLIP's image tower: a ViT read at its class token, or at one token for each segment.

    A patch is embedded by one matrix product over its pixels, ordered (row, column, channel).

    Attributes:
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels.
        width: Channels of a token.
        layers: Number of blocks.
        heads: Attention heads.
        embed_dim: Size of the features.
        activation: Of the MLPs, one of `ACTIVATIONS`.
        mlp_width: Hidden channels of the MLPs; None for four times the width.
        dtype: Compute dtype.
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

    def setup(self):
        """Makes the modules and arrays that both ways to read the tower share."""
        normal = nn.initializers.normal(self.width**-0.5)
        self.patch_embedding = nn.Dense(
            self.width, use_bias=False, kernel_init=PYTORCH_INIT, dtype=self.dtype
        )
        self.class_embedding = self.param("class_embedding", normal, (self.width,))
        tokens = (self.image_size // self.patch_size) ** 2 + 1
        self.position_embedding = self.param("position_embedding", normal, (tokens, self.width))
        self.ln_pre = layer_norm(None, self.dtype, fast_variance=True)
        # Their names are block_0, block_1, ...
        self.block = [
            TransformerBlock(
                self.heads, self.layers, self.activation, self.mlp_width, dtype=self.dtype
            )
            for _ in range(self.layers)
        ]
        self.ln_post = layer_norm(None, self.dtype, fast_variance=True)
        self.projection = self.param("projection", normal, (self.width, self.embed_dim))

    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        """Encodes normalised images [B, S, S, 3] as float32 features [B, D], not normalised.

        Raises ValueError where the images are not of the size that the positions were made for.
        """
        tokens_btw = self._embed(images_bhwc)
        for block in self.block[:-1]:
            tokens_btw = block(tokens_btw)
        return self._project(self.block[-1](tokens_btw, first=1))[:, 0]

    def encode_segments(
        self, images_bhwc: jax.Array, coverage_bqp: jax.Array, segment_layers: int
    ) -> jax.Array:
        """Encodes the segments of normalised images as float32 features, not normalised.

        The class token is copied before the last blocks, once for each segment; there a copy
        attends to itself and to its own patches, to each in proportion to its coverage, and
        nothing attends to it.

        Args:
            images_bhwc: [B, S, S, 3].
            coverage_bqp: [B, Q, P], the share of each patch that is in each segment.
            segment_layers: Number of the last blocks in which the segments are apart.

        Returns:
            The features [B, Q, D].

        Raises:
            UserError: The tower has fewer blocks.
            ValueError: The images are not of the size that the positions were made for.
        """
        if not 1 <= segment_layers <= self.layers:
            raise UserError(
                f"segments are apart in {segment_layers} blocks of CLIP's image tower "
                f"(eval.one_pass_layers): choose 1 to {self.layers}"
            )
        tokens_btw = self._embed(images_bhwc)
        for block in self.block[:-segment_layers]:
            tokens_btw = block(tokens_btw)
        queries = coverage_bqp.shape[1]
        copies_bqw = jnp.repeat(tokens_btw[:, :1], queries, axis=1)
        tokens_btw = jnp.concatenate([copies_bqw, tokens_btw], axis=1)
        bias_btt = _segment_bias(coverage_bqp)
        for block in self.block[-segment_layers:-1]:
            tokens_btw = block(tokens_btw, bias_btt)
        return self._project(self.block[-1](tokens_btw, bias_btt, first=queries))

    def _embed(self, images_bhwc: jax.Array) -> jax.Array:
        """The tokens before the first block: the class's, then the patches'."""
        check_image_size(images_bhwc, self.image_size)
        patches_btw = self.patch_embedding(_split_patches(images_bhwc, self.patch_size))
        class_11w = self.class_embedding.astype(self.dtype)[None, None]
        class_b1w = jnp.broadcast_to(class_11w, (len(images_bhwc), 1, self.width))
        tokens_btw = jnp.concatenate([class_b1w, patches_btw], axis=1)
        return self.ln_pre(tokens_btw + self.position_embedding[None].astype(self.dtype))

    def _project(self, tokens_btw: jax.Array) -> jax.Array:
        features_btd = self.ln_post(tokens_btw) @ self.projection.astype(self.dtype)
        return features_btd.astype(jnp.float32)


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
