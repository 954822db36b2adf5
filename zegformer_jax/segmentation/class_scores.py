"""Class scores of every query: the ensemble of grouper and segment classifier.

ZegFormer (2022), section 3.3, with the ensemble weight l (lambda):

    P = softmax of the grouper's logits and its "no object" logit, which is then dropped
    R = softmax of CLIP's logits and the grouper's "no object" logit, which is then dropped

    grouper       P
    clip          R
    ensemble      P^l mean(R over seen)^(1-l) for seen classes, P^(1-l) R^l for unseen classes
    ensemble_all  P^(1-l) R^l for all classes

Axes: q query, c class (c1: with "no object" last), h w pixels at stride 4, d joint embedding.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

MODES = ("ensemble", "grouper", "clip", "ensemble_all")  # the first is the default
ENSEMBLE_WEIGHT = 2 / 3  # lambda in the paper, section 4.1
_EXACT = jax.lax.Precision.HIGHEST


def clip_logits(features_qd: jax.Array, text_cd: jax.Array, logit_scale: jax.Array) -> jax.Array:
    """Returns CLIP's logits, float32 [q, c]: exp(logit scale) * cosine of image and text embedding.

    Args:
        features_qd: Image features, float [q, d]; they are L2-normalised here.
        text_cd: Text embeddings, float [c, d], of unit length.
        logit_scale: CLIP's parameter of that name, the logarithm of the scale; scalar.
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
    """Returns the score of every query for every class, float32 [q, c] in [0, 1].

    Args:
        class_logits_qc1: Class logits of the grouper, float [q, c + 1], "no object" last.
        clip_logits_qc: Class logits of the segment classifier, float [q, c]; None is accepted in
            mode `grouper`.
        seen_c: bool [c], whether the class was seen in training; all or none may be.
        mode: One of `MODES`, see above.
        weight: The ensemble weight l in [0, 1].
        named_q: bool [q]; False: score the query as in mode `grouper`. None: all True.

    Raises:
        ValueError: The mode is unknown, or the segment classifier's logits are missing.
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
    """Raises ValueError unless the mode is one of `MODES`."""
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
    """Scores in a mode that the segment classifier takes part in."""
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
    """Returns the highest score that each query can reach, float32 [q], before CLIP is run.

    CLIP's logits are at most exp(logit scale) each, so its probability of all c classes together
    is at most sigmoid(log c + exp(logit scale) - the "no object" logit).

    Args:
        class_logits_qc1: Class logits of the grouper, float [q, c + 1], "no object" last.
        seen_c: bool [c], whether the class was seen in training.
        logit_scale: Logarithm of CLIP's largest logit, scalar.
        mode: One of `MODES`.
        weight: The ensemble weight l in [0, 1].

    Raises:
        ValueError: The mode is unknown.
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


def best_class(scores: jax.Array, seen_c: jax.Array, gamma: float | jax.Array) -> jax.Array:
    """Returns the class of the highest score once gamma is subtracted from those of seen classes.

    The best seen and the best unseen class are found by the scores themselves: small scores minus
    gamma all round to -gamma, and the first class would win. Of equals an unseen class wins.

    Args:
        scores: Scores of c classes, float [c, ...].
        seen_c: bool [c], whether the class was seen in training.
        gamma: The calibration, scalar.

    Returns:
        int32 [...] in 0..c-1.
    """
    of_seen = jnp.asarray(seen_c, bool).reshape(-1, *[1] * (scores.ndim - 1))

    def best(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = jnp.where(mask, scores, -jnp.inf)
        return own.argmax(0).astype(jnp.int32), own.max(0)

    (seen, seen_score), (unseen, unseen_score) = best(of_seen), best(~of_seen)
    return jnp.where(seen_score - gamma > unseen_score, seen, unseen)


def foreground_weights(class_logits_qc1: jax.Array, mask_logits_qhw: jax.Array) -> jax.Array:
    """Returns each query's expected foreground, float32 [q] in pixels: P(object) x sum of its mask.

    Args:
        class_logits_qc1: Class logits of the grouper, float [q, c + 1], "no object" last.
        mask_logits_qhw: Mask logits, float [q, h, w].
    """
    no_object_q = jax.nn.softmax(class_logits_qc1.astype(jnp.float32), axis=-1)[:, -1]
    return (1 - no_object_q) * jax.nn.sigmoid(mask_logits_qhw.astype(jnp.float32)).sum((1, 2))
