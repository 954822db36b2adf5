"""CLIP (Radford et al. 2021, arXiv 2103.00020) in Flax: a ViT image tower and a text tower.

Axes: b image or text, t token (q the one that attends), w width, h head, k width of a head,
d joint embedding; in images h and w are pixels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zegformer_jax.models.normalise import unit_length

CLIP_MEAN = (122.7709383, 116.7460125, 104.09373615)  # of RGB 0..255, openai/CLIP clip.py
CLIP_STD = (68.5005327, 66.6321579, 70.3231630)

LAYER_NORM_EPSILON = 1e-5  # PyTorch's default, which CLIP uses; flax's is 1e-6
MLP_RATIO = 4  # openai/CLIP model.py, ResidualAttentionBlock
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # section 2.5
TOKEN_STD = 0.02  # openai/CLIP model.py, initialize_parameters
TEXT_POSITION_STD = 0.01

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # openai/CLIP model.py, QuickGELU
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP; the defaults are those of ViT-B/16.

    ``eos_token_id`` is the token at which the text's feature is read, at its first occurrence;
    None is OpenAI's rule, the position of the largest token id.
    Raises ValueError where a width is not a multiple of its heads, the image not of its patches,
    or the activation is unknown.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    vocab_size: int = 49408
    context_length: int = 77
    embed_dim: int = 512
    activation: str = "quick_gelu"
    eos_token_id: int | None = None

    def __post_init__(self):
        """Checks the sizes against each other."""
        for whole, part in (
            ("image_size", "patch_size"),
            ("vision_width", "vision_heads"),
            ("text_width", "text_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"ClipConfig: {whole} {getattr(self, whole)} is not a multiple of "
                    f"{part} {getattr(self, part)}"
                )
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"ClipConfig: activation '{self.activation}' is not one of {known}")


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
    """A pre-norm residual block: attention, then an MLP of four times the width.

    ``layers`` is the depth of the stack it stands in, for CLIP's initialisation (openai/CLIP
    model.py, initialize_parameters, used here for both towers as transformers does).
    """

    heads: int
    layers: int
    activation: str = "quick_gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens_btw: jax.Array, mask_tt: jax.Array | None = None) -> jax.Array:
        """Maps tokens [B, T, W] to tokens [B, T, W]."""
        width = tokens_btw.shape[-1]
        in_std = width**-0.5
        out_std = in_std * (2 * self.layers) ** -0.5
        hidden = _layer_norm("ln_1", self.dtype)(tokens_btw)
        tokens_btw += Attention(self.heads, in_std, out_std, self.dtype, name="attention")(
            hidden, mask_tt
        )
        hidden = _layer_norm("ln_2", self.dtype)(tokens_btw)
        hidden = nn.Dense(
            MLP_RATIO * width,
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
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        """Encodes normalised images [B, S, S, 3] as float32 features [B, D], not normalised.

        Raises ValueError where the images are not of the size that the positions were made for.
        """
        expected = (self.image_size, self.image_size, 3)
        if images_bhwc.ndim != 4 or images_bhwc.shape[1:] != expected:
            raise ValueError(
                f"CLIP's image tower takes [B, {self.image_size}, {self.image_size}, 3], "
                f"got {list(images_bhwc.shape)}: resize the images"
            )
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
        tokens = _layer_norm("ln_pre", self.dtype)(tokens + position_tw[None].astype(self.dtype))
        for i in range(self.layers):
            tokens = TransformerBlock(
                self.heads, self.layers, self.activation, self.dtype, name=f"block_{i}"
            )(tokens)
        feature_bw = _layer_norm("ln_post", self.dtype)(tokens[:, 0])
        projection = self.param("projection", normal, (self.width, self.embed_dim))
        return (feature_bw @ projection.astype(self.dtype)).astype(jnp.float32)


class TextTransformer(nn.Module):
    """CLIP's text tower: a causal transformer read at the end-of-text token."""

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    eos_token_id: int | None = None
    activation: str = "quick_gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens_bt: jax.Array) -> jax.Array:
        """Encodes token ids int32 [B, T], T <= context length, as float32 features [B, D].

        The features are not normalised. What follows the end-of-text token does not change them
        (attention is causal), so the padding may be cut. Raises ValueError where T is too large.
        """
        length = tokens_bt.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"CLIP's text tower takes at most {self.context_length} tokens, got {length}"
            )
        tokens = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=nn.initializers.normal(TOKEN_STD),
            dtype=self.dtype,
            name="token_embedding",
        )(tokens_bt)
        position_tw = self.param(
            "position_embedding",
            nn.initializers.normal(TEXT_POSITION_STD),
            (self.context_length, self.width),
        )
        tokens += position_tw[None, :length].astype(self.dtype)
        causal_tt = np.tril(np.ones((length, length), bool))
        for i in range(self.layers):
            tokens = TransformerBlock(
                self.heads, self.layers, self.activation, self.dtype, name=f"block_{i}"
            )(tokens, causal_tt)
        end_b = _end_of_text(tokens_bt, self.eos_token_id)
        feature_bw = jnp.take_along_axis(tokens, end_b[:, None, None], axis=1)[:, 0]
        feature_bw = _layer_norm("ln_final", self.dtype)(feature_bw)
        projection = self.param(
            "projection", nn.initializers.normal(self.width**-0.5), (self.width, self.embed_dim)
        )
        return (feature_bw @ projection.astype(self.dtype)).astype(jnp.float32)


