"""Confusion matrices, and the scores of generalised zero-shot segmentation (SPNet, 2019).

Counts are exact and are divided once, after the sum over all images. Scores are fractions in
[0, 1], NaN where there is nothing to measure.

Axes: c class, k merged class, y x pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zegformer_jax.evaluation.metric import Metric, Prediction, Truth
from zegformer_jax.evaluation.plan import Plan, ask
from zegformer_jax.evaluation.subsets import Subset
from zegformer_jax.segmentation.zegformer import Question

PAIRS = 20  # most confused pairs that are reported
# The report's names of scores, and the fields of `Scores`.
COLUMNS = {
    "seen": "seen_iou",
    "unseen": "unseen_iou",
    "harmonic": "harmonic_iou",
    "mIoU": "mean_iou_labels",
    "mIoU*": "mean_iou_labels_or_predictions",
    "fwIoU": "frequency_weighted_iou",
    "accuracy": "mean_accuracy",
    "pixels": "pixel_accuracy",
}


@dataclass(frozen=True, eq=False)
class Confusion:
    """Confusion matrix of label maps, in one vocabulary, by one way of scoring with one gamma.

    Its state is int [c, c], indexed [label, prediction].

    Attributes:
        name: Name in the report.
        subset: The vocabulary.
        question: The question that asks for the label maps.
        method: The way of scoring, one of the question's.
        gamma: The calibration, one of the question's.
    """

    name: str
    subset: Subset
    question: Question
    method: str
    gamma: float

    @property
    def vocabulary(self) -> str:
        """Name of the vocabulary."""
        return self.subset.stem

    def count(self, prediction: Prediction, truth: Truth) -> jax.Array:
        """Counts an image's pixels by label and prediction."""
        label_yx = jnp.asarray(self.subset.table(truth.ignore_label))[truth.label_yx]
        predicted_yx = prediction.label_map(self.method, self.gamma)
        classes = len(self.subset.indices)
        return confusion_counts(predicted_yx, label_yx, classes, truth.ignore_label)

    def matrix(self, state: np.ndarray) -> np.ndarray:
        """Returns the confusion matrix of the reported classes, int64 [k, k]."""
        return reported_matrix(self.subset, state)

    def scores(self, state: np.ndarray) -> "Scores":
        """Returns all scores."""
        return subset_scores(self.subset, state)

    def report(self, state: np.ndarray) -> Mapping[str, float]:
        """Returns the scores in the report's table."""
        scores = self.scores(state)
        return {name: getattr(scores, field) for name, field in COLUMNS.items()}


def make(plan: Plan) -> list[Metric]:
    """Returns a metric for each vocabulary and way of scoring, and those of the sweep of gamma."""
    metrics: list[Metric] = []
    for subset, question in zip(plan.subsets, plan.questions, strict=True):
        metrics += [Confusion(x, subset, question, x, plan.gamma) for x in question.methods]
        if plan.sweep and subset is plan.subsets[0]:
            swept, shown = ask(subset, (plan.shown,), plan.sweep), plan.shown
            metrics += [
                Confusion(f"{shown}, gamma {gamma:g}", subset, swept, shown, gamma)
                for gamma in plan.sweep
            ]
    return metrics


def confusion_counts(
    prediction_yx: jax.Array, label_yx: jax.Array, num_classes: int, ignore: int
) -> jax.Array:
    """Counts pixels by label and prediction.

    Args:
        prediction_yx: Integer array of any shape, each in 0..c-1.
        label_yx: Integer array of the same shape. Pixels with the label `ignore`, or any label
            outside 0..c-1, are dropped.
        num_classes: The number of classes c, at most 46,340.
        ignore: The ignore label.

    Returns:
        int32 [c, c], indexed [label, prediction]. Sum them in int64 on the host.

    Raises:
        ValueError: The shapes differ.
    """
    if prediction_yx.shape != label_yx.shape:
        raise ValueError(
            f"confusion_counts: prediction is {prediction_yx.shape} but label is {label_yx.shape}"
        )
    prediction, label = prediction_yx.astype(jnp.int32), label_yx.astype(jnp.int32)
    counted = (label != ignore) & (label >= 0) & (label < num_classes)
    dropped = num_classes * num_classes
    cell = jnp.where(counted, label * num_classes + prediction, dropped)
    counts = jnp.zeros(dropped + 1, jnp.int32).at[cell.reshape(-1)].add(1)
    return counts[:dropped].reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """Scores of one confusion matrix, fractions in [0, 1]; NaN where no class is to be measured.

    Attributes:
        iou_c: Intersection over union, float64 [c]; NaN for classes that are not in the labels.
        accuracy_c: Recall, float64 [c]; NaN for classes that are not in the labels.
        seen_iou: Mean of `iou_c` over the seen classes in the labels.
        unseen_iou: Mean of `iou_c` over the unseen classes in the labels.
        harmonic_iou: Harmonic mean of the two, the headline; NaN where either is.
        mean_iou_labels_or_predictions: Older overall mIoU: the summed IoU of the classes in the
            labels, over the number of classes in labels *or predictions*.
        mean_iou_labels: Newer overall mIoU: the same sum over the number of classes in the labels.
        frequency_weighted_iou: Mean IoU weighted by each class's share of labelled pixels.
        mean_accuracy: Mean of `accuracy_c` over the classes in the labels.
        pixel_accuracy: Share of labelled pixels that are right.
        seen_absent: Number of seen classes that are not in the labels.
        unseen_absent: Number of unseen classes that are not in the labels.
    """

    iou_c: np.ndarray
    accuracy_c: np.ndarray
    seen_iou: float
    unseen_iou: float
    harmonic_iou: float
    mean_iou_labels_or_predictions: float
    mean_iou_labels: float
    frequency_weighted_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    seen_absent: int
    unseen_absent: int


