"""Fit of segments to the labelled regions, without their classes: IoU and boundary F.

Mask logits are at stride 4 and are upsampled a few rows, or one query, at a time, which bounds the
memory. Labels are those of the network's input: resized and padded, with labels outside 0..c-1
where there is none. All functions take one image, are jittable and return sums and counts.

Axes: q query, c class, h w pixels at stride 4, y x pixels of the network's input.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from zegformer_jax.evaluation.metric import Metric, Prediction, Truth
from zegformer_jax.evaluation.plan import Plan
from zegformer_jax.evaluation.subsets import Subset
from zegformer_jax.segmentation.resize import mix_rows, resize_matrix, resize_taps, upsample_masks
from zegformer_jax.segmentation.segments import inside
from zegformer_jax.segmentation.zegformer import Question, ZegFormer

# A fraction of the image's diagonal; Csurka et al., "What is a good evaluation measure for semantic
# segmentation?", BMVC 2013, after the Berkeley benchmark. DAVIS has 0.008.
BOUNDARY_TOLERANCE = 0.0075
ROWS_AT_ONCE = 8  # memory grows with it
_EXACT = jax.lax.Precision.HIGHEST
UNLABELLED = -1
IOU, BOUNDARY_F = "segments that fit best, IoU", "segments that fit best, boundary F"
Total = TypeVar("Total")


class Fit(NamedTuple):
    """Fit of segments to the regions of each class, summed over images.

    Attributes:
        sum_c: float [c], sum of the best-fitting segments' measure.
        regions_c: int [c], number of images with the class.
    """

    sum_c: jax.Array
    regions_c: jax.Array


@dataclass(frozen=True, eq=False)
class SegmentFit:
    """Mean fit of the segments that fit the labelled regions best, over seen and unseen classes.

    Attributes:
        name: Name in the report.
        subset: The vocabulary whose classes are reported; regions are those of all classes.
        question: The question of the subset.
        classes: Number of classes in the data set's vocabulary.
        measure: Function of mask logits, labels, their `Overlap` and the image's size to the fit
            of each class's region, float32 [c], 0 for classes that are not in the image.
    """

    name: str
    subset: Subset
    question: Question
    classes: int
    measure: Callable[[jax.Array, jax.Array, "Overlap", jax.Array], jax.Array]

    @property
    def vocabulary(self) -> str:
        """Name of the vocabulary."""
        return self.subset.stem

    def count(self, prediction: Prediction, truth: Truth) -> Fit:
        """Measures the regions of an image."""
        masks_qhw, label_yx = prediction.outputs[0].mask_logits_qhw, truth.resized()
        # Metrics count the same overlap with the same arguments: XLA computes it once.
        counts = overlap(masks_qhw, label_yx, self.classes)
        fit_c = self.measure(masks_qhw, label_yx, counts, truth.size)
        return Fit(fit_c, (counts.labelled_c > 0).astype(jnp.int32))

    def report(self, state: Fit) -> Mapping[str, float]:
        """Returns the means over the regions of seen and of unseen classes."""
        sum_c, regions_c = (np.asarray(x)[self.subset.indices] for x in state)
        seen_c = self.subset.seen_c
        return {
            name: float(sum_c[c].sum() / regions_c[c].sum()) if regions_c[c].any() else math.nan
            for name, c in (("seen", seen_c), ("unseen", ~seen_c))
        }


def make(plan: Plan) -> list[Metric]:
    """Returns the IoU in every vocabulary and the boundary F in the headline."""
    if not plan.oracles or not isinstance(plan.model, ZegFormer):
        return []
    pairs, classes = list(zip(plan.subsets, plan.questions, strict=True)), len(plan.vocabulary)
    metrics: list[Metric] = [SegmentFit(IOU, *pair, classes, best_overlap_iou) for pair in pairs]
    return [*metrics, SegmentFit(BOUNDARY_F, *pairs[0], classes, best_overlap_boundary_f)]


class Overlap(NamedTuple):
    """Pixels that each segment shares with each class's region.

    Attributes:
        shared_qc: float32 [q, c], whole numbers below 2**24.
        labelled_c: float32 [c], the pixels of each region, whole numbers below 2**24.
    """

    shared_qc: jax.Array
    labelled_c: jax.Array

    def select(self, indices: Sequence[int] | jax.Array) -> "Overlap":
        """Returns the overlap on a label map with some of the classes, in the given order."""
        indices = jnp.asarray(indices, jnp.int32)
        return Overlap(self.shared_qc[:, indices], self.labelled_c[indices])

    def iou_qc(self) -> jax.Array:
        """Returns the IoU of each segment and region, float32 [q, c]; 0 where both are empty.

        A segment's pixels without a label are dropped.
        """
        area_q1 = self.shared_qc.sum(axis=-1, keepdims=True)
        union_qc = area_q1 + self.labelled_c[None] - self.shared_qc
        return self.shared_qc / jnp.maximum(union_qc, 1)


def overlap(mask_logits_qhw: jax.Array, label_yx: jax.Array, num_classes: int) -> Overlap:
    """Counts the pixels that segments, sigmoid(mask logit) > 0.5, share with labelled regions.

    Args:
        mask_logits_qhw: Mask logits, float [q, h, w] at stride 4.
        label_yx: Integer [y, x]; pixels with a label outside 0..c-1 are dropped.
        num_classes: The number of classes c.
    """

    def add(counts: Overlap, logits_qyx: jax.Array, labels_yx: jax.Array) -> Overlap:
        one_hot_yxc = jax.nn.one_hot(labels_yx, num_classes, dtype=jnp.float32)
        segments_qyx = inside(logits_qyx).astype(jnp.float32)
        shared_qc = jnp.einsum("qyx,yxc->qc", segments_qyx, one_hot_yxc)
        labelled_c = one_hot_yxc.sum(axis=(0, 1))
        return Overlap(counts.shared_qc + shared_qc, counts.labelled_c + labelled_c)

    start = Overlap(jnp.zeros((len(mask_logits_qhw), num_classes)), jnp.zeros(num_classes))
    return sum_strips(add, start, mask_logits_qhw, label_yx)


def best_overlap_iou(
    mask_logits_qhw: jax.Array, label_yx: jax.Array, counts: Overlap, size: jax.Array
) -> jax.Array:
    """Returns the IoU of each region with the segment that fits it best, float32 [c].

    Args:
        mask_logits_qhw: Mask logits, float [q, h, w] at stride 4.
        label_yx: Integer [y, x]; labels outside 0..c-1 are none.
        counts: Their overlap.
        size: int32 [2], rows and columns before padding.
    """
    del mask_logits_qhw, label_yx, size  # the overlap says all
    return counts.iou_qc().max(axis=0)


def best_overlap_boundary_f(
    mask_logits_qhw: jax.Array,
    label_yx: jax.Array,
    counts: Overlap,
    size: jax.Array,
    tolerance: float = BOUNDARY_TOLERANCE,
) -> jax.Array:
    """Returns the boundary F of each region and the segment that overlaps it best.

    The boundary measure of DAVIS (Perazzi et al., CVPR 2016, section 4) for each region, as Csurka
    et al. (BMVC 2013) use it for each class: the share of the segment's boundary pixels within the
    tolerance of the region's boundary, the share of the region's within the tolerance of the
    segment's, and their harmonic mean. As in both papers, distances are Euclidean, the image's
    edge is no boundary, and pixels without a label belong to neither segment nor region.

    Args:
        mask_logits_qhw: Mask logits, float [q, h, w] at stride 4.
        label_yx: Integer [y, x]; labels outside 0..c-1 are none.
        counts: Their overlap.
        size: int32 [2], rows and columns before padding; may be traced.
        tolerance: Static, a fraction of the image's diagonal; rounded up to whole pixels.

    Returns:
        float32 [c] in [0, 1]; 0 for regions that no segment touches and for classes that are not
        in the image.
    """
    iou_qc = counts.iou_qc()
    best_c, query_c = iou_qc.max(axis=0), iou_qc.argmax(axis=0)
    present_c = counts.labelled_c > 0
    order_c = jnp.argsort(~present_c, stable=True)
    labelled_yx = (label_yx >= 0) & (label_yx < len(present_c))
    measure = _boundary_measure(label_yx.shape, size, tolerance)

    def add(index: jax.Array, f_c: jax.Array) -> jax.Array:
        c = order_c[index]
        logits_1hw = jnp.take(mask_logits_qhw, query_c[c][None], axis=0)
        segment_yx = inside(upsample_masks(logits_1hw, *label_yx.shape)[0])
        f = measure(segment_yx & labelled_yx, label_yx == c)
        return f_c.at[c].set(jnp.where(best_c[c] > 0, f, 0.0))

    return jax.lax.fori_loop(0, present_c.sum(), add, jnp.zeros(len(present_c)))


def _boundary_measure(
    shape: tuple[int, int], size: jax.Array, tolerance: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the function of a segment and a region, bool [y, x] each, to their boundary F."""
    size = jnp.asarray(size)
    rows_y, columns_x = jnp.arange(shape[0]) < size[0], jnp.arange(shape[1]) < size[1]
    in_image_yx = rows_y[:, None] & columns_x[None]
    reach = math.ceil(tolerance * math.hypot(*shape))
    diagonal = jnp.linalg.norm(size.astype(jnp.float32))
    # A thousandth of a pixel keeps float32 from rounding up a whole number.
    pixels = jnp.ceil(tolerance * diagonal - 1e-3).astype(jnp.int32)

    def share(own_yx: jax.Array, other_yx: jax.Array) -> tuple[jax.Array, jax.Array]:
        near_yx = _squared_distance(other_yx, reach) <= pixels**2
        return (own_yx & near_yx).sum(), own_yx.sum()

    def measure(segment_yx: jax.Array, region_yx: jax.Array) -> jax.Array:
        segment_yx = _boundary(segment_yx, in_image_yx)
        region_yx = _boundary(region_yx, in_image_yx)
        (right, drawn), (found, wanted) = share(segment_yx, region_yx), share(region_yx, segment_yx)
        # Without any boundary pixel a share is perfect, as in DAVIS.
        precision = jnp.where(drawn > 0, right / jnp.maximum(drawn, 1), 1.0)
        recall = jnp.where(wanted > 0, found / jnp.maximum(wanted, 1), 1.0)
        total = precision + recall
        return jnp.where(total > 0, 2 * precision * recall / jnp.maximum(total, 1e-12), 0.0)

    return measure


