"""Segments of mask logits, and their boxes.

Axes: q query, h w pixels.
"""

import jax
import jax.numpy as jnp

SEGMENT_THRESHOLD = 0.5  # a pixel belongs to a segment where sigmoid(mask logit) exceeds this


def boxes_from_masks(masks_qhw: jax.Array) -> jax.Array:
    """Returns the box of each segment, int32 [q, 4].

    Left, top, right and bottom, inclusive pixel indices. A box of zero area (one column, one row or
    no pixel at all) becomes (0, 0, w, h).

    Args:
        masks_qhw: bool [q, h, w], True inside the segment.
    """
    _, height, width = masks_qhw.shape
    left, right = _first_and_last(masks_qhw.any(axis=1))
    top, bottom = _first_and_last(masks_qhw.any(axis=2))
    boxes_q4 = jnp.stack([left, top, right, bottom], axis=-1)
    has_area_q = (right > left) & (bottom > top)
    whole_4 = jnp.array([0, 0, width, height], jnp.int32)
    return jnp.where(has_area_q[:, None], boxes_q4, whole_4[None])


def _first_and_last(occupied_qn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and last True index of each row; equal where there is none."""
    first_q = jnp.argmax(occupied_qn, axis=-1).astype(jnp.int32)
    from_end_q = jnp.argmax(occupied_qn[:, ::-1], axis=-1).astype(jnp.int32)
    last_q = occupied_qn.shape[-1] - 1 - from_end_q
    return first_q, jnp.where(occupied_qn.any(axis=-1), last_q, first_q)


def inside(mask_logits: jax.Array) -> jax.Array:
    """Returns which pixels are in a segment, bool, of mask logits of any shape."""
    return jax.nn.sigmoid(mask_logits) > SEGMENT_THRESHOLD
