"""Segments' fit and oracles against SciPy's filters and plain counting on unpadded images."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from slow_but import slow_but

from zegformer_jax.evaluation.metric import Prediction, Truth
from zegformer_jax.evaluation.metrics.confusion import confusion_counts
from zegformer_jax.evaluation.metrics.oracles import (
    largest_regions,
    right_names_counts,
    right_segments_counts,
)
from zegformer_jax.evaluation.metrics.segment_fit import (
    Fit,
    Overlap,
    SegmentFit,
    best_overlap_boundary_f,
    best_overlap_iou,
    overlap,
)
from zegformer_jax.evaluation.plan import ask
from zegformer_jax.evaluation.subsets import Subset
from zegformer_jax.segmentation.zegformer import Queries
from zegformer_jax.text.vocabulary import Vocabulary

PADDED, SIZE, CLASSES, IGNORE = (100, 128), (93, 117), 6, 255
EMPTY, UNLABELLED = 0, 1  # queries of `picture`


def upsampled(map_hw, shape):
    """Bilinear resize with half-pixel centres in float64, pixel by pixel."""
    (height, width), result = map_hw.shape, np.zeros(shape)
    for y in range(shape[0]):
        for x in range(shape[1]):
            v = min(max((y + 0.5) * height / shape[0] - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / shape[1] - 0.5, 0), width - 1)
            j, i = int(v), int(u)
            corner = map_hw[j : j + 2, i : i + 2].astype(np.float64)
            lines = corner[:, 0] * (1 - (u - i)) + corner[:, -1] * (u - i)
            result[y, x] = lines[0] * (1 - (v - j)) + lines[-1] * (v - j)
    return result


@pytest.fixture(scope="module")
def picture():
    """Mask logits of 9 blobs at stride 4, a label map, and the logits at its size in float64.

    Query 0 has a segment nowhere, but the largest probability in many places; query 1 has one
    where there are no labels. Class 3 is not in the labels, and class 4 is a speck that no segment
    touches. Padding is not labelled.
    """
    random = np.random.default_rng(3)
    blobs = [ndimage.gaussian_filter(random.normal(size=(25, 32)), 3) for _ in range(9)]
    logits_qhw = np.stack([20 * blob / np.abs(blob).max() for blob in blobs]).astype(np.float32)
    logits_qhw[EMPTY] = -0.01
    logits_qhw[UNLABELLED] = np.where(np.arange(25)[:, None] < 5, 30.0, -30.0)
    full_qyx = np.stack([upsampled(logits_hw, PADDED) for logits_hw in logits_qhw])
    label_yx = np.full(PADDED, IGNORE, np.uint8)
    label_yx[: SIZE[0], : SIZE[1]] = 0
    for query, c in ((3, 1), (4, 5), (5, 2)):  # regions near some segments
        noise_yx = 40 * ndimage.gaussian_filter(random.normal(size=PADDED), 3)
        label_yx[(full_qyx[query] + noise_yx > 0) & (label_yx != IGNORE)] = c
    label_yx[:28] = IGNORE
    free_yx = (full_qyx[EMPTY + 2 :] < -0.01).all(0)
    free_yx[:28] = free_yx[SIZE[0] :] = free_yx[:, SIZE[1] :] = False
    y, x = np.argwhere(ndimage.binary_erosion(free_yx, np.ones((3, 3))))[0]
    label_yx[y, x] = 4
    assert np.abs(full_qyx).min() > 1e-6  # so that rounding decides no pixel
    cut = (slice(None), slice(0, SIZE[0]), slice(0, SIZE[1]))
    return logits_qhw, label_yx, full_qyx[cut], label_yx[cut[1:]]


def measure(logits_qhw, label_yx):
    """Calls all functions as an evaluation does: jitted, in a loop over images."""

    def one(arrays):
        counts = overlap(*arrays, CLASSES)
        return (
            counts,
            best_overlap_iou(*arrays, counts, jnp.array(SIZE)),
            best_overlap_boundary_f(*arrays, counts, jnp.array(SIZE)),
            right_names_counts(*arrays, counts),
        )

    pair = (jnp.stack([-logits_qhw, logits_qhw]), jnp.stack([label_yx, label_yx]))
    return jax.tree.map(lambda x: np.asarray(x[1]), jax.jit(lambda x: jax.lax.map(one, x))(pair))


@pytest.fixture(scope="module")
def measured(picture):
    return measure(*picture[:2])


def test_overlap_counts_pixels(picture, measured):
    _, _, full_qyx, label_yx = picture
    counts = measured[0]
    for c in range(CLASSES):
        assert counts.labelled_c[c] == (label_yx == c).sum()
        for q, logits_yx in enumerate(full_qyx):
            assert counts.shared_qc[q, c] == ((logits_yx > 0) & (label_yx == c)).sum()
    assert counts.shared_qc[EMPTY].sum() == counts.shared_qc[UNLABELLED].sum() == 0
    assert counts.shared_qc[2:, :3].min() > 0


def test_best_overlap_takes_the_best_query_of_each_class(picture, measured):
    _, _, full_qyx, label_yx = picture
    iou_c = measured[1]
    labelled_yx = label_yx != IGNORE
    for c in (0, 1, 2, 4, 5):
        region = label_yx == c
        expected = max(
            ((m > 0) & region).sum() / (((m > 0) & labelled_yx) | region).sum() for m in full_qyx
        )
        np.testing.assert_allclose(iou_c[c], expected, rtol=1e-6)
    assert iou_c[4] == iou_c[3] == 0


def test_a_selection_of_classes_is_the_overlap_on_their_labels_alone(picture, measured):
    logits_qhw, label_yx, _, _ = picture
    kept = (5, 0)
    table = np.full(256, IGNORE)
    table[list(kept)] = range(len(kept))
    alone = overlap(logits_qhw, table[label_yx], len(kept))
    selected = Overlap(*map(jnp.asarray, measured[0])).select(kept)
    jax.tree.map(np.testing.assert_array_equal, selected, alone)


def scipy_boundary_f(segment_yx, region_yx, tolerance):
    """DAVIS's measure: a boundary is where a window of 2 x 2 has both values."""

    def boundary(mask):
        options = {"size": 2, "origin": -1, "mode": "nearest"}
        mask = mask.astype(int)
        return ndimage.maximum_filter(mask, **options) != ndimage.minimum_filter(mask, **options)

    def share(own, other):
        if not own.any():
            return 1.0
        if not other.any():
            return 0.0
        return (ndimage.distance_transform_edt(~other)[own] <= tolerance).mean()

    segment, region = boundary(segment_yx), boundary(region_yx)
    precision, recall = share(segment, region), share(region, segment)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_boundary_f_is_davis_on_the_unpadded_picture(picture, measured):
    _, _, full_qyx, label_yx = picture
    labelled_yx = label_yx != IGNORE
    tolerance = np.ceil(0.0075 * np.hypot(*SIZE))
    assert tolerance == 2
    f_c = measured[2]
    assert ((f_c[[0, 1, 2, 5]] > 0.2) & (f_c[[0, 1, 2, 5]] < 0.9)).all()
    for c in (0, 1, 2, 5):
        query = np.argmax(measured[0].iou_qc()[:, c])
        segment_yx = (full_qyx[query] > 0) & labelled_yx
        expected = scipy_boundary_f(segment_yx, label_yx == c, tolerance)
        np.testing.assert_allclose(f_c[c], expected, rtol=1e-6)
    np.testing.assert_array_equal(f_c[3:5], [0, 0])  # not there; touched by no segment


