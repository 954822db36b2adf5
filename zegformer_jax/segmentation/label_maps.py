"""Class scores and masks -> label maps at the image's original size, a strip of rows at a time.

1. Sum over queries of class score x sigmoid(mask logit), at the padded size.
2. Cut off the padding.
3. Resize bilinearly to the original size.
4. Average over the views; of tiles, blend those that overlap.
5. Subtract gamma from the scores of seen classes, and take the class of the highest score.

Steps 2 and 3 are linear and act on pixels alone, so they are applied to the masks before the sum:
their cost depends on the number of queries, not of classes, and is paid once for all vocabularies.

Axes: v view, q query, c class, n way of scoring, g calibration, h w pixels at stride 4, y x pixels
of the label map.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.target import target_device
from zegformer_jax.segmentation.augmentation import View, mirrored_columns
from zegformer_jax.segmentation.class_scores import best_class
from zegformer_jax.segmentation.resize import (
    EXACT,
    mix_rows,
    padded_resize_matrix,
    resize_matrix,
    resize_taps,
)
from zegformer_jax.segmentation.tiles import Window

RESIZE = ("after", "before")  # the map after the sum over queries, or each mask before it
STRIDE = 4  # pixels of the network's input from one mask logit to the next
STRIP_VALUES = 2**24  # float32 numbers in a strip's masks, or in its map; bounds the memory
STRIP_VALUES_ON = {"cpu": 2**21}  # faster there, in its caches; accelerators need few steps


class ClassScores(NamedTuple):
    """Class scores of one vocabulary: n ways of scoring, with g calibrations each.

    Attributes:
        scores_vnqc: For each view float [n, q, c], from `class_scores`; None for the per-pixel
            baseline, whose maps are its class probabilities (n is 1).
        seen_c: bool [c].
        gammas: The g calibrations; gamma is subtracted from the scores of seen classes.
    """

    scores_vnqc: Sequence[jax.Array] | None
    seen_c: jax.Array
    gammas: Sequence[float | jax.Array] = (0.0,)


def label_maps(
    logits_vqhw: Sequence[jax.Array],
    views: Sequence[View],
    scores: Sequence[ClassScores],
    *,
    original_size: jax.Array,
    out_size: tuple[int, int],
    resize: str = RESIZE[0],
    windows: Sequence[Window] | None = None,
    rows_at_once: int | None = None,
) -> list[jax.Array]:
    """Returns every pixel's class.

    Args:
        logits_vqhw: For each view mask logits at `STRIDE`, float [q, h, w]; for the baseline class
            logits [c, h, w], with a softmax over classes instead of the sigmoid.
        views: The views, one or more of the same image; their pixels are not read.
        scores: Which maps to make.
        original_size: int32 [2], rows and columns of the image; may be traced.
        out_size: Static (y, x) of the result, at least `original_size`.
        resize: One of `RESIZE`. With "before" the mask logits are resized to the original size
            and the sigmoid comes last.
        windows: The views are those of one tile after the other, each with as many. For each tile:
            which part of its map goes into the result, with which weights. `original_size` is then
            a tile's, static. None: the views are of one image.
        rows_at_once: Output rows computed together; None: as many as `STRIP_VALUES` allows, which
            bounds the memory.

    Returns:
        For each of `scores` int32 [n, g, y, x] in 0..c-1; undefined beyond `original_size`, or
        where the weights of all windows are 0.

    Raises:
        UserError: `resize` is unknown.
    """
    return map_strips(
        best_class,
        logits_vqhw,
        views,
        scores,
        original_size=original_size,
        out_size=out_size,
        resize=resize,
        windows=windows,
        rows_at_once=rows_at_once,
    )


def map_strips(
    finish: Callable[[jax.Array, jax.Array, float | jax.Array], jax.Array],
    logits_vqhw: Sequence[jax.Array],
    views: Sequence[View],
    scores: Sequence[ClassScores],
    *,
    original_size: jax.Array,
    out_size: tuple[int, int],
    resize: str = RESIZE[0],
    windows: Sequence[Window] | None = None,
    rows_at_once: int | None = None,
) -> list[jax.Array]:
    """Applies `finish` to the class scores, strip by strip.

    `finish` maps scores [c, rows, x], the seen classes and a gamma to [..., rows, x]; the other
    arguments are those of `label_maps`.
    """
    if resize not in RESIZE:
        raise UserError(f"eval.resize '{resize}': choose one of {', '.join(RESIZE)}")
    rows_at_once = rows_at_once or _rows_at_once(logits_vqhw, scores, out_size)
    strips = -(-out_size[0] // rows_at_once)
    lines = strips * rows_at_once
    activate = partial(_activate, scores[0].scores_vnqc is not None)
    sides = (lines, out_size[1]) if windows is None else original_size
    parts = [
        _resized_rows(logits_qhw, view, activate, jnp.asarray(original_size), *sides, resize)
        for logits_qhw, view in zip(logits_vqhw, views, strict=True)
    ]
    views_of_tile = len(views) // len(windows or (None,))
    if windows is not None:
        parts = [
            _window_rows(*part, windows[place // views_of_tile], lines)
            for place, part in enumerate(parts)
        ]
    rows, makers = zip(*parts, strict=True)

    def strip(rows: tuple[Any, ...]) -> list[jax.Array]:
        masks_vqyx = [make(row) for make, row in zip(makers, rows, strict=True)]
        return [
            _combine(of_vocabulary, masks_vqyx, finish, views_of_tile) for of_vocabulary in scores
        ]

    def join(strips_syx: jax.Array) -> jax.Array:
        """Joins strips [s, ..., rows, x] to maps [..., y, x]."""
        rows_first = jnp.moveaxis(strips_syx, 0, -3)
        maps = rows_first.reshape(*rows_first.shape[:-3], lines, rows_first.shape[-1])
        return maps[..., : out_size[0], :]

    split = jax.tree.map(lambda row: row.reshape(strips, rows_at_once, *row.shape[1:]), rows)
    return [join(maps) for maps in jax.lax.map(strip, split)]


def _activate(of_queries: bool, logits_qyx: jax.Array) -> jax.Array:
    """Masks of mask logits; class probabilities of the baseline's logits."""
    return jax.nn.sigmoid(logits_qyx) if of_queries else jax.nn.softmax(logits_qyx, axis=0)


