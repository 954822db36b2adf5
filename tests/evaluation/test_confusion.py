"""Confusion matrices and scores against the published evaluator's numbers and plain counting."""

import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zegformer_jax.evaluation.metrics.confusion import (
    confusion_counts,
    harmonic_mean,
    merge_confusion,
    scores_from_confusion,
)
from zegformer_jax.input import benchmarks

EVALUATION = json.loads(
    (Path(__file__).parents[1] / "golden" / "small" / "evaluation.json").read_text()
)


def golden_scores(case):
    """Scores of a golden matrix, which is [prediction][label] with ignored labels last."""
    confusion = np.array(case["confusion[prediction][label]"]).T[:-1, :-1]
    seen = [name not in case["unseen"] for name in case["class_names"]]
    return scores_from_confusion(confusion, seen)


def test_absent_classes_are_counted_and_left_out():
    """The mean is over the classes in the labels; the published code returns NaN here."""
    unseen_case = EVALUATION["one_unseen_absent_from_labels"]
    scores = golden_scores(unseen_case)
    assert (scores.seen_absent, scores.unseen_absent) == (0, 1)
    sheep = unseen_case["expected"]["IoU-sheep"] / 100
    np.testing.assert_allclose(scores.unseen_iou, sheep, rtol=1e-12)
    seen = unseen_case["expected"]["seen_IoU"] / 100
    np.testing.assert_allclose(scores.harmonic_iou, 2 * sheep * seen / (sheep + seen), rtol=1e-12)

    scores = golden_scores(EVALUATION["one_seen_absent_from_both"])
    assert (scores.seen_absent, scores.unseen_absent) == (1, 0)
    expected = EVALUATION["one_seen_absent_from_both"]["expected"]
    present = [expected[f"IoU-{name}"] for name in ("aeroplane", "bird, parrot", "boat", "cat")]
    np.testing.assert_allclose(scores.seen_iou, np.mean(present) / 100, rtol=1e-12)


def test_the_two_overall_means_differ_by_predicted_but_absent_classes():
    """Class 2 is predicted and never labelled: it lowers the older mean alone."""
    confusion = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]])
    scores = scores_from_confusion(confusion, [True, True, False])
    summed = 3 / 4 + 2 / 5
    np.testing.assert_allclose(scores.mean_iou_labels, summed / 2)
    np.testing.assert_allclose(scores.mean_iou_labels_or_predictions, summed / 3)
    assert np.isnan(scores.unseen_iou) and np.isnan(scores.harmonic_iou)


def test_recall_is_of_the_labels_and_predicted_classes_count_in_the_older_mean():
    """Class 1 is always right where it is labelled, and predicted for all of class 0, too."""
    scores = scores_from_confusion(np.array([[0, 6, 0], [0, 4, 0], [0, 0, 0]]), [True] * 3)
    np.testing.assert_array_equal(scores.accuracy_c, [0, 1, np.nan])
    np.testing.assert_allclose(scores.iou_c, [0, 0.4, np.nan])
    assert scores.mean_accuracy == 0.5 and scores.pixel_accuracy == 0.4
    assert scores.mean_iou_labels == scores.mean_iou_labels_or_predictions == 0.2
    # A class that is only predicted, by a single pixel, is one of the older mean's.
    scores = scores_from_confusion(np.array([[3, 0, 1], [0, 4, 0], [0, 0, 0]]), [True] * 3)
    np.testing.assert_allclose(scores.mean_iou_labels_or_predictions, (3 / 4 + 1) / 3)
    np.testing.assert_allclose(scores.mean_iou_labels, (3 / 4 + 1) / 2)


def test_an_empty_evaluation_is_nan_without_a_warning():
    scores = scores_from_confusion(np.zeros((2, 2), np.int64), [True, False])
    assert np.isnan([scores.seen_iou, scores.mean_iou_labels, scores.pixel_accuracy]).all()
    assert (scores.seen_absent, scores.unseen_absent) == (1, 1)


