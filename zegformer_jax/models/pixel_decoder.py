"""MaskFormer's pixel decoder: a feature pyramid (Lin et al., 2017) with group norm."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.layers import NORM_GROUPS, ConvNorm, group_norm
from zegformer_jax.models.transformer import TransformerEncoder


def upsample_nearest(x_bhwc: jax.Array, factor: int = 2) -> jax.Array:
    """Repeats every pixel of [B, H, W, C] to [B, factor * H, factor * W, C]."""
    return x_bhwc.repeat(factor, axis=1).repeat(factor, axis=2)


class PixelDecoderOutput(NamedTuple):
    """Output of the pixel decoder.

    Attributes:
        mask_features_bhwd: [B, H/4, W/4, mask_width].
        res5_bhwc: The transformer encoder's output [B, H/32, W/32, width]; without an encoder
            the backbone's res5 as it came.
    """

    mask_features_bhwd: jax.Array
    res5_bhwc: jax.Array


class PixelDecoder(nn.Module):
    """FPN from res5 down to res2, then a 3x3 convolution to the mask features.

    Attributes:
        width: Channels of the pyramid, and of the encoder.
        mask_width: Channels of the mask features.
        norm_groups: Groups of the group norms, see `ResNet`.
        encoder_layers: Layers of a transformer encoder before the pyramid; 0 for none.
        encoder_heads: Attention heads of the encoder.
        encoder_mlp_width: Hidden channels of the encoder's feed-forward parts.
        dropout: Dropout rate of the encoder.
        dtype: Compute dtype; parameters are float32.
    """

    width: int = 256
    mask_width: int = 256
    norm_groups: int = NORM_GROUPS
    encoder_layers: int = 0
    encoder_heads: int = 8
    encoder_mlp_width: int = 2048
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, maps: dict[str, jax.Array], deterministic: bool = True
    ) -> PixelDecoderOutput:
        """Decodes the backbone's res2..res5, [B, H/4, W/4, C2] to [B, H/32, W/32, C5].

        Needs the random stream `dropout` where it has an encoder and is not deterministic.
        """
        norm = functools.partial(group_norm, self.norm_groups)
        conv = functools.partial(ConvNorm, self.width, norm=norm, dtype=self.dtype)
        res5 = maps["res5"]
        if self.encoder_layers:
            res5 = self._encode(res5, deterministic)
        y = nn.relu(conv(3, name="output_res5")(res5))
        for stage in ("res4", "res3", "res2"):
            lateral = conv(1, name=f"lateral_{stage}")(maps[stage])
            y = nn.relu(conv(3, name=f"output_{stage}")(lateral + upsample_nearest(y)))
        to_masks = nn.Conv(
            self.mask_width, (3, 3), padding=1, dtype=self.dtype, name="mask_features"
        )
        return PixelDecoderOutput(to_masks(y), res5)

    def _encode(self, res5_bhwc: jax.Array, deterministic: bool) -> jax.Array:
        project = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="input_projection")
        encoder = TransformerEncoder(
            self.encoder_layers,
            self.encoder_heads,
            self.encoder_mlp_width,
            self.dropout,
            self.dtype,
            name="encoder",
        )
        return encoder(project(res5_bhwc), deterministic)
