"""The grouper: a MaskFormer (Cheng et al., 2021) whose classes are text embeddings."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.pixel_decoder import PixelDecoder
from zegformer_jax.models.resnet import ResNet
from zegformer_jax.models.transformer import TransformerDecoder

CLASS_LOGIT_SCALE = 100.0  # temperature 0.01, fixed; ZegFormer, section 3.2
NORM_EPSILON = 1e-12

PIXEL_MEAN = (123.675, 116.280, 103.530)  # ImageNet, RGB 0..255
PIXEL_STD = (58.395, 57.120, 57.375)


class GrouperOutput(NamedTuple):
    """What the grouper says of every query, after every decoder layer.

    Attributes:
        class_logits_lbqc: float32 [L, B, Q, C + 1]; the last column is "no object".
        mask_logits_lbqhw: float32 [L, B, Q, H/4, W/4].
    """

    class_logits_lbqc: jax.Array
    mask_logits_lbqhw: jax.Array


def normalise_images(
    images_bhwc: jax.Array,
    sizes_b2: jax.Array | None = None,
    mean: tuple[float, ...] = PIXEL_MEAN,
    std: tuple[float, ...] = PIXEL_STD,
) -> jax.Array:
    """Normalises RGB images and sets what lies outside their true size to 0.

    Args:
        images_bhwc: [B, H, W, 3], 0..255, any dtype.
        sizes_b2: int [B, 2], true height and width; None where the whole images count.
        mean: of every channel, on the scale 0..255.
        std: of every channel, on the scale 0..255.

    Returns:
        float32 [B, H, W, 3].
    """
    mean_c, std_c = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    x = (images_bhwc.astype(jnp.float32) - mean_c[None, None, None]) / std_c[None, None, None]
    if sizes_b2 is None:
        return x
    inside_bh = jnp.arange(x.shape[1])[None] < sizes_b2[:, :1]
    inside_bw = jnp.arange(x.shape[2])[None] < sizes_b2[:, 1:]
    return x * (inside_bh[:, :, None] & inside_bw[:, None])[..., None]


def normalise(x: jax.Array) -> jax.Array:
    """Scales the last axis to length 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), NORM_EPSILON)


class MaskEmbedding(nn.Module):
    """Three linear layers from decoder states to vectors that are compared with pixels."""

    width: int
    mask_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        """Maps states [..., width] to [..., mask_width]."""
        for index, features in enumerate((self.width, self.width, self.mask_width)):
            x = nn.Dense(features, dtype=self.dtype, name=f"layer{index}")(states)
            states = nn.relu(x)
        return x


class Grouper(nn.Module):
    """Groups pixels into segments and compares each with the text embeddings of any classes.

    The parameters do not depend on the vocabulary: another vocabulary is another array.

    Attributes:
        backbone: gives res2..res5.
        pixel_decoder: gives the mask features.
        transformer: gives the queries' states.
        embed_dim: size of the text embeddings.
        dtype: what to compute in; parameters and logits are float32.
    """

    backbone: ResNet
    pixel_decoder: PixelDecoder
    transformer: TransformerDecoder
    embed_dim: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images_bhwc: jax.Array, text_cd: jax.Array, deterministic: bool = True
    ) -> GrouperOutput:
        """Runs the grouper.

        Args:
            images_bhwc: normalised images [B, H, W, 3]; H and W are multiples of 32.
            text_cd: text embeddings of unit length [C, embed_dim].
            deterministic: False applies dropout, from the random stream `dropout`.
        """
        maps = self.backbone(images_bhwc)
        features_bhwd = self.pixel_decoder(maps)
        states_lbqd = self.transformer(maps["res5"], deterministic)
        project = nn.Dense(self.embed_dim, dtype=self.dtype, name="class_projection")
        no_object_d = self.param("no_object", nn.initializers.normal(0.02), (self.embed_dim,))
        names_cd = jnp.concatenate([text_cd.astype(jnp.float32), no_object_d[None]])
        # [L, B, Q, C + 1]
        class_logits = CLASS_LOGIT_SCALE * jnp.einsum(
            "lbqd,cd->lbqc", normalise(project(states_lbqd)), names_cd
        )
        embed = MaskEmbedding(
            states_lbqd.shape[-1], features_bhwd.shape[-1], self.dtype, name="mask_embedding"
        )
        # [L, B, Q, H/4, W/4]
        mask_logits = jnp.einsum(
            "lbqd,bhwd->lbqhw",
            embed(states_lbqd),
            features_bhwd,
            preferred_element_type=jnp.float32,
        )
        return GrouperOutput(class_logits, mask_logits)