def scores_from_confusion(confusion_cc: np.ndarray, seen: Sequence[bool]) -> Scores:
    """Computes every reported score from a confusion matrix.

    Args:
        confusion_cc: Integer [c, c], indexed [label, prediction], without ignored pixels.
        seen: Seen flags of the c classes.

    Raises:
        ValueError: The matrix is not square or does not fit `seen`.
    """
    confusion_cc, seen_c = np.asarray(confusion_cc, np.int64), np.asarray(seen, bool)
    if confusion_cc.shape != (len(seen_c), len(seen_c)):
        raise ValueError(
            f"scores_from_confusion: matrix is {confusion_cc.shape}, classes are {len(seen_c)}"
        )
    right_c = np.diagonal(confusion_cc).astype(np.float64)
    labelled_c, predicted_c = confusion_cc.sum(axis=1), confusion_cc.sum(axis=0)
    union_c = labelled_c + predicted_c - right_c
    present_c = labelled_c > 0
    iou_c = np.where(present_c, right_c / np.maximum(union_c, 1), np.nan)
    accuracy_c = np.where(present_c, right_c / np.maximum(labelled_c, 1), np.nan)
    seen_iou = _mean(iou_c[seen_c & present_c])
    unseen_iou = _mean(iou_c[~seen_c & present_c])
    summed_iou, pixels = iou_c[present_c].sum(), labelled_c.sum()
    return Scores(
        iou_c=iou_c,
        accuracy_c=accuracy_c,
        seen_iou=seen_iou,
        unseen_iou=unseen_iou,
        harmonic_iou=harmonic_mean(seen_iou, unseen_iou),
        mean_iou_labels_or_predictions=_ratio(summed_iou, (union_c > 0).sum()),
        mean_iou_labels=_ratio(summed_iou, present_c.sum()),
        frequency_weighted_iou=_ratio((iou_c * labelled_c)[present_c].sum(), pixels),
        mean_accuracy=_mean(accuracy_c[present_c]),
        pixel_accuracy=_ratio(right_c.sum(), pixels),
        seen_absent=int((seen_c & ~present_c).sum()),
        unseen_absent=int((~seen_c & ~present_c).sum()),
    )


def reported_matrix(subset: Subset, confusion_cc: np.ndarray) -> np.ndarray:
    """Returns the confusion matrix of the classes that a subset reports, int64 [k, k]."""
    return confusion_cc if subset.merge is None else merge_confusion(confusion_cc, subset.merge)


def subset_scores(subset: Subset, confusion_cc: np.ndarray) -> Scores:
    """Returns the scores of the classes that a subset reports."""
    return scores_from_confusion(
        reported_matrix(subset, confusion_cc), list(subset.reported.values())
    )


def merge_confusion(confusion_cc: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Sums the rows and columns of classes that count as one.

    Args:
        confusion_cc: Integer [c, c], indexed [label, prediction].
        table: At least c integers: the merged class of each class. Entries from c on, such as
            those of `PascalVoc20b.merge_table`, are not read.

    Returns:
        int64 [k, k], indexed [label, prediction].

    Raises:
        ValueError: The matrix is not square, the table is too short, or the merged classes are
            not 0..k-1.
    """
    confusion_cc = np.asarray(confusion_cc, np.int64)
    classes = len(confusion_cc)
    if confusion_cc.shape != (classes, classes) or len(table) < classes:
        raise ValueError(
            f"merge_confusion: matrix is {confusion_cc.shape}, table has {len(table)} entries"
        )
    merged_c = np.asarray(table[:classes], np.int64)
    present_k = np.unique(merged_c)
    if not np.array_equal(present_k, np.arange(len(present_k))):
        raise ValueError(
            f"merge_confusion: merged classes are {present_k.tolist()}, not 0..{len(present_k) - 1}"
        )
    merged_kk = np.zeros((len(present_k), len(present_k)), np.int64)
    np.add.at(merged_kk, (merged_c[:, None], merged_c[None]), confusion_cc)
    return merged_kk


def confused_pairs(
    confusion_cc: np.ndarray, names: Sequence[str], count: int = PAIRS
) -> list[dict[str, Any]]:
    """Returns the pairs of classes with the most pixels of one predicted as the other.

    Args:
        confusion_cc: Integer [c, c], indexed [label, prediction].
        names: The c class names.
        count: Most pairs that are returned; pairs without a pixel never are.

    Returns:
        Dicts of `label` and `prediction` (names), `pixels`, and `share`, the pixels as a fraction
        of the label's. Most pixels first; ties in the vocabulary's order.
    """
    labelled_c = confusion_cc.sum(axis=1)
    wrong_cc = confusion_cc.copy()
    np.fill_diagonal(wrong_cc, 0)
    order = np.argsort(-wrong_cc, axis=None, kind="stable")[:count]
    pairs = [divmod(place, len(names)) for place in order.tolist()]
    return [
        {
            "label": names[label],
            "prediction": names[prediction],
            "pixels": int(wrong_cc[label, prediction]),
            "share": float(wrong_cc[label, prediction] / labelled_c[label]),
        }
        for label, prediction in pairs
        if wrong_cc[label, prediction] > 0
    ]


def harmonic_mean(first: float, second: float) -> float:
    """Returns 2ab / (a + b) of two scores of at least 0; 0 if both are 0, NaN if either is."""
    total = first + second
    return 0.0 if total == 0 else 2 * first * second / total


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")


def _mean(values: np.ndarray) -> float:
    return _ratio(values.sum(), values.size)
