"""A classifier of single images: trains a backbone where no pretrained one is used."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.grouper import CLASS_LOGIT_SCALE
from zegformer_jax.models.normalise import unit_length


class Classifier(nn.Module):
    """The grouper's backbone, the mean of res5 and a projection to the text embeddings.

    Attributes:
        backbone: Backbone, see `models.backbones`.
        embed_dim: Size of the text embeddings.
        dtype: Compute dtype; parameters and logits are float32.
    """

    backbone: nn.Module
    embed_dim: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images_bhwc: jax.Array, text_cd: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Returns class logits, float32 [B, C].

        Args:
            images_bhwc: Normalised images [B, H, W, 3]; H and W are multiples of 4.
            text_cd: Text embeddings of unit length [C, embed_dim].
            deterministic: False applies the backbone's drop path, from the random stream
                `dropout`.
        """
        maps = self.backbone(images_bhwc, deterministic=deterministic)
        pooled_bd = maps["res5"].mean((1, 2))
        project = nn.Dense(self.embed_dim, dtype=self.dtype, name="class_projection")
        return CLASS_LOGIT_SCALE * unit_length(project(pooled_bd)) @ text_cd.T.astype(jnp.float32)
