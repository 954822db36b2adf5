"""Grouper output and segment classifier -> class scores -> semantic map (ZegFormer, 2022).

Pure functions on one image; batch with ``jax.vmap`` or ``jax.lax.map``.

Axes: q query, c class, h w pixels at stride 4, y x pixels, d joint embedding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zegformer_jax.segments import padded_resize_matrix, resize_matrix, resize_taps

MODES = ("ensemble", "grouper", "clip", "ensemble_all")  # the first is the default
ENSEMBLE_WEIGHT = 2 / 3  # lambda of the published system
RESIZE = ("after", "before")  # the map after the sum over queries, or each mask before it
STRIDE = 4  # pixels of the network's input from one mask logit to the next
ROWS_AT_ONCE = 32  # output rows per strip; bounds the memory of the full-resolution masks

_EXACT = jax.lax.Precision.HIGHEST


def clip_logits(features_qd: jax.Array, text_cd: jax.Array, logit_scale: jax.Array) -> jax.Array:
    """Gives CLIP's logits: exp(logit_scale) * <normalised image feature, text embedding>.

    Args:
        features_qd: float [q, d], of any length (they are L2-normalised here).
        text_cd: float [c, d], already of length 1.
        logit_scale: CLIP's parameter of that name, the logarithm of the scale; scalar.

    Returns:
        float32 [q, c].
    """
    features_qd = features_qd.astype(jnp.float32)
    norm_q1 = jnp.linalg.norm(features_qd, axis=-1, keepdims=True)
    cosine_qc = jnp.einsum(
        "qd,cd->qc", features_qd / norm_q1, text_cd.astype(jnp.float32), precision=_EXACT
    )
    return jnp.exp(jnp.float32(logit_scale)) * cosine_qc


def select_classes(class_logits_qc1: jax.Array, indices: Sequence[int] | jax.Array) -> jax.Array:
    """Restricts class logits to some classes, keeping the last column, "no object".

    Logits do not depend on the other classes, so this equals running the grouper with the
    smaller vocabulary.

    Args:
        class_logits_qc1: float [..., c + 1].
        indices: the k classes to keep, in their new order, each in 0..c-1.

    Returns:
        [..., k + 1].
    """
    kept = jnp.take(class_logits_qc1, jnp.asarray(indices, jnp.int32), axis=-1)
    return jnp.concatenate([kept, class_logits_qc1[..., -1:]], axis=-1)


def class_scores(
    class_logits_qc1: jax.Array,
    clip_logits_qc: jax.Array | None,
    seen_c: jax.Array,
    *,
    mode: str = MODES[0],
    weight: float = ENSEMBLE_WEIGHT,
    named_q: jax.Array | None = None,
) -> jax.Array:
    """Scores every query for every class, from the grouper, CLIP or both.

    P is the softmax of the grouper's logits, R that of CLIP's with the grouper's "no object" logit
    appended, both without their last column; l is ``weight``.

    Args:
        class_logits_qc1: float [q, c + 1], the grouper's, "no object" last.
        clip_logits_qc: float [q, c]; None is accepted in mode "grouper".
        seen_c: bool [c], whether the class was seen in training; all or none may be.
        mode: "grouper": P. "clip": R. "ensemble": R of the seen classes is replaced by its mean
            over them, then P^l R^(1-l) for seen and P^(1-l) R^l for unseen classes.
            "ensemble_all": P^(1-l) R^l for every class.
        weight: l in [0, 1].
        named_q: bool [q], whether CLIP's logits are the query's own; the others are scored as in
            mode "grouper". None: all are.

    Returns:
        float32 [q, c] in [0, 1].

    Raises:
        ValueError: if ``mode`` is unknown or CLIP's logits are missing.
    """
    check_mode(mode)
    class_logits_qc1 = class_logits_qc1.astype(jnp.float32)
    grouper_qc = jax.nn.softmax(class_logits_qc1, axis=-1)[:, :-1]
    if mode == "grouper":
        return grouper_qc
    scores_qc = _scores_with_clip(
        class_logits_qc1, grouper_qc, clip_logits_qc, seen_c, mode, weight
    )
    return scores_qc if named_q is None else jnp.where(named_q[:, None], scores_qc, grouper_qc)


def check_mode(mode: str) -> None:
    """Raises ValueError unless ``mode`` is one of ``MODES``."""
    if mode not in MODES:
        raise ValueError(f"score mode {mode!r} is unknown; choose one of {', '.join(MODES)}")


def _scores_with_clip(
    class_logits_qc1: jax.Array,
    grouper_qc: jax.Array,
    clip_logits_qc: jax.Array | None,
    seen_c: jax.Array,
    mode: str,
    weight: float,
) -> jax.Array:
    """Scores in a mode that CLIP takes part in; see ``class_scores``."""
    if clip_logits_qc is None:
        raise ValueError(f"score mode {mode!r} needs CLIP's logits; only 'grouper' does without")

    no_object_q1 = class_logits_qc1[:, -1:]
    with_no_object = jnp.concatenate([clip_logits_qc.astype(jnp.float32), no_object_q1], axis=-1)
    clip_qc = jax.nn.softmax(with_no_object, axis=-1)[:, :-1]
    if mode == "clip":
        return clip_qc
    if mode == "ensemble_all":
        return grouper_qc ** (1 - weight) * clip_qc**weight

    seen_1c = jnp.asarray(seen_c, bool)[None]
    seen_count = jnp.maximum(seen_1c.sum(), 1)
    seen_mean_q1 = jnp.where(seen_1c, clip_qc, 0.0).sum(axis=-1, keepdims=True) / seen_count
    seen_scores_qc = grouper_qc**weight * seen_mean_q1 ** (1 - weight)
    unseen_scores_qc = grouper_qc ** (1 - weight) * clip_qc**weight
    return jnp.where(seen_1c, seen_scores_qc, unseen_scores_qc)


def score_bounds(
    class_logits_qc1: jax.Array,
    seen_c: jax.Array,
    logit_scale: jax.Array,
    *,
    mode: str = MODES[0],
    weight: float = ENSEMBLE_WEIGHT,
) -> jax.Array:
    """Says how large a query's scores can get, whatever CLIP will say of its segment.

    CLIP's logits are at most exp(logit_scale) each, so that its probability of all c classes
    together is at most sigmoid(log c + exp(logit_scale) - the "no object" logit).

    Args:
        class_logits_qc1: as for ``class_scores``.
        seen_c: likewise.
        logit_scale: CLIP's parameter of that name, the logarithm of the scale; scalar.
        mode: as for ``class_scores``.
        weight: likewise.

    Returns:
        float32 [q] in [0, 1]: no score of the query exceeds it.
    """
    check_mode(mode)
    class_logits_qc1 = class_logits_qc1.astype(jnp.float32)
    grouper_qc = jax.nn.softmax(class_logits_qc1, axis=-1)[:, :-1]
    largest_q = grouper_qc.max(axis=-1)
    if mode == "grouper":
        return largest_q
    most = jnp.log(grouper_qc.shape[-1]) + jnp.exp(jnp.float32(logit_scale))
    clip_q = jax.nn.sigmoid(most - class_logits_qc1[:, -1])
    if mode == "clip":
        return clip_q
    if mode == "ensemble_all":
        return largest_q ** (1 - weight) * clip_q**weight
    seen_1c = jnp.asarray(seen_c, bool)[None]
    seen_q = jnp.where(seen_1c, grouper_qc, 0.0).max(axis=-1)
    unseen_q = jnp.where(seen_1c, 0.0, grouper_qc).max(axis=-1)
    return jnp.maximum(
        seen_q**weight * clip_q ** (1 - weight), unseen_q ** (1 - weight) * clip_q**weight
    )


def foreground_weights(class_logits_qc1: jax.Array, mask_logits_qhw: jax.Array) -> jax.Array:
    """Gives what each query covers: its mask's sum times its probability of being an object.

    Args:
        class_logits_qc1: float [q, c + 1], the grouper's, "no object" last.
        mask_logits_qhw: float [q, h, w].

    Returns:
        float32 [q], in pixels of the masks.
    """
    no_object_q = jax.nn.softmax(class_logits_qc1.astype(jnp.float32), axis=-1)[:, -1]
    return (1 - no_object_q) * jax.nn.sigmoid(mask_logits_qhw.astype(jnp.float32)).sum((1, 2))


class View(NamedTuple):
    """What the models say of one version of a picture: as it is, larger, mirrored.

    Attributes:
        scores_qc: float [q, c], from ``class_scores``; None for the per-pixel baseline.
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
