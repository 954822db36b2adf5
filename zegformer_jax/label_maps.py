"""Class scores and masks -> semantic map and label map at the picture's size (ZegFormer, 2022).

Pure functions on one picture, strip by strip, so that no full-resolution copy of all masks or of
all classes is held.

Axes: q query, c class, h w pixels at stride 4, y x pixels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zegformer_jax.segments import padded_resize_matrix, resize_matrix, resize_taps

RESIZE = ("after", "before")  # the map after the sum over queries, or each mask before it
STRIDE = 4  # pixels of the network's input from one mask logit to the next
ROWS_AT_ONCE = 32  # output rows per strip; bounds the memory of the full-resolution masks

_EXACT = jax.lax.Precision.HIGHEST


class View(NamedTuple):
    """What the models say of one version of a picture: as it is, larger, mirrored.

    Attributes:
        scores_qc: float [q, c], from ``inference.class_scores``; None for the per-pixel baseline.
        logits_qhw: float [q, h, w], of the masks at `STRIDE`; of the baseline's classes [c, h, w].
        size: int32 [2], rows and columns of the input before padding; may be traced.
        mirrored: static, whether the input's columns were from right to left.
    """

    scores_qc: jax.Array | None
    logits_qhw: jax.Array
    size: jax.Array
    mirrored: bool = False


def semantic_map(
    views: Sequence[View],
    *,
    original_size: jax.Array,
    out_size: tuple[int, int],
    gamma: float | jax.Array = 0.0,
    seen_c: jax.Array | None = None,
    resize: str = RESIZE[0],
    rows_at_once: int = ROWS_AT_ONCE,
) -> jax.Array:
    """Gives every pixel's score for every class, at the picture's original size.

    sum over q of score * sigmoid(mask logit at the padded size), cut to ``size``, resized
    bilinearly to ``original_size``, averaged over the views, minus ``gamma`` on seen classes. Cut
    and resize are linear and act on pixels alone, so they are applied to the masks before the sum:
    the cost of resizing then depends on the number of queries, not on the vocabulary. With
    ``resize`` "before" it is the mask logits that are resized, and the sigmoid comes last. The
    baseline's logits are resized in place of the masks', with a softmax over classes.

    Args:
        views: one or more of the same picture, all of them of queries or of the baseline.
        original_size: int32 [2], rows and columns of the picture; may be traced.
        out_size: static (y, x) of the result, at least ``original_size``.
        gamma: calibration subtracted from the seen classes' scores, 0 for none.
        seen_c: bool [c]; needed only where ``gamma`` is given.
        resize: one of ``RESIZE``.
        rows_at_once: output rows computed together; memory grows with it.

    Returns:
        float32 [c, y, x]; without meaning beyond ``original_size``.

    Raises:
        ValueError: ``resize`` is unknown, or ``gamma`` comes without ``seen_c``.
    """
    penalty_c = _penalty(gamma, seen_c, views[0])
    strips_scyx = _map_strips(
        views, lambda scores_cyx: scores_cyx - penalty_c[:, None, None],
        original_size=original_size, out_size=out_size, resize=resize, rows_at_once=rows_at_once,
    )  # fmt: skip
    strips_csyx = jnp.swapaxes(strips_scyx, 0, 1)
    classes, _, _, columns = strips_csyx.shape
    return strips_csyx.reshape(classes, -1, columns)[:, : out_size[0]]


def label_map(
    views: Sequence[View],
    *,
    original_size: jax.Array,
    out_size: tuple[int, int],
    gamma: float | jax.Array = 0.0,
    seen_c: jax.Array | None = None,
    resize: str = RESIZE[0],
    rows_at_once: int = ROWS_AT_ONCE,
) -> jax.Array:
    """Gives every pixel's class: the argmax of ``semantic_map``, without holding that map.

    Args:
        views: as for ``semantic_map``, and so are the others.
        original_size: see there.
        out_size: see there.
        gamma: see there.
        seen_c: see there.
        resize: see there.
        rows_at_once: see there.

    Returns:
        int32 [y, x] in 0..c-1; without meaning beyond ``original_size``.

    Raises:
        ValueError: as ``semantic_map``.
    """
    penalty_c = _penalty(gamma, seen_c, views[0])

    def finish(scores_cyx: jax.Array) -> jax.Array:
        return jnp.argmax(scores_cyx - penalty_c[:, None, None], axis=0).astype(jnp.int32)

    strips_syx = _map_strips(
        views, finish, original_size=original_size, out_size=out_size, resize=resize,
        rows_at_once=rows_at_once,
    )  # fmt: skip
    return strips_syx.reshape(-1, out_size[1])[: out_size[0]]


def check_resize(resize: str) -> None:
    """Raises ValueError unless ``resize`` is one of ``RESIZE``."""
    if resize not in RESIZE:
        raise ValueError(f"resize {resize!r} is unknown; choose one of {', '.join(RESIZE)}")


def mirror(image_hwc: jax.Array, size: jax.Array) -> jax.Array:
    """Turns the columns of a padded image from right to left, its padding apart.

    Args:
        image_hwc: [h, w, 3], padded at the bottom and right.
        size: int [2], rows and columns before padding; may be traced.
    """
    return image_hwc[:, _mirrored_places(image_hwc.shape[1], size[1])]


def _mirrored_places(length: int, size: jax.Array) -> jax.Array:
    places = jnp.arange(length)
    return jnp.where(places < size, size - 1 - places, places)


def _penalty(gamma: float | jax.Array, seen_c: jax.Array | None, view: View) -> jax.Array:
    if seen_c is None:
        if isinstance(gamma, int | float) and gamma == 0:
            classes = len(view.logits_qhw) if view.scores_qc is None else view.scores_qc.shape[-1]
            return jnp.zeros(classes, jnp.float32)
        raise ValueError("semantic map: gamma is subtracted from the seen classes; pass seen_c")
    return jnp.float32(gamma) * jnp.asarray(seen_c, jnp.float32)


def _activate(view: View, logits_qyx: jax.Array) -> jax.Array:
    """Masks from their logits; of the baseline the classes' probabilities."""
    if view.scores_qc is None:
        return jax.nn.softmax(logits_qyx, axis=0)
    return jax.nn.sigmoid(logits_qyx)


