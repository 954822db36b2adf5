"""Grouper output and segment classifier -> class scores -> semantic map (ZegFormer, 2022).

Pure functions on one image; batch with ``jax.vmap`` or ``jax.lax.map``.

Axes: q query, c class, h w pixels at stride 4, y x pixels, d joint embedding.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from zegformer_jax.segments import padded_resize_matrix, resize_matrix, resize_taps

MODES = ("ensemble", "grouper", "clip", "ensemble_all")  # the first is the default
ENSEMBLE_WEIGHT = 2 / 3  # lambda of the published system
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


def semantic_map(
    scores_qc: jax.Array,
    mask_logits_qhw: jax.Array,
    *,
    padded_size: tuple[int, int],
    size: jax.Array,
    original_size: jax.Array,
    out_size: tuple[int, int],
    gamma: float | jax.Array = 0.0,
    seen_c: jax.Array | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> jax.Array:
    """Gives every pixel's score for every class, at the picture's original size.

    sum over q of score * sigmoid(mask logit at the padded size), cut to ``size``, resized
    bilinearly to ``original_size``, minus ``gamma`` on seen classes. Cut and resize are linear and
    act on pixels alone, so they are applied to the masks before the sum: the cost of
    resizing then depends on the number of queries, not on the vocabulary.

    Args:
        scores_qc: float [q, c], from ``class_scores``.
        mask_logits_qhw: float [q, h, w] at stride 4.
        padded_size: static (rows, columns) of the network's input.
        size: int32 [2], rows and columns of the input before padding; may be traced.
        original_size: int32 [2], rows and columns of the picture; may be traced.
        out_size: static (y, x) of the result, at least ``original_size``.
        gamma: calibration subtracted from the seen classes' scores, 0 for none.
        seen_c: bool [c]; needed only where ``gamma`` is given.
        rows_at_once: output rows computed together; memory grows with it.

    Returns:
        float32 [c, y, x]; 0 (minus gamma) beyond ``original_size``.
    """
    penalty_c = _penalty(gamma, seen_c, scores_qc.shape[-1])
    scores_qc = scores_qc.astype(jnp.float32)

    def finish(masks_qyx: jax.Array) -> jax.Array:
        return _weighted_sum(scores_qc, masks_qyx) - penalty_c[:, None, None]

    strips_scyx = _map_strips(
        mask_logits_qhw, jax.nn.sigmoid, finish, padded_size=padded_size, size=size,
        original_size=original_size, out_size=out_size, rows_at_once=rows_at_once,
    )  # fmt: skip
    return _join_class_strips(strips_scyx, out_size[0])


def label_map(
    scores_qc: jax.Array,
    mask_logits_qhw: jax.Array,
    *,
    padded_size: tuple[int, int],
    size: jax.Array,
    original_size: jax.Array,
    out_size: tuple[int, int],
    gamma: float | jax.Array = 0.0,
    seen_c: jax.Array | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> jax.Array:
    """Gives every pixel's class: the argmax of ``semantic_map``, without holding that map.

    Args:
        scores_qc: as for ``semantic_map``.
        mask_logits_qhw: as for ``semantic_map``.
        padded_size: as for ``semantic_map``.
        size: as for ``semantic_map``.
        original_size: as for ``semantic_map``.
        out_size: as for ``semantic_map``.
        gamma: as for ``semantic_map``.
        seen_c: as for ``semantic_map``.
        rows_at_once: as for ``semantic_map``.

    Returns:
        int32 [y, x] in 0..c-1; without meaning beyond ``original_size``.
    """
    penalty_c = _penalty(gamma, seen_c, scores_qc.shape[-1])
    scores_qc = scores_qc.astype(jnp.float32)

    def finish(masks_qyx: jax.Array) -> jax.Array:
        scores_cyx = _weighted_sum(scores_qc, masks_qyx) - penalty_c[:, None, None]
        return jnp.argmax(scores_cyx, axis=0).astype(jnp.int32)

    strips_syx = _map_strips(
        mask_logits_qhw, jax.nn.sigmoid, finish, padded_size=padded_size, size=size,
        original_size=original_size, out_size=out_size, rows_at_once=rows_at_once,
    )  # fmt: skip
    return strips_syx.reshape(-1, out_size[1])[: out_size[0]]


def per_pixel_map(
    logits_chw: jax.Array,
    *,
    padded_size: tuple[int, int],
    size: jax.Array,
    original_size: jax.Array,
    out_size: tuple[int, int],
    gamma: float | jax.Array = 0.0,
    seen_c: jax.Array | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> jax.Array:
    """Gives every pixel's class scores for the per-pixel baseline.

    Logits are upsampled to the padded size, softmax over classes, cut, resized, calibrated.

    Args:
        logits_chw: float [c, h, w] at stride 4.
        padded_size: as for ``semantic_map``.
        size: as for ``semantic_map``.
        original_size: as for ``semantic_map``.
        out_size: as for ``semantic_map``.
        gamma: as for ``semantic_map``.
        seen_c: as for ``semantic_map``.
        rows_at_once: as for ``semantic_map``.

    Returns:
        float32 [c, y, x]; 0 (minus gamma) beyond ``original_size``.
    """
    penalty_c = _penalty(gamma, seen_c, logits_chw.shape[0])
    strips_scyx = _map_strips(
        logits_chw,
        lambda logits_cyx: jax.nn.softmax(logits_cyx, axis=0),
        lambda scores_cyx: scores_cyx - penalty_c[:, None, None],
        padded_size=padded_size, size=size, original_size=original_size, out_size=out_size,
        rows_at_once=rows_at_once,
    )  # fmt: skip
    return _join_class_strips(strips_scyx, out_size[0])


def _weighted_sum(scores_qc: jax.Array, masks_qyx: jax.Array) -> jax.Array:
    return jnp.einsum("qc,qyx->cyx", scores_qc, masks_qyx, precision=_EXACT)


def _join_class_strips(strips_scyx: jax.Array, rows: int) -> jax.Array:
    """Joins strips [s, c, y, x] from top to bottom into [c, rows, x]."""
    strips_csyx = jnp.swapaxes(strips_scyx, 0, 1)
    classes, _, _, columns = strips_csyx.shape
    return strips_csyx.reshape(classes, -1, columns)[:, :rows]


def _penalty(gamma: float | jax.Array, seen_c: jax.Array | None, classes: int) -> jax.Array:
    if seen_c is None:
        if isinstance(gamma, int | float) and gamma == 0:
            return jnp.zeros(classes, jnp.float32)
        raise ValueError("semantic map: gamma is subtracted from the seen classes; pass seen_c")
    return jnp.float32(gamma) * jnp.asarray(seen_c, jnp.float32)


def _map_strips(
    logits_qhw: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    finish: Callable[[jax.Array], jax.Array],
    *,
    padded_size: tuple[int, int],
    size: jax.Array,
    original_size: jax.Array,
    out_size: tuple[int, int],
    rows_at_once: int,
) -> jax.Array:
    """Upsamples logits, applies ``activation``, cuts, resizes and finishes strip by strip.

    An output row is a mixture of two rows of the padded size, so a strip needs only those.

    Returns:
        the results of ``finish`` on [q, rows_at_once, x], stacked from top to bottom; the
        last strip is filled with rows beyond ``out_size``.
    """
    _, stride_height, stride_width = logits_qhw.shape
    padded_height, padded_width = padded_size
    (height, width), (out_height, out_width) = jnp.unstack(size), jnp.unstack(original_size)
    strips = -(-out_size[0] // rows_at_once)
    low_y, high_y, weight_y = resize_taps(height, out_height, strips * rows_at_once)
    weight_y = weight_y[:, None]
    counted_y = (jnp.arange(strips * rows_at_once) < out_height)[:, None]

    upsample_yh = resize_matrix(stride_height, padded_height)
    upsample_xw = resize_matrix(stride_width, padded_width)
    wide_qhw = jnp.einsum(
        "qhw,xw->qhx", logits_qhw.astype(jnp.float32), upsample_xw, precision=_EXACT
    )
    resize_xw = padded_resize_matrix(width, out_width, padded_width, out_size[1])

    def rows_at(index_y: jax.Array) -> jax.Array:
        rows_yh = jnp.take(upsample_yh, index_y, axis=0)
        return activation(jnp.einsum("yh,qhw->qyw", rows_yh, wide_qhw, precision=_EXACT))

    def strip(rows: tuple[jax.Array, ...]) -> jax.Array:
        low, high, weight, counted = rows
        mixed_qyw = rows_at(low) * (1 - weight)[None] + rows_at(high) * weight[None]
        cut_qyw = jnp.where(counted[None], mixed_qyw, 0.0)
        return finish(jnp.einsum("qyw,xw->qyx", cut_qyw, resize_xw, precision=_EXACT))

    rows = (low_y, high_y, weight_y, counted_y)
    split = [row.reshape(strips, rows_at_once, *row.shape[1:]) for row in rows]
    return jax.lax.map(strip, tuple(split))