def _boundary(mask_yx: jax.Array, in_image_yx: jax.Array) -> jax.Array:
    """Marks pixels that differ from the one right, below, or right below, as in DAVIS."""

    def shift(map_yx: jax.Array, down: int, right: int) -> jax.Array:
        height, width = map_yx.shape
        return jnp.pad(map_yx, ((0, 1), (0, 1)))[down : height + down, right : width + right]

    differs = [
        (mask_yx != shift(mask_yx, *step)) & shift(in_image_yx, *step)
        for step in ((0, 1), (1, 0), (1, 1))
    ]
    return reduce(jnp.logical_or, differs)


def _squared_distance(marked_yx: jax.Array, reach: int) -> jax.Array:
    """Squared Euclidean distance to the nearest mark, int32 [y, x].

    Exact up to `reach`, and more than its square beyond. Squares add up over the axes, so one axis
    is searched after the other.
    """
    far = 4 * (reach + 1) ** 2
    squared_yx = jnp.where(marked_yx, 0, far)
    for axis in range(2):
        length = squared_yx.shape[axis]
        border = [(reach, reach) if axis == i else (0, 0) for i in range(2)]
        padded = jnp.pad(squared_yx, border, constant_values=far)
        shifted = [
            jax.lax.slice_in_dim(padded, reach + step, reach + step + length, axis=axis) + step**2
            for step in range(-reach, reach + 1)
        ]
        squared_yx = reduce(jnp.minimum, shifted)
    return squared_yx


