"""The grouper: a MaskFormer (Cheng et al., 2021) whose classes are text embeddings."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.normalise import unit_length
from zegformer_jax.models.pixel_decoder import PixelDecoder
from zegformer_jax.models.transformer import TransformerDecoder

CLASS_LOGIT_SCALE = 100.0  # temperature 0.01, fixed; ZegFormer, section 3.2


class GrouperOutput(NamedTuple):
    """Logits of every query, after every decoder layer or the last one only.

    Attributes:
        class_logits_lbqc: float32 [L, B, Q, C + 1]; the last column is "no object".
        mask_logits_lbqhw: float32 [L, B, Q, H/4, W/4].
    """

    class_logits_lbqc: jax.Array
    mask_logits_lbqhw: jax.Array


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
        backbone: Backbone, see `models.backbones`.
        pixel_decoder: Pixel decoder, which makes the mask features.
        transformer: Transformer decoder, which makes the queries' states.
        embed_dim: Size of the text embeddings.
        memory: Which of the backbone's maps the queries attend to; `res5` in the paper, a finer
            one for small images. With an encoder in the pixel decoder, `res5` is its output.
        dtype: Compute dtype; parameters and logits are float32.
    """

    backbone: nn.Module
    pixel_decoder: PixelDecoder
    transformer: TransformerDecoder
    embed_dim: int = 512
    memory: str = "res5"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        images_bhwc: jax.Array,
        text_cd: jax.Array,
        deterministic: bool = True,
        all_layers: bool = True,
    ) -> GrouperOutput:
        """Runs the grouper.

        Args:
            images_bhwc: Normalised images [B, H, W, 3]; H and W are multiples of 32.
            text_cd: Text embeddings of unit length [C, embed_dim].
            deterministic: False applies dropout, from the random stream `dropout`.
            all_layers: False makes the logits of the last layer alone, L is 1: what inference
                reads, in less memory.
        """
        maps = self.backbone(images_bhwc, deterministic=deterministic)
        features_bhwd, res5_bhwc = self.pixel_decoder(maps, deterministic)
        memory_bhwc = (maps | {"res5": res5_bhwc})[self.memory]
        states_lbqd = self.transformer(memory_bhwc, deterministic)
        if not all_layers:
            states_lbqd = states_lbqd[-1:]
        project = nn.Dense(self.embed_dim, dtype=self.dtype, name="class_projection")
        no_object_d = self.param("no_object", nn.initializers.normal(0.02), (self.embed_dim,))
        names_cd = jnp.concatenate([text_cd.astype(jnp.float32), no_object_d[None]])
        # by layer, image, query, class and "no object"
        class_logits = CLASS_LOGIT_SCALE * jnp.einsum(
            "lbqd,cd->lbqc", unit_length(project(states_lbqd)), names_cd
        )
        embed = MaskEmbedding(
            states_lbqd.shape[-1], features_bhwd.shape[-1], self.dtype, name="mask_embedding"
        )
        # by layer, image, query, row and column
        mask_logits = jnp.einsum(
            "lbqd,bhwd->lbqhw",
            embed(states_lbqd),
            features_bhwd,
            preferred_element_type=jnp.float32,
        )
        return GrouperOutput(class_logits, mask_logits)
