"""Swin Transformer backbones (Liu et al., 2021, arXiv 2103.14030), as dense prediction uses them.

Dense prediction's variant takes images of any size: it pads maps to whole windows, always at the
published window, and norms every output; the classifier's shrinks a window that exceeds its map.
Axes: b image, n window of an image, t pixel of a window (q the one that attends, k the one that
it sees), s attention head, d channel of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from zegformer_jax.models.layers import PYTORCH_INIT, layer_norm

PATCH_SIZE = 4  # pixels of a side; section 3.1
MASKED = -100.0  # added to a masked logit, as in the authors' code
# The authors' "truncated" normal cuts at +-2, a hundred deviations: it is the plain one.
LINEAR_INIT = nn.initializers.normal(0.02)


class SwinSizes(NamedTuple):
    """What tells one published Swin from another; the attributes of `SwinTransformer`."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int


# Section 3.3. The windows are those of the checkpoints that segmentation starts from: of 224
# pixels for tiny and small, of 384 for base and large (which also exist with 224 and 7).
SWIN = {
    "tiny": SwinSizes(96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "small": SwinSizes(96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "base": SwinSizes(128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "large": SwinSizes(192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


def pad_to_multiple(x_bhwc: jax.Array, multiple: int) -> jax.Array:
    """Adds zeros at the bottom and right of [B, H, W, C] until `multiple` divides H and W."""
    _, height, width, _ = x_bhwc.shape
    return jnp.pad(x_bhwc, ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)))


def to_windows(x_bhwc: jax.Array, window: int) -> jax.Array:
    """Cuts [B, H, W, C] into windows [B, N, window * window, C], both in row order."""
    return rearrange(
        x_bhwc, "b (rows h) (columns w) c -> b (rows columns) (h w) c", h=window, w=window
    )


def from_windows(x_bntc: jax.Array, window: int, height: int, width: int) -> jax.Array:
    """Puts windows [B, N, window * window, C] together to [B, height, width, C]."""
    return rearrange(
        x_bntc,
        "b (rows columns) (h w) c -> b (rows h) (columns w) c",
        rows=height // window,
        columns=width // window,
        h=window,
        w=window,
    )


def relative_index(window: int) -> np.ndarray:
    """Gives the row of the bias table for every pair of a window's pixels, int [T, T] (q, k).

    A row stands for one offset q - k, rows of pixels first: T is window^2, the table has
    (2 window - 1)^2 rows.
    """
    coordinates_2t = np.indices((window, window)).reshape(2, -1)
    row, column = coordinates_2t[:, :, None] - coordinates_2t[:, None, :] + window - 1
    return row * (2 * window - 1) + column


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Tells which pixels of a window of the shifted map may see each other, bool [N, T, T].

    The map [height, width] was rolled up and left by `shift`: its last `shift` rows and columns
    come from the other end, and are no neighbours of what stands beside them.
    """
    rolled_h = np.arange(height) >= height - shift
    rolled_w = np.arange(width) >= width - shift
    sides_hw = 2 * rolled_h[:, None] + rolled_w[None]
    sides_nt = to_windows(sides_hw[None, :, :, None], window)[0, :, :, 0]
    return sides_nt[:, :, None] == sides_nt[:, None, :]


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for every offset (section 3.2).

    Attributes:
        heads: attention heads.
        window: pixels of a window's side.
        shift: pixels that the windows are shifted by, 0 or half a window.
        dtype: what to compute in; softmax and parameters are float32.
    """

    heads: int
    window: int
    shift: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, C], for any H and W.

        The zeros that pad the last windows are seen as pixels are, as in the authors' code.
        """
        _, height, width, channels = x_bhwc.shape
        x_bhwc = pad_to_multiple(x_bhwc, self.window)
        _, padded_height, padded_width, _ = x_bhwc.shape
        x_bhwc = jnp.roll(x_bhwc, (-self.shift, -self.shift), (1, 2))
        allowed_nqk = shift_mask(padded_height, padded_width, self.window, self.shift)
        y_bntc = self._attend(to_windows(x_bhwc, self.window), allowed_nqk)
        y_bntc = nn.Dense(channels, kernel_init=LINEAR_INIT, dtype=self.dtype, name="out")(y_bntc)
        y_bhwc = from_windows(y_bntc, self.window, padded_height, padded_width)
        return jnp.roll(y_bhwc, (self.shift, self.shift), (1, 2))[:, :height, :width]

    def _attend(self, x_bntc: jax.Array, allowed_nqk: np.ndarray) -> jax.Array:
        """Weights the values [B, N, T, C] of every window."""
        channels = x_bntc.shape[-1]
        project = nn.Dense(3 * channels, kernel_init=LINEAR_INIT, dtype=self.dtype, name="qkv")
        query, key, value = rearrange(
            project(x_bntc), "b n t (three s d) -> three b n t s d", three=3, s=self.heads
        )
        logits_bnsqk = jnp.einsum(
            "bnqsd,bnksd->bnsqk",
            query * query.shape[-1] ** -0.5,
            key,
            preferred_element_type=jnp.float32,
        )
        table_shape = ((2 * self.window - 1) ** 2, self.heads)
        table = self.param("relative_position_bias", LINEAR_INIT, table_shape)
        bias_sqk = table[relative_index(self.window)].transpose(2, 0, 1)
        logits_bnsqk += bias_sqk[None, None]
        if self.shift:
            mask_nqk = jnp.where(allowed_nqk, 0.0, MASKED)
            logits_bnsqk += mask_nqk[None, :, None]
        weights_bnsqk = nn.softmax(logits_bnsqk).astype(self.dtype)
        attended = jnp.einsum("bnsqk,bnksd->bnqsd", weights_bnsqk, value)
        return attended.reshape(x_bntc.shape)


class SwinBlock(nn.Module):
    """Window attention and feed-forward, pre-norm, each dropped whole at the rate `drop_path`."""

    heads: int
    window: int
    shift: int
    mlp_ratio: float
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_bhwc: jax.Array, deterministic: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, C]."""
        channels = x_bhwc.shape[-1]

        def drop(branch: jax.Array) -> jax.Array:
            # One draw an image: stochastic depth (Huang et al., 2016).
            dropout = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3))
            return dropout(branch, deterministic=deterministic)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, kernel_init=LINEAR_INIT, dtype=self.dtype, name=name)

        attention = WindowAttention(
            self.heads, self.window, self.shift, self.dtype, name="attention"
        )
        x = x_bhwc + drop(attention(layer_norm("norm1", self.dtype)(x_bhwc)))
        y = dense(int(channels * self.mlp_ratio), "mlp_in")(layer_norm("norm2", self.dtype)(x))
        y = dense(channels, "mlp_out")(nn.gelu(y, approximate=False))
        return x + drop(y)