def test_counts_beyond_32_bits_do_not_overflow():
    big = 2**33
    scores = scores_from_confusion(np.array([[big, big], [0, big]]), [True, False])
    np.testing.assert_allclose(scores.iou_c, [0.5, 0.5])
    assert scores.harmonic_iou == 0.5


def test_harmonic_mean_of_zeros_is_zero():
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 1.0) == 0.0
    np.testing.assert_allclose(harmonic_mean(0.366, 0.332), 0.348, atol=5e-4)  # paper


@pytest.mark.parametrize("dtype, ignore", [(np.uint8, 255), (np.uint16, 65535), (np.int32, 2)])
def test_confusion_counts_pixels_one_by_one(dtype, ignore):
    random = np.random.default_rng(0)
    prediction = random.integers(0, 5, (17, 23))
    label = random.integers(0, 5, (17, 23)).astype(dtype)
    label[::4] = ignore
    expected = Counter(zip(label.ravel().tolist(), prediction.ravel().tolist(), strict=True))
    counts = jax.jit(confusion_counts, static_argnums=(2, 3))(prediction, label, 5, ignore)
    assert counts.dtype == jnp.int32
    for i in range(5):
        for j in range(5):
            assert counts[i, j] == (0 if i == ignore else expected[i, j])


def test_confusion_drops_labels_outside_the_vocabulary():
    label = jnp.array([[-1, 0, 3, 100]])
    counts = confusion_counts(jnp.zeros((1, 4), jnp.int32), label, 3, 255)
    np.testing.assert_array_equal(counts, [[1, 0, 0], [0, 0, 0], [0, 0, 0]])


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"prediction is \(2, 3\) but label is \(3, 2\)"):
        confusion_counts(jnp.zeros((2, 3)), jnp.zeros((3, 2)), 4, 255)
    with pytest.raises(ValueError, match=r"matrix is \(2, 2\), classes are 3"):
        scores_from_confusion(np.zeros((2, 2), int), [True] * 3)


def test_merged_classes_are_summed():
    """Classes 1, 2 and 4 count as one; the label map with merged classes gives the same."""
    random = np.random.default_rng(2)
    table = np.array([0, 2, 2, 1, 2, 255, 255], np.uint8)
    label, prediction = random.integers(0, 5, (2, 400))
    confusion, expected = np.zeros((5, 5), np.int64), np.zeros((3, 3), np.int64)
    for i, j in zip(label, prediction, strict=True):
        confusion[i, j] += 1
        expected[table[i], table[j]] += 1
    merged = merge_confusion(confusion, table)
    assert merged.dtype == np.int64
    np.testing.assert_array_equal(merged, expected)
    np.testing.assert_array_equal(merge_confusion(confusion * 2**40, table)[2], expected[2] * 2**40)


def test_the_59_classes_of_pascal_voc_20b_become_21():
    benchmark = benchmarks.find("pascal_voc_20b")
    confusion = np.arange(59 * 59).reshape(59, 59)
    merged = merge_confusion(confusion, benchmark.merge_table())
    assert merged.shape == (21, 21) and len(benchmark.merged_names) == 21
    np.testing.assert_array_equal(merged[:20, :20], confusion[:20, :20])
    np.testing.assert_array_equal(merged[20, :20], confusion[20:, :20].sum(0))
    np.testing.assert_array_equal(merged[:20, 20], confusion[:20, 20:].sum(1))
    assert merged[20, 20] == confusion[20:, 20:].sum()


def test_tables_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"matrix is \(2, 3\), table has 3 entries"):
        merge_confusion(np.zeros((2, 3)), np.arange(3))
    with pytest.raises(ValueError, match=r"matrix is \(4, 4\), table has 3 entries"):
        merge_confusion(np.zeros((4, 4)), np.arange(3))
    with pytest.raises(ValueError, match=r"merged classes are \[0, 255\], not 0\.\.1"):
        merge_confusion(np.zeros((2, 2)), np.array([0, 255]))
