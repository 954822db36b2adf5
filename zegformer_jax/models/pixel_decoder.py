"""MaskFormer's pixel decoder: a feature pyramid (Lin et al., 2017) with group norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.resnet import NORM_GROUPS, ConvNorm


def upsample_nearest(x_bhwc: jax.Array, factor: int = 2) -> jax.Array:
    """Repeats every pixel of [B, H, W, C] to [B, factor * H, factor * W, C]."""
    return x_bhwc.repeat(factor, axis=1).repeat(factor, axis=2)


class PixelDecoder(nn.Module):
    """FPN from res5 down to res2, then a 3x3 convolution to the mask features.

    Attributes:
        width: channels of the pyramid.
        mask_width: channels of the mask features.
        norm_groups: of the group norms; see `ResNet`.
        dtype: what to compute in; parameters are float32.
    """

    width: int = 256
    mask_width: int = 256
    norm_groups: int = NORM_GROUPS
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: dict[str, jax.Array]) -> jax.Array:
        """Gives the mask features [B, H/4, W/4, mask_width] from the backbone's res2..res5."""

        def conv(kernel: int, name: str) -> ConvNorm:
            return ConvNorm(self.width, kernel, 1, "group", self.norm_groups, self.dtype, name=name)

        y = nn.relu(conv(3, "output_res5")(maps["res5"]))
        for stage in ("res4", "res3", "res2"):
            lateral = conv(1, f"lateral_{stage}")(maps[stage])
            y = nn.relu(conv(3, f"output_{stage}")(lateral + upsample_nearest(y)))
        return nn.Conv(self.mask_width, (3, 3), padding=1, dtype=self.dtype, name="mask_features")(
            y
        )
