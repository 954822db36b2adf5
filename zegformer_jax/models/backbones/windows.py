"""Attention within windows of a map, which may be shifted (Liu et al., 2021, section 3.2).

Axes: b image, n window of an image, t pixel of a window (q the one that attends, k the one that
it sees), s attention head, d channel of a head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

MASKED = -100.0  # added to a masked logit, as in the authors' code
# The authors' "truncated" normal cuts at +-2, a hundred deviations: it is the plain one.
LINEAR_INIT = nn.initializers.normal(0.02)


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
    """Returns the row of the bias table for every pair of a window's pixels, int [T, T] (q, k).

    A row is one offset q - k, rows of pixels first: T is window^2, the table has
    (2 window - 1)^2 rows.
    """
    coordinates_2t = np.indices((window, window)).reshape(2, -1)
    row, column = coordinates_2t[:, :, None] - coordinates_2t[:, None, :] + window - 1
    return row * (2 * window - 1) + column


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Returns which pixels of a window of the shifted map may see each other, bool [N, T, T].

    The map [height, width] was rolled up and left by `shift`: its last `shift` rows and columns
    come from the other end, and are no neighbours of the pixels next to them.
    """
    rolled_h = np.arange(height) >= height - shift
    rolled_w = np.arange(width) >= width - shift
    sides_hw = 2 * rolled_h[:, None] + rolled_w[None]
    sides_nt = to_windows(sides_hw[None, :, :, None], window)[0, :, :, 0]
    return sides_nt[:, :, None] == sides_nt[:, None, :]


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for every offset (section 3.2).

    Attributes:
        heads: Attention heads.
        window: Pixels of a window's side.
        shift: Pixels that the windows are shifted by, 0 or half a window.
        dtype: Compute dtype; softmax and parameters are float32.
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
