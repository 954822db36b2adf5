"""Confusion counts, and the scores of generalised zero-shot segmentation (SPNet, 2019).

What runs on the device returns sums and counts; they add over images and hosts, and are divided
once, at the end. All scores are fractions in [0, 1], NaN where nothing was there to measure.

Axes: q query, c class, h w pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


def confusion_counts(
    prediction_hw: jax.Array, label_hw: jax.Array, num_classes: int, ignore: int
) -> jax.Array:
    """Counts pixels by label and prediction.

    Args:
        prediction_hw: integer [...], each in 0..num_classes-1.
        label_hw: integer, same shape. Pixels with the label ``ignore``, or any label outside
            0..num_classes-1, are dropped.
        num_classes: c, at most 46,340.
        ignore: the ignore label.

    Returns:
        int32 [c, c], indexed [label, prediction]. Sum them in int64 on the host.

    Raises:
        ValueError: if the shapes differ.
    """
    if prediction_hw.shape != label_hw.shape:
        raise ValueError(
            f"confusion_counts: prediction is {prediction_hw.shape} but label is {label_hw.shape}"
        )
    prediction, label = prediction_hw.astype(jnp.int32), label_hw.astype(jnp.int32)
    counted = (label != ignore) & (label >= 0) & (label < num_classes)
    dropped = num_classes * num_classes
    cell = jnp.where(counted, label * num_classes + prediction, dropped)
    counts = jnp.zeros(dropped + 1, jnp.int32).at[cell.reshape(-1)].add(1)
    return counts[:dropped].reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """Scores of one evaluation, fractions in [0, 1]; NaN where no class was there to measure.

    Attributes:
        iou_c: float64 [c], intersection over union; NaN where the class is not in the labels.
        accuracy_c: float64 [c], recall of each class; NaN likewise.
        seen_iou: mean of ``iou_c`` over the seen classes in the labels.
        unseen_iou: the same over the unseen classes.
        harmonic_iou: harmonic mean of the two, the headline; NaN where either is.
        mean_iou_labels_or_predictions: older overall mIoU: the summed IoU of the classes in the
            labels, over the number of classes in labels *or predictions*.
        mean_iou_labels: newer overall mIoU: the same sum over the number of classes in the labels.
        frequency_weighted_iou: mean IoU weighted by each class's share of labelled pixels.
        mean_accuracy: mean of ``accuracy_c`` over the classes in the labels.
        pixel_accuracy: share of labelled pixels that are right.
        seen_absent: number of seen classes that are not in the labels.
        unseen_absent: number of unseen classes that are not in the labels.
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
        confusion_cc: integer [c, c], indexed [label, prediction], without ignored pixels.
        seen: c flags, whether each class was seen in training.

    Raises:
        ValueError: if the matrix is not square or does not fit ``seen``.
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


def merge_confusion(confusion_cc: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Sums the rows and columns of classes that count as one.

    Args:
        confusion_cc: integer [c, c], indexed [label, prediction].
        table: integer, at least c entries: the merged class of each class. Entries from c on, such
            as those of ``PascalVoc20b.merge_table``, are not read.

    Returns:
        int64 [k, k], indexed likewise.

    Raises:
        ValueError: if the matrix is not square, the table is too short, or the merged classes are
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


def harmonic_mean(first: float, second: float) -> float:
    """Gives 2ab / (a + b) of two scores at least 0; 0 if both are 0, NaN if either is NaN."""
    total = first + second
    return 0.0 if total == 0 else 2 * first * second / total


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")


def _mean(values: np.ndarray) -> float:
    return _ratio(values.sum(), values.size)