def _combine(
    scores: ClassScores,
    masks_vqyx: Sequence[jax.Array],
    finish: Callable[..., jax.Array],
    weight: int,
) -> jax.Array:
    """Weighs masks by scores, averages views, applies `finish` for each gamma: [n, g, ...].

    The masks' weights sum to `weight`.
    """

    def calibrate(maps_vcyx: Sequence[jax.Array]) -> jax.Array:
        mean_cyx = sum(maps_vcyx) / weight
        return jnp.stack([finish(mean_cyx, scores.seen_c, gamma) for gamma in scores.gammas])

    def weigh(scores_vqc: tuple[jax.Array, ...]) -> jax.Array:
        pairs = zip(scores_vqc, masks_vqyx, strict=True)
        return calibrate([jnp.einsum("qc,qyx->cyx", *pair, precision=EXACT) for pair in pairs])

    if scores.scores_vnqc is None:
        return calibrate(masks_vqyx)[None]
    # One way of scoring after the other, so that only one's maps of classes are held.
    return jax.lax.map(weigh, tuple(jnp.asarray(x, jnp.float32) for x in scores.scores_vnqc))


def _rows_at_once(
    logits_vqhw: Sequence[jax.Array], scores: Sequence[ClassScores], out_size: tuple[int, int]
) -> int:
    """Rows of a strip within `STRIP_VALUES`, the last strip as full as possible."""
    height, width = out_size
    allowed = STRIP_VALUES_ON.get(target_device().platform, STRIP_VALUES)
    columns = max(width, *(STRIDE * logits_qhw.shape[2] for logits_qhw in logits_vqhw))
    masks = sum(len(logits_qhw) for logits_qhw in logits_vqhw)
    values = columns * max(masks, *(len(of_vocabulary.seen_c) for of_vocabulary in scores))
    rows = min(max(allowed // values, 1), height)
    return -(-height // -(-height // rows))


def _resized_rows(
    logits_qhw: jax.Array,
    view: View,
    activate: Callable[[jax.Array], jax.Array],
    original_size: jax.Array,
    lines: int,
    columns: int,
    resize: str,
) -> tuple[Any, Callable[[Any], jax.Array]]:
    """Prepares a view's maps at the original size, to be made a few rows at a time.

    An output row mixes two rows of the padded size, so a strip needs only those.

    Returns:
        Interpolation data per row [lines, ...], and `make(rows)`, which computes those rows of the
        maps [q, y, columns].
    """
    _, stride_height, stride_width = logits_qhw.shape
    padded_height, padded_width = STRIDE * stride_height, STRIDE * stride_width
    (height, width), (out_height, out_width) = jnp.unstack(view.size), jnp.unstack(original_size)
    low_y, high_y, weight_y = resize_taps(height, out_height, lines)
    counted_y = (jnp.arange(lines) < out_height)[:, None]

    upsample_y = resize_taps(stride_height, padded_height, padded_height)
    upsample_xw = resize_matrix(stride_width, padded_width)
    resize_xw = padded_resize_matrix(width, out_width, padded_width, columns)
    if view.mirrored:
        resize_xw = resize_xw[mirrored_columns(columns, out_width)]
    first, last = (activate, _unchanged) if resize == "after" else (_unchanged, activate)

    def rows_at(index_y: jax.Array) -> jax.Array:
        taps = [jnp.take(tap_y, index_y) for tap_y in upsample_y]
        narrow_qyw = mix_rows(logits_qhw, *taps)
        return first(jnp.einsum("qyw,xw->qyx", narrow_qyw, upsample_xw, precision=EXACT))

    def make(rows: tuple[jax.Array, ...]) -> jax.Array:
        low, high, weight, counted = rows
        mixed_qyw = rows_at(low) * (1 - weight)[None] + rows_at(high) * weight[None]
        cut_qyw = jnp.where(counted[None], mixed_qyw, 0.0)
        return last(jnp.einsum("qyw,xw->qyx", cut_qyw, resize_xw, precision=EXACT))

    return (low_y, high_y, weight_y[:, None], counted_y), make


def _window_rows(
    rows: tuple[jax.Array, ...], make: Callable[[Any], jax.Array], window: Window, lines: int
) -> tuple[Any, Callable[[Any], jax.Array]]:
    """Cuts a window out of what `_resized_rows` returned for a whole tile, and weighs it."""
    index_y = window.start[0] + jnp.arange(lines)
    index_x = window.start[1] + jnp.arange(len(window.weights_x))
    rows_y = jax.tree.map(lambda of_tile: jnp.take(of_tile, index_y, axis=0, mode="clip"), rows)
    weights_y = jnp.pad(window.weights_y, (0, lines - len(window.weights_y)))

    def make_window(rows: tuple[Any, jax.Array]) -> jax.Array:
        of_tile, weights_y = rows
        masks_qyx = jnp.take(make(of_tile), index_x, axis=2, mode="clip")
        return masks_qyx * (weights_y[:, None] * window.weights_x[None])[None]

    return (rows_y, weights_y), make_window


def _unchanged(maps: jax.Array) -> jax.Array:
    return maps
