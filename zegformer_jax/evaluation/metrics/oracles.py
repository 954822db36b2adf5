"""Oracles: what the segments, or the class scores, would reach if the other half were perfect.

Axes: q query, c class, n region, h w pixels at stride 4, y x pixels of the label map.
"""

import jax
import jax.numpy as jnp

from zegformer_jax.evaluation.metrics.confusion import confusion_counts
from zegformer_jax.evaluation.metrics.segment_fit import UNLABELLED, Overlap, sum_strips

NO_REGION = -1  # the class of an unused place among regions


def right_names_counts(
    mask_logits_qhw: jax.Array, label_yx: jax.Array, counts: Overlap
) -> jax.Array:
    """Counts pixels by label and prediction where every segment has the right name.

    A segment's name is the class that most of its labelled pixels have (of equals the first). A
    pixel takes the name of the segment with the largest mask probability there, of those that have
    a name; where no segment of the picture has one, class 0.

    Args:
        mask_logits_qhw: float [q, h, w] at stride 4.
        label_yx: integer [y, x]; pixels with a label outside 0..c-1 are dropped.
        counts: of these, from ``overlap``, in the vocabulary of the label map.

    Returns:
        int32 [c, c], indexed [label, prediction], in pixels of the label map.
    """
    num_classes = len(counts.labelled_c)
    name_q = counts.shared_qc.argmax(axis=-1).astype(jnp.int32)
    named_q11 = (counts.shared_qc > 0).any(axis=-1)[:, None, None]

    def add(total_cc: jax.Array, logits_qyx: jax.Array, labels_yx: jax.Array) -> jax.Array:
        best_yx = jnp.where(named_q11, logits_qyx, -jnp.inf).argmax(axis=0)
        predictions_yx = name_q[best_yx]
        return total_cc + confusion_counts(predictions_yx, labels_yx, num_classes, UNLABELLED)

    start = jnp.zeros((num_classes, num_classes), jnp.int32)
    return sum_strips(add, start, mask_logits_qhw, label_yx)


def largest_regions(labelled_c: jax.Array, places: int) -> jax.Array:
    """Lists a label map's classes by falling area, for something that names regions one by one.

    Args:
        labelled_c: [c], the pixels of each class, as ``Overlap`` has them.
        places: static number n of regions; more are left out, the smallest ones.

    Returns:
        int32 [n], ``NO_REGION`` where there are fewer.
    """
    order_c = jnp.argsort(-labelled_c, stable=True)
    classes_c = jnp.where(labelled_c[order_c] > 0, order_c, NO_REGION)
    filler_n = jnp.full(max(places - len(labelled_c), 0), NO_REGION)
    return jnp.concatenate([classes_c, filler_n])[:places].astype(jnp.int32)


def right_segments_counts(
    scores_nc: jax.Array, classes_n: jax.Array, labelled_c: jax.Array
) -> jax.Array:
    """Counts pixels by label and prediction where the segments are the labelled regions.

    Each region, all pixels of a class, gets the one class that scores highest for it.

    Args:
        scores_nc: float [n, c], of each region for each class.
        classes_n: int32 [n], the class of each region, each once, ``NO_REGION`` in unused places;
            see ``largest_regions``. Regions that are not among them are not counted.
        labelled_c: [c], the pixels of each class, as ``Overlap`` has them.

    Returns:
        int32 [c, c], indexed [label, prediction].

    Raises:
        ValueError: if the shapes do not fit.
    """
    num_classes = len(labelled_c)
    if scores_nc.shape != (len(classes_n), num_classes):
        raise ValueError(
            f"right_segments_counts: scores are {scores_nc.shape}, "
            f"regions {len(classes_n)}, classes {num_classes}"
        )
    used_n = classes_n != NO_REGION
    pixels_n = jnp.where(used_n, labelled_c[classes_n], 0).astype(jnp.int32)
    total_cc = jnp.zeros((num_classes, num_classes), jnp.int32)
    return total_cc.at[jnp.where(used_n, classes_n, 0), scores_nc.argmax(axis=-1)].add(pixels_n)
