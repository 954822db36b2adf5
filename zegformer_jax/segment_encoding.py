"""Segments -> CLIP's features: a few at a time, and none twice.

Axes: q query, h w pixels, c colour, s crop side, d joint embedding, n bytes of a key.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from zegformer_jax.segments import STYLES, check_style, segment_images, segment_keys

NOTHING = -100.0  # a mask logit of no segment, wherever it is interpolated


def segment_features(
    encode_image: Callable[[jax.Array], jax.Array],
    image_hwc: jax.Array,
    mask_logits_qhw: jax.Array,
    *,
    style: str = STYLES[0],
    side: int = 224,
    chunk: int = 25,
    wanted_q: jax.Array | None = None,
) -> jax.Array:
    """Encodes the queries' segments with CLIP, a few at a time.

    Memory grows with ``chunk``, not with the number of queries: crops are made, encoded
    and dropped chunk by chunk. Segments that look alike, such as all the empty ones, are encoded
    once; the time falls with their number. Chunks are always full, so that the bits of a feature
    do not depend on the other segments. For a batch of images wrap this in ``jax.lax.map``.

    Args:
        encode_image: float32 [n, side, side, 3] -> float [n, d], for example a bound CLIP tower.
        image_hwc: as for ``segments.segment_images``.
        mask_logits_qhw: likewise.
        style: likewise.
        side: side of CLIP's input.
        chunk: number of segments encoded at once, if there are as many.
        wanted_q: bool [q], the others get an empty segment's features. None: all are.

    Returns:
        [q, d], as ``encode_image`` gives them (its dtype, not normalised here).

    Raises:
        ValueError: if ``style`` is unknown or ``chunk`` is not positive.
    """
    check_style(style)
    if chunk < 1:
        raise ValueError(f"segment_features: chunk must be at least 1, not {chunk}")
    queries = len(mask_logits_qhw)
    chunk = min(chunk, queries)
    # Where no logit is positive, none becomes so between pixels: such a segment is empty.
    there_q = (mask_logits_qhw > 0).any((1, 2))
    there_q = there_q if wanted_q is None else there_q & wanted_q
    shown_qhw = jnp.where(there_q[:, None, None], mask_logits_qhw, NOTHING)

    # Those that are there come first, then one that is not stands for all the others.
    order_q, place_q = _move_to_front(there_q)
    compared = jnp.minimum(there_q.sum() + 1, queries)
    keys_of = partial(segment_keys, size=image_hwc.shape[:2], style=style, side=side)
    keys_qn = _map_first(keys_of, shown_qhw[order_q], compared, chunk)
    first_q = _first_alike(keys_qn)[jnp.minimum(place_q, there_q.sum())]

    distinct_q = jnp.zeros(queries, bool).at[first_q].set(True)
    encoded_q, row_q = _move_to_front(distinct_q)
    features_qd = _map_first(
        lambda logits: encode_image(segment_images(image_hwc, logits, style=style, side=side)),
        shown_qhw[order_q][encoded_q],
        distinct_q.sum(),
        chunk,
    )
    return features_qd[row_q[first_q]]


def _move_to_front(chosen_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives an order with the chosen first, and the place of each in it."""
    order_q = jnp.argsort(~chosen_q, stable=True)
    return order_q, jnp.argsort(order_q)


def _map_first(
    function: Callable[[jax.Array], jax.Array], masks_qhw: jax.Array, count: jax.Array, chunk: int
) -> jax.Array:
    """Applies a function to the first masks, in full chunks; zeros stand for what it gives else."""
    queries, *shape = masks_qhw.shape
    length = -(-queries // chunk) * chunk
    filled = jnp.full((length, *shape), NOTHING, masks_qhw.dtype).at[:queries].set(masks_qhw)

    def apply(index: jax.Array) -> jax.Array:
        return function(jax.lax.dynamic_slice_in_dim(filled, index * chunk, chunk))

    def add(index: jax.Array, results: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(results, apply(index), index * chunk, axis=0)

    one = jax.eval_shape(apply, jnp.int32(0))
    results = jnp.zeros((length, *one.shape[1:]), one.dtype)
    return jax.lax.fori_loop(0, -(-count // chunk), add, results)[:queries]


def _first_alike(keys_qn: jax.Array) -> jax.Array:
    """Gives for each key the place of the first that equals it, int32 [q].

    Hashes say which it may be; the keys themselves are compared with that one only.
    """
    factors_2n = jax.random.bits(jax.random.key(0), (2, keys_qn.shape[1]), jnp.uint32)
    hashes_q2 = (keys_qn[:, None].astype(jnp.uint32) * factors_2n[None]).sum(-1)
    may_equal_qq = (hashes_q2[:, None] == hashes_q2[None]).all(-1)
    first_q = jnp.argmax(may_equal_qq, axis=1)
    equal_q = (keys_qn == keys_qn[first_q]).all(1)
    return jnp.where(equal_q, first_q, jnp.arange(len(keys_qn)))
