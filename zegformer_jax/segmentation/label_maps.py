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

from zegformer_jax.segmentation.resize import (
    mix_rows,
    padded_resize_matrix,
    resize_matrix,
    resize_taps,
)

RESIZE = ("after", "before")  # the map after the sum over queries, or each mask before it
STRIDE = 4  # pixels of the network's input from one mask logit to the next
STRIP_VALUES = 2**24  # float32 numbers in a strip's masks, or in its map; bounds the memory
STRIP_VALUES_ON = {"cpu": 2**21}  # faster there, in its caches; accelerators need few steps
_EXACT = jax.lax.Precision.HIGHEST


class View(NamedTuple):
    """What the models say of one version of a picture: as it is, larger, mirrored.

    Attributes:
        logits_qhw: float [q, h, w], of the masks at `STRIDE`; of the baseline's classes [c, h, w].
        size: int32 [2], rows and columns of the input before padding; may be traced.
        mirrored: static, whether the input's columns were from right to left.
    """

    logits_qhw: jax.Array
    size: jax.Array
    mirrored: bool = False


class Question(NamedTuple):
    """The maps that are asked for in one vocabulary: n ways of scoring, each with g calibrations.

    Attributes:
        scores_vnqc: for each view float [n, q, c], from ``inference.class_scores``; None for the
            per-pixel baseline, n is 1 there.
        seen_c: bool [c].
        gammas: g numbers, each subtracted from the seen classes' scores in maps of its own.
    """

    scores_vnqc: Sequence[jax.Array] | None
    seen_c: jax.Array
    gammas: Sequence[float | jax.Array] = (0.0,)


def semantic_maps(
    views: Sequence[View],
    questions: Sequence[Question],
    *,
    original_size: jax.Array,
    out_size: tuple[int, int],
    resize: str = RESIZE[0],
    rows_at_once: int | None = None,
) -> list[jax.Array]:
    """Gives every pixel's score for every class, at the picture's original size.

    sum over q of score * sigmoid(mask logit at the padded size), cut to ``size``, resized
    bilinearly to ``original_size``, averaged over the views, minus gamma on seen classes. Cut
    and resize are linear and act on pixels alone, so they are applied to the masks before the sum:
    the cost of resizing then depends on the number of queries, not on the vocabulary, and it is
    done once for all questions. With ``resize`` "before" it is the mask logits that are resized,
    and the sigmoid comes last. The baseline's logits are resized in place of the masks', with
    a softmax over classes.

    Args:
        views: one or more of the same picture, all of them of queries or of the baseline.
        questions: which maps to give.
        original_size: int32 [2], rows and columns of the picture; may be traced.
        out_size: static (y, x) of the result, at least ``original_size``.
        resize: one of ``RESIZE``.
        rows_at_once: output rows computed together, memory grows with it; None: as many as
            ``STRIP_VALUES`` allows, so that it does not grow with queries or classes.

    Returns:
        for each question float32 [n, g, c, y, x]; without meaning beyond ``original_size``.

    Raises:
        ValueError: ``resize`` is unknown.
    """
    return _map_strips(
        views, questions, lambda scores_cyx: scores_cyx,
        original_size=original_size, out_size=out_size, resize=resize, rows_at_once=rows_at_once,
    )  # fmt: skip


def label_maps(
    views: Sequence[View],
    questions: Sequence[Question],
    *,
    original_size: jax.Array,
    out_size: tuple[int, int],
    resize: str = RESIZE[0],
    rows_at_once: int | None = None,
) -> list[jax.Array]:
    """Gives every pixel's class: the argmax of ``semantic_maps``, without holding those maps.

    Args:
        views: as for ``semantic_maps``, and so are the others.
        questions: see there.
        original_size: see there.
        out_size: see there.
        resize: see there.
        rows_at_once: see there.

    Returns:
        for each question int32 [n, g, y, x] in 0..c-1; without meaning beyond ``original_size``.

    Raises:
        ValueError: as ``semantic_maps``.
    """
    return _map_strips(
        views, questions, lambda scores_cyx: jnp.argmax(scores_cyx, axis=0).astype(jnp.int32),
        original_size=original_size, out_size=out_size, resize=resize, rows_at_once=rows_at_once,
    )  # fmt: skip


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


def _activate(of_queries: bool, logits_qyx: jax.Array) -> jax.Array:
    """Masks from their logits; of the baseline the classes' probabilities."""
    return jax.nn.sigmoid(logits_qyx) if of_queries else jax.nn.softmax(logits_qyx, axis=0)