class CLIP(nn.Module):
    """Both towers and the logarithm of the logit scale; parameters are float32.

    ``dtype`` is the compute dtype; softmaxes, norm statistics and features are float32.
    """

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Builds the towers ``visual`` and ``text`` and the scalar ``logit_scale``."""
        config = self.config
        self.visual = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.vision_width,
            layers=config.vision_layers,
            heads=config.vision_heads,
            embed_dim=config.embed_dim,
            activation=config.activation,
            dtype=self.dtype,
        )
        self.text = TextTransformer(
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            width=config.text_width,
            layers=config.text_layers,
            heads=config.text_heads,
            embed_dim=config.embed_dim,
            eos_token_id=config.eos_token_id,
            activation=config.activation,
            dtype=self.dtype,
        )
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(INITIAL_LOGIT_SCALE), ()
        )

    def encode_image(self, images_bhwc: jax.Array) -> jax.Array:
        """Encodes images [B, S, S, 3], normalised by CLIP's mean and std, as float32 [B, D].

        The features are not L2-normalised. Raises ValueError where S is not the image size.
        """
        return self.visual(images_bhwc)

    def encode_text(self, tokens_bt: jax.Array) -> jax.Array:
        """Encodes token ids int32 [B, T] as float32 features [B, D], not L2-normalised."""
        return self.text(tokens_bt)

    def __call__(
        self, images_bhwc: jax.Array, tokens_bt: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """L2-normalised image and text features, [B, D] each, and exp(logit scale)."""
        return (
            unit_length(self.encode_image(images_bhwc)),
            unit_length(self.encode_text(tokens_bt)),
            jnp.exp(self.logit_scale),
        )


def _layer_norm(name: str, dtype: jnp.dtype) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=dtype, name=name)


def _split_patches(images_bhwc: jax.Array, size: int) -> jax.Array:
    """Cuts [B, H, W, C] into [B, H/size * W/size, size * size * C]."""
    batch, height, width, channels = images_bhwc.shape
    rows, columns = height // size, width // size
    patches = images_bhwc.reshape(batch, rows, size, columns, size, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, rows * columns, size * size * channels)


def _end_of_text(tokens_bt: jax.Array, eos_token_id: int | None) -> jax.Array:
    """Finds the position [B] of the end-of-text token (see ClipConfig)."""
    marks = tokens_bt if eos_token_id is None else tokens_bt == eos_token_id
    return jnp.argmax(marks, axis=-1)