def _class_maps(view: View, maps_qyx: jax.Array) -> jax.Array:
    """Sums masks by their scores; the baseline's maps are of classes as they are."""
    if view.scores_qc is None:
        return maps_qyx
    scores_qc = view.scores_qc.astype(jnp.float32)
    return jnp.einsum("qc,qyx->cyx", scores_qc, maps_qyx, precision=_EXACT)


def _map_strips(
    views: Sequence[View],
    finish: Callable[[jax.Array], jax.Array],
    *,
    original_size: jax.Array,
    out_size: tuple[int, int],
    resize: str,
    rows_at_once: int,
) -> jax.Array:
    """Makes the classes' maps strip by strip, averages them over the views and finishes them.

    Returns:
        the results of ``finish`` on [c, rows_at_once, x], stacked from top to bottom; the
        last strip is filled with rows beyond ``out_size``.
    """
    check_resize(resize)
    strips = -(-out_size[0] // rows_at_once)
    lines = strips * rows_at_once
    rows, makers = zip(
        *(_resized_rows(view, original_size, lines, out_size[1], resize) for view in views),
        strict=True,
    )

    def strip(rows: tuple[Any, ...]) -> jax.Array:
        maps = [
            _class_maps(view, make(row))
            for view, make, row in zip(views, makers, rows, strict=True)
        ]
        return finish(sum(maps) / len(maps))

    split = jax.tree.map(lambda row: row.reshape(strips, rows_at_once, *row.shape[1:]), rows)
    return jax.lax.map(strip, split)


def _resized_rows(
    view: View, original_size: jax.Array, lines: int, columns: int, resize: str
) -> tuple[Any, Callable[[Any], jax.Array]]:
    """Prepares a view's maps at the original size, to be made a few rows at a time.

    An output row is a mixture of two rows of the padded size, so some of them need only those.

    Returns:
        arrays [lines, ...], and a function of some of their rows to the maps [q, y, columns].
    """
    _, stride_height, stride_width = view.logits_qhw.shape
    padded_height, padded_width = STRIDE * stride_height, STRIDE * stride_width
    (height, width), (out_height, out_width) = jnp.unstack(view.size), jnp.unstack(original_size)
    low_y, high_y, weight_y = resize_taps(height, out_height, lines)
    counted_y = (jnp.arange(lines) < out_height)[:, None]

    upsample_yh = resize_matrix(stride_height, padded_height)
    upsample_xw = resize_matrix(stride_width, padded_width)
    wide_qhw = jnp.einsum(
        "qhw,xw->qhx", view.logits_qhw.astype(jnp.float32), upsample_xw, precision=_EXACT
    )
    resize_xw = padded_resize_matrix(width, out_width, padded_width, columns)
    if view.mirrored:
        resize_xw = resize_xw[_mirrored_places(columns, out_width)]
    first = last = partial(_activate, view)
    if resize == "after":
        last = _unchanged
    else:
        first = _unchanged

    def rows_at(index_y: jax.Array) -> jax.Array:
        rows_yh = jnp.take(upsample_yh, index_y, axis=0)
        return first(jnp.einsum("yh,qhw->qyw", rows_yh, wide_qhw, precision=_EXACT))

    def make(rows: tuple[jax.Array, ...]) -> jax.Array:
        low, high, weight, counted = rows
        mixed_qyw = rows_at(low) * (1 - weight)[None] + rows_at(high) * weight[None]
        cut_qyw = jnp.where(counted[None], mixed_qyw, 0.0)
        return last(jnp.einsum("qyw,xw->qyx", cut_qyw, resize_xw, precision=_EXACT))

    return (low_y, high_y, weight_y[:, None], counted_y), make


def _unchanged(maps: jax.Array) -> jax.Array:
    return maps
