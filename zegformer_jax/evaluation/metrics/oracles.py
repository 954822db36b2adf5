"""Oracles: the scores that each half of the method reaches if the other half were perfect.

Axes: q query, c class, n region, h w pixels at stride 4, y x pixels of the network's input.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from zegformer_jax.evaluation.metric import Metric, Prediction, Truth
from zegformer_jax.evaluation.metrics.confusion import confusion_counts, subset_scores
from zegformer_jax.evaluation.metrics.segment_fit import UNLABELLED, Overlap, overlap, sum_strips
from zegformer_jax.evaluation.plan import Plan
from zegformer_jax.evaluation.subsets import Subset
from zegformer_jax.segmentation.class_scores import best_class
from zegformer_jax.segmentation.zegformer import Queries, Question, ZegFormer

RIGHT_NAMES = "the segments with their right names"
RIGHT_SEGMENTS = "the labelled regions with the names of the segments that fit best"
NO_REGION = -1  # the class of an unused place among regions


@dataclass(frozen=True, eq=False)
class Oracle:
    """A confusion matrix in one vocabulary with one half of the method replaced by the truth.

    Its state is int [c, c], indexed [label, prediction], in pixels of the network's input.

    Attributes:
        name: Name in the report.
        subset: The vocabulary.
        question: The question of the subset.
        classes: Number of classes in the data set's vocabulary.
    """

    name: str
    subset: Subset
    question: Question
    classes: int

    @property
    def vocabulary(self) -> str:
        """Name of the vocabulary."""
        return self.subset.stem

    def report(self, state: np.ndarray) -> Mapping[str, float]:
        """Returns the mean IoU over seen and unseen classes and their harmonic mean."""
        scores = subset_scores(self.subset, state)
        return {
            "seen": scores.seen_iou,
            "unseen": scores.unseen_iou,
            "harmonic": scores.harmonic_iou,
        }

    def overlap(self, queries: Queries, truth: Truth) -> Overlap:
        """Returns the pixels that segments share with the regions of the subset's classes."""
        counts = overlap(queries.mask_logits_qhw, truth.resized(), self.classes)
        return counts.select(self.subset.indices)


class RightNames(Oracle):
    """The segments with their right names."""

    def count(self, prediction: Prediction, truth: Truth) -> jax.Array:
        """Counts an image's pixels by label and prediction."""
        queries = prediction.outputs[0]
        label_yx = jnp.asarray(self.subset.table(truth.ignore_label))[truth.resized()]
        counts = self.overlap(queries, truth)
        return right_names_counts(queries.mask_logits_qhw, label_yx, counts)


@dataclass(frozen=True, eq=False)
class RightSegments(Oracle):
    """The labelled regions with the names of the segments that fit best.

    Attributes:
        model: The model, which scores the segments.
        method: The way of scoring.
        gamma: The calibration.
    """

    model: ZegFormer
    method: str
    gamma: float

    def count(self, prediction: Prediction, truth: Truth) -> jax.Array:
        """Counts an image's pixels by label and prediction."""
        counts = self.overlap(prediction.outputs[0], truth)
        classes_n = largest_regions(counts.labelled_c, len(self.subset.indices))
        named_c = self.name_regions(prediction.outputs[0], counts)
        return right_segments_counts(named_c[classes_n], classes_n, counts.labelled_c)

    def name_regions(self, queries: Queries, counts: Overlap) -> jax.Array:
        """Returns the class that scores highest for each class's region, int32 [c].

        The scores are those of the query that fits best; the mean over all queries if no segment
        touches the region.
        """
        scores_qc = self.model.class_scores(queries, self.question, self.method)
        iou_qc = counts.iou_qc()
        touched_c1 = (iou_qc.max(0) > 0)[:, None]
        scores_cc = jnp.where(touched_c1, scores_qc[iou_qc.argmax(0)], scores_qc.mean(0)[None])
        return best_class(scores_cc.T, self.question.seen_c, self.gamma)


def make(plan: Plan) -> list[Metric]:
    """Returns both oracles in the headline vocabulary."""
    if not plan.oracles or not isinstance(plan.model, ZegFormer):
        return []
    headline = plan.subsets[0], plan.questions[0], len(plan.vocabulary)
    return [
        RightNames(RIGHT_NAMES, *headline),
        RightSegments(RIGHT_SEGMENTS, *headline, plan.model, plan.shown, plan.gamma),
    ]


def right_names_counts(
    mask_logits_qhw: jax.Array, label_yx: jax.Array, counts: Overlap
) -> jax.Array:
    """Counts pixels by label and prediction where every segment has its right name.

    Each segment gets its majority class; ties go to the lowest index. A pixel takes the name of the
    segment with the largest mask probability there, among segments with a name; class 0 if no
    segment of the image has one.

    Args:
        mask_logits_qhw: Mask logits, float [q, h, w] at stride 4.
        label_yx: Integer [y, x]; pixels with a label outside 0..c-1 are dropped.
        counts: Their overlap, in the vocabulary of the labels.

    Returns:
        int32 [c, c], indexed [label, prediction], in pixels of the labels.
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
    """Returns an image's classes by falling area, int32 [n], `NO_REGION` in unused places.

    Args:
        labelled_c: The pixels of each class, [c].
        places: Static number n of regions; the smallest ones beyond it are left out.
    """
    order_c = jnp.argsort(-labelled_c, stable=True)
    classes_c = jnp.where(labelled_c[order_c] > 0, order_c, NO_REGION)
    filler_n = jnp.full(max(places - len(labelled_c), 0), NO_REGION)
    return jnp.concatenate([classes_c, filler_n])[:places].astype(jnp.int32)


def right_segments_counts(
    named_n: jax.Array, classes_n: jax.Array, labelled_c: jax.Array
) -> jax.Array:
    """Counts pixels by label and prediction where the segments are the labelled regions.

    A region is all pixels of a class.

    Args:
        named_n: What each region is taken for, int [n] in 0..c-1.
        classes_n: The distinct classes of the regions, int32 [n], `NO_REGION` in unused places;
            see `largest_regions`. Other regions are not counted.
        labelled_c: The pixels of each class, [c].

    Returns:
        int32 [c, c], indexed [label, prediction].

    Raises:
        ValueError: The shapes do not fit.
    """
    if named_n.shape != classes_n.shape:
        raise ValueError(
            f"right_segments_counts: {named_n.shape} names for {classes_n.shape} regions"
        )
    num_classes = len(labelled_c)
    used_n = classes_n != NO_REGION
    pixels_n = jnp.where(used_n, labelled_c[classes_n], 0).astype(jnp.int32)
    total_cc = jnp.zeros((num_classes, num_classes), jnp.int32)
    return total_cc.at[jnp.where(used_n, classes_n, 0), named_n].add(pixels_n)
