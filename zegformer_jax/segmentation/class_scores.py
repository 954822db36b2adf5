"""Grouper output and segment classifier -> class scores (ZegFormer, 2022).

Pure functions on one image; batch with ``jax.vmap`` or ``jax.lax.map``.

Axes: q query, c class, h w pixels at stride 4, d joint embedding.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

MODES = ("ensemble", "grouper", "clip", "ensemble_all")  # the first is the default
ENSEMBLE_WEIGHT = 2 / 3  # lambda of the published system
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


def select_classes(
    class_logits_qc1: jax.Array, indices: Sequence[int] | jax.Array | None
) -> jax.Array:
    """Restricts class logits to some classes and keeps the last column, "no object".

    Logits do not depend on the other classes, so this equals running the grouper with the
    smaller vocabulary.

    Args:
        class_logits_qc1: float [..., c + 1].
        indices: The k classes to keep, in their new order, each in 0..c-1; None keeps all.

    Returns:
        [..., k + 1].
    """
    if indices is None:
        return class_logits_qc1
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