class PatchMerging(nn.Module):
    """Joins 2x2 pixels: half the resolution, twice the channels (section 3.1)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), 2 C]."""
        channels = x_bhwc.shape[-1]
        # The published order of the four pixels goes down the columns.
        x = rearrange(
            pad_to_multiple(x_bhwc, 2),
            "b (h down) (w right) c -> b h w (right down c)",
            down=2,
            right=2,
        )
        x = layer_norm("norm", self.dtype)(x)
        reduction = nn.Dense(
            2 * channels,
            use_bias=False,
            kernel_init=LINEAR_INIT,
            dtype=self.dtype,
            name="reduction",
        )
        return reduction(x)


class SwinTransformer(nn.Module):
    """A Swin Transformer that gives the normed feature maps of its stages.

    Attributes:
        width: channels of the first stage; doubles every stage.
        depths: blocks of each stage; every second has shifted windows.
        heads: attention heads of each stage.
        window: pixels of a window's side.
        mlp_ratio: hidden channels of the feed-forward parts, in channels.
        drop_path: the last block's rate of stochastic depth; it rises linearly from 0.
        dtype: what to compute in; parameters are float32.
        remat: whether blocks are computed again in the backward pass: less memory, more time.
    """

    width: int = SWIN["tiny"].width
    depths: Sequence[int] = SWIN["tiny"].depths
    heads: Sequence[int] = SWIN["tiny"].heads
    window: int = SWIN["tiny"].window
    mlp_ratio: float = 4.0
    drop_path: float = 0.3  # of the authors' segmentation configs
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images_bhwc: jax.Array, deterministic: bool = True) -> dict[str, jax.Array]:
        """Computes res2..res5 (strides 4, 8, 16, 32) of normalised images [B, H, W, 3].

        Sides that the strides do not divide are padded with zeros at the bottom and right. Needs
        the random stream `dropout` where it is not deterministic.
        """
        x = pad_to_multiple(images_bhwc.astype(self.dtype), PATCH_SIZE)
        x = nn.Conv(
            self.width,
            (PATCH_SIZE, PATCH_SIZE),
            strides=PATCH_SIZE,
            padding="VALID",
            kernel_init=PYTORCH_INIT,
            dtype=self.dtype,
            name="patch_embedding",
        )(x)
        x = layer_norm("patch_norm", self.dtype)(x)
        rates = iter(np.linspace(0, self.drop_path, sum(self.depths)).tolist())
        maps = {}
        block = nn.remat(SwinBlock, static_argnums=2) if self.remat else SwinBlock
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            name = f"res{stage + 2}"
            if stage > 0:
                x = PatchMerging(self.dtype, name=f"{name}_merging")(x)
            for index in range(depth):
                x = block(
                    heads=heads,
                    window=self.window,
                    shift=self.window // 2 if index % 2 else 0,
                    mlp_ratio=self.mlp_ratio,
                    drop_path=next(rates),
                    dtype=self.dtype,
                    name=f"{name}_{index}",
                )(x, deterministic)
            maps[name] = layer_norm(f"{name}_norm", self.dtype)(x)
        return maps