def sum_strips(
    add: Callable[[Total, jax.Array, jax.Array], Total],
    start: Total,
    mask_logits_qhw: jax.Array,
    label_yx: jax.Array,
) -> Total:
    """Adds up strips of upsampled mask logits, float32 [q, y, x], and their labels [y, x].

    Args:
        add: Function of the total so far, a strip's logits and its labels to the new total.
        start: The total of no strip.
        mask_logits_qhw: Mask logits, float [q, h, w] at stride 4.
        label_yx: Integer [y, x]; rows of `UNLABELLED` fill the last strip.
    """
    height, width = label_yx.shape
    strips = -(-height // ROWS_AT_ONCE)
    filler = ((0, strips * ROWS_AT_ONCE - height), (0, 0))
    labels_yx = jnp.pad(label_yx.astype(jnp.int32), filler, constant_values=UNLABELLED)
    taps = resize_taps(mask_logits_qhw.shape[1], height, strips * ROWS_AT_ONCE)
    columns_xw = resize_matrix(mask_logits_qhw.shape[2], width)

    def add_strip(total: Total, strip: tuple[jax.Array, ...]) -> tuple[Total, None]:
        labels_yx, *taps = strip
        rows_qyw = mix_rows(mask_logits_qhw, *taps)
        logits_qyx = jnp.einsum("qyw,xw->qyx", rows_qyw, columns_xw, precision=_EXACT)
        return add(total, logits_qyx, labels_yx), None

    split = [rows.reshape(strips, ROWS_AT_ONCE, *rows.shape[1:]) for rows in (labels_yx, *taps)]
    return jax.lax.scan(add_strip, start, tuple(split))[0]
