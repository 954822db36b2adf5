"""A backbone that names single pictures: the start of a backbone that is trained from nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.grouper import CLASS_LOGIT_SCALE
from zegformer_jax.models.normalise import unit_length


class Classifier(nn.Module):
    """The grouper's backbone, the mean of res5 and a projection to the text embeddings.

    Attributes:
        backbone: gives res2..res5; `ResNet` or `SwinTransformer`.
        embed_dim: size of the text embeddings.
        dtype: what to compute in; parameters and logits are float32.
    """

    backbone: nn.Module
    embed_dim: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images_bhwc: jax.Array, text_cd: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Gives class logits, float32 [B, C].

        Args:
            images_bhwc: normalised images [B, H, W, 3]; H and W are multiples of 4.
            text_cd: text embeddings of unit length [C, embed_dim].
            deterministic: False applies the backbone's drop path, from the random stream
                `dropout`.
        """
        maps = self.backbone(images_bhwc, deterministic=deterministic)
        pooled_bd = maps["res5"].mean((1, 2))
        project = nn.Dense(self.embed_dim, dtype=self.dtype, name="class_projection")
        return CLASS_LOGIT_SCALE * unit_length(project(pooled_bd)) @ text_cd.T.astype(jnp.float32)