@pytest.mark.parametrize("measure, place", [(best_overlap_iou, 1), (best_overlap_boundary_f, 2)])
def test_the_metrics_sum_each_regions_fit_and_count_the_regions(picture, measured, measure, place):
    """Reported is the mean over the regions of seen, and of unseen classes."""
    logits_qhw, label_yx, _, cut_yx = picture
    vocabulary = Vocabulary.from_names(list("abcdef"), [True, False, True, True, False, True])
    subset = Subset("some", vocabulary.select([5, 4, 1]), np.array([5, 4, 1]))
    question = ask(subset, ("grouper",), (0.0,))
    metric = SegmentFit("fit", subset, question, CLASSES, measure)
    prediction = Prediction([Queries(None, jnp.asarray(logits_qhw), None, None)], question, None)
    labels_yx = np.full((96, 128), IGNORE)  # at the size of the network's input without padding
    labels_yx[: SIZE[0], : SIZE[1]] = cut_yx
    size = jnp.array(SIZE)
    truth = Truth(jnp.asarray(labels_yx), size, size, PADDED, IGNORE)
    np.testing.assert_array_equal(truth.resized(), label_yx)
    state = metric.count(prediction, truth)
    np.testing.assert_allclose(state.sum_c, measured[place], rtol=1e-6)
    np.testing.assert_array_equal(state.regions_c, [1, 1, 1, 0, 1, 1])
    fits = [np.array([1.0, 0.5, 0, 0, 0.25, 0.75]), np.array([4, 2, 0, 0, 6, 3])]
    assert metric.report(Fit(*fits)) == {"seen": 0.25, "unseen": 0.75 / 8}
    assert math.isnan(metric.report(Fit(fits[0], 0 * fits[1]))["seen"])


def boundary_f(segment_yx, label_yx, size, **options):
    """F of the only segment, given at the size of the label map, with class 0 of two."""
    logits_qyx = np.where(segment_yx, 5.0, -5.0)[None].astype(np.float32)
    counts = overlap(logits_qyx, label_yx, 2)
    f_c = best_overlap_boundary_f(logits_qyx, label_yx, counts, jnp.array(size), **options)
    return float(f_c[0])


def halves(shape, column):
    return np.broadcast_to(np.arange(shape[1]) >= column, shape)


