"""The per-pixel zero-shot baseline: every pixel is compared with the text embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.grouper import CLASS_LOGIT_SCALE
from zegformer_jax.models.normalise import unit_length
from zegformer_jax.models.pixel_decoder import PixelDecoder


class PerPixel(nn.Module):
    """The grouper's backbone and pixel decoder, then one projection for each pixel.

    Attributes:
        backbone: Backbone, see `models.backbones`.
        pixel_decoder: Pixel decoder, which makes the features.
        embed_dim: Size of the text embeddings.
        dtype: Compute dtype; parameters and logits are float32.
    """

    backbone: nn.Module
    pixel_decoder: PixelDecoder
    embed_dim: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images_bhwc: jax.Array, text_cd: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Returns class logits at stride 4, float32 [B, H/4, W/4, C].

        Args:
            images_bhwc: Normalised images [B, H, W, 3]; H and W are multiples of 32.
            text_cd: Text embeddings of unit length [C, embed_dim].
            deterministic: False applies dropout, from the random stream `dropout`.
        """
        maps = self.backbone(images_bhwc, deterministic=deterministic)
        features_bhwd = self.pixel_decoder(maps, deterministic).mask_features_bhwd
        project = nn.Conv(self.embed_dim, (1, 1), dtype=self.dtype, name="class_projection")
        embeddings_bhwd = unit_length(project(features_bhwd))
        return CLASS_LOGIT_SCALE * jnp.einsum(
            "bhwd,cd->bhwc", embeddings_bhwd, text_cd.astype(jnp.float32)
        )