def _answer(
    question: Question, masks_vqyx: Sequence[jax.Array], finish: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Sums every view's masks by its scores, averages, calibrates and finishes: [n, g, ...]."""

    def calibrate(maps_vcyx: Sequence[jax.Array]) -> jax.Array:
        mean_cyx = sum(maps_vcyx) / len(maps_vcyx)
        seen_c11 = jnp.asarray(question.seen_c, jnp.float32)[:, None, None]
        return jnp.stack([finish(mean_cyx - gamma * seen_c11) for gamma in question.gammas])

    def score(scores_vqc: tuple[jax.Array, ...]) -> jax.Array:
        pairs = zip(scores_vqc, masks_vqyx, strict=True)
        return calibrate([jnp.einsum("qc,qyx->cyx", *pair, precision=_EXACT) for pair in pairs])

    if question.scores_vnqc is None:
        return calibrate(masks_vqyx)[None]
    # One way after the other, so that the classes' maps of only one are held.
    return jax.lax.map(score, tuple(jnp.asarray(x, jnp.float32) for x in question.scores_vnqc))


def _map_strips(
    views: Sequence[View],
    questions: Sequence[Question],
    finish: Callable[[jax.Array], jax.Array],
    *,
    original_size: jax.Array,
    out_size: tuple[int, int],
    resize: str,
    rows_at_once: int | None,
) -> list[jax.Array]:
    """Makes maps strip by strip; ``finish`` turns scores [c, rows, x] into what is given."""
    check_resize(resize)
    rows_at_once = rows_at_once or _rows_at_once(views, questions, out_size)
    strips = -(-out_size[0] // rows_at_once)
    lines = strips * rows_at_once
    activate = partial(_activate, questions[0].scores_vnqc is not None)
    rows, makers = zip(
        *(
            _resized_rows(view, activate, original_size, lines, out_size[1], resize)
            for view in views
        ),
        strict=True,
    )

    def strip(rows: tuple[Any, ...]) -> list[jax.Array]:
        masks_vqyx = [make(row) for make, row in zip(makers, rows, strict=True)]
        return [_answer(question, masks_vqyx, finish) for question in questions]

    def join(strips_syx: jax.Array) -> jax.Array:
        """From strips [s, ..., rows, x] to maps [..., y, x]."""
        rows_first = jnp.moveaxis(strips_syx, 0, -3)
        maps = rows_first.reshape(*rows_first.shape[:-3], lines, rows_first.shape[-1])
        return maps[..., : out_size[0], :]

    split = jax.tree.map(lambda row: row.reshape(strips, rows_at_once, *row.shape[1:]), rows)
    return [join(answer) for answer in jax.lax.map(strip, split)]


def _rows_at_once(
    views: Sequence[View], questions: Sequence[Question], out_size: tuple[int, int]
) -> int:
    """Rows of a strip within ``STRIP_VALUES``, the last strip as full as may be."""
    height, width = out_size
    allowed = STRIP_VALUES_ON.get(jax.default_backend(), STRIP_VALUES)
    columns = max(width, *(STRIDE * view.logits_qhw.shape[2] for view in views))
    masks = sum(len(view.logits_qhw) for view in views)
    values = columns * max(masks, *(len(question.seen_c) for question in questions))
    rows = min(max(allowed // values, 1), height)
    return -(-height // -(-height // rows))


def _resized_rows(
    view: View,
    activate: Callable[[jax.Array], jax.Array],
    original_size: jax.Array,
    lines: int,
    columns: int,
    resize: str,
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

    upsample_y = resize_taps(stride_height, padded_height, padded_height)
    upsample_xw = resize_matrix(stride_width, padded_width)
    resize_xw = padded_resize_matrix(width, out_width, padded_width, columns)
    if view.mirrored:
        resize_xw = resize_xw[_mirrored_places(columns, out_width)]
    first, last = (activate, _unchanged) if resize == "after" else (_unchanged, activate)

    def rows_at(index_y: jax.Array) -> jax.Array:
        taps = [jnp.take(tap_y, index_y) for tap_y in upsample_y]
        narrow_qyw = mix_rows(view.logits_qhw, *taps)
        return first(jnp.einsum("qyw,xw->qyx", narrow_qyw, upsample_xw, precision=_EXACT))

    def make(rows: tuple[jax.Array, ...]) -> jax.Array:
        low, high, weight, counted = rows
        mixed_qyw = rows_at(low) * (1 - weight)[None] + rows_at(high) * weight[None]
        cut_qyw = jnp.where(counted[None], mixed_qyw, 0.0)
        return last(jnp.einsum("qyw,xw->qyx", cut_qyw, resize_xw, precision=_EXACT))

    return (low_y, high_y, weight_y[:, None], counted_y), make


def _unchanged(maps: jax.Array) -> jax.Array:
    return maps