@pytest.mark.parametrize(
    "shift, expected", slow_but([(3, 1), (4, 0)], [(0, 1), (3, 1), (-3, 1), (4, 0), (-4, 0)])
)
def test_boundaries_may_be_apart_by_the_tolerance(shift, expected):
    """The diagonal is 400 pixels: 0.75% are 3 exactly. Padding adds neither reach nor boundary."""
    label_yx = np.full((256, 352), IGNORE)
    label_yx[:240, :320] = np.where(halves((240, 320), 100), 0, 1)
    segment_yx = halves((256, 352), 100 + shift)
    assert boundary_f(segment_yx, label_yx, (240, 320)) == expected
    assert boundary_f(segment_yx[:240, :320], label_yx[:240, :320], (240, 320)) == expected


@pytest.mark.parametrize("pixels", [2, 5, 9])
def test_distances_are_euclidean(pixels):
    """Boundaries around single pixels, at random places of a picture with a diagonal of 100."""
    random = np.random.default_rng(pixels)
    region_yx = random.random((60, 80)) < 0.004
    segment_yx = (random.random((60, 80)) < 0.004) | (region_yx & (np.arange(80) < 40))
    value = boundary_f(segment_yx, np.where(region_yx, 0, 1), (60, 80), tolerance=pixels / 100)
    expected = scipy_boundary_f(segment_yx, region_yx, pixels)
    assert 0.1 < expected < 0.999
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_region_without_a_boundary_needs_a_segment_without_one():
    everywhere = np.zeros((20, 30), int)
    assert boundary_f(np.ones((20, 30)), everywhere, (20, 30)) == 1
    assert boundary_f(halves((20, 30), 10), everywhere, (20, 30)) == 0
    assert boundary_f(np.zeros((20, 30)), everywhere, (20, 30)) == 0


def test_right_names_are_the_classes_that_segments_overlap_most(picture, measured):
    _, _, full_qyx, label_yx = picture
    names = {}
    for q, logits_yx in enumerate(full_qyx):
        pixels = label_yx[(logits_yx > 0) & (label_yx != IGNORE)]
        if pixels.size:
            names[q] = np.bincount(pixels).argmax()
    assert set(names) == set(range(2, 9)) and len(set(names.values())) > 1
    expected = np.zeros((CLASSES, CLASSES), int)
    for y, x in np.argwhere(label_yx != IGNORE):
        winner = max(names, key=lambda q: full_qyx[q, y, x])
        expected[label_yx[y, x], names[winner]] += 1
    np.testing.assert_array_equal(measured[3], expected)
    assert (full_qyx.argmax(0)[label_yx != IGNORE] == EMPTY).any()  # it would have won


def test_without_any_segment_all_pixels_are_the_first_class():
    label_yx = np.array([[0, 1, 2, IGNORE]])
    logits_qhw = np.full((2, 1, 4), -3.0, np.float32)
    counts = overlap(logits_qhw, label_yx, 3)
    counted = right_names_counts(logits_qhw, label_yx, counts)
    np.testing.assert_array_equal(counted, [[1, 0, 0]] * 3)


def test_right_segments_give_a_region_one_name():
    """Classes 4 (7 pixels), 1 (5), 0 (2) and 3 (1) are there; 3 gets no place."""
    labelled_c = jnp.array([2.0, 5.0, 0.0, 1.0, 7.0])
    classes_n = largest_regions(labelled_c, 3)
    np.testing.assert_array_equal(classes_n, [4, 1, 0])
    counted = jax.jit(right_segments_counts)(np.array([2, 1, 2]), classes_n, labelled_c)
    expected = np.zeros((5, 5), int)
    expected[4, 2], expected[1, 1], expected[0, 2] = 7, 5, 2
    np.testing.assert_array_equal(counted, expected)
    assert counted.dtype == jnp.int32


def test_unused_places_count_nothing():
    labelled_c = jnp.array([3.0, 0.0])
    classes_n = largest_regions(labelled_c, 4)
    np.testing.assert_array_equal(classes_n, [0, -1, -1, -1])
    counted = right_segments_counts(np.array([1, 0, 0, 0]), classes_n, labelled_c)
    np.testing.assert_array_equal(counted, [[0, 3], [0, 0]])
    with pytest.raises(ValueError, match=r"\(3,\) names for \(4,\) regions"):
        right_segments_counts(np.zeros(3, int), classes_n, labelled_c)


def test_perfect_segments_and_names_score_one(picture):
    """Regions as segments, named right both ways, give the label map's own confusion matrix."""
    _, label_yx, _, _ = picture
    logits_qyx = np.where(label_yx == np.arange(CLASSES)[:, None, None], 9.0, -9.0)
    counts = overlap(logits_qyx.astype(np.float32), label_yx, CLASSES)
    exact = confusion_counts(label_yx, label_yx, CLASSES, IGNORE)
    names = right_names_counts(logits_qyx, label_yx, counts)
    np.testing.assert_array_equal(names, exact)
    classes_n = largest_regions(counts.labelled_c, CLASSES)
    segments = right_segments_counts(classes_n, classes_n, counts.labelled_c)
    np.testing.assert_array_equal(segments, exact)
