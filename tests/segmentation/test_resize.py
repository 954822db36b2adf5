"""Tests of segments.py against golden numbers, torchvision's and PyTorch's formulas in NumPy."""

import math
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from zegformer_jax.segmentation import segments
from zegformer_jax.segmentation.classifiers.one_pass import squeeze
from zegformer_jax.segmentation.resize import (
    mix_rows,
    padded_resize_matrix,
    resize_matrix,
    resize_taps,
    upsample_masks,
)
from zegformer_jax.segmentation.roi_align import roi_align_matrix

MEAN = np.array([122.7709383, 116.7460125, 104.09373615], np.float32)
STD = np.array([68.5005327, 66.6321579, 70.3231630], np.float32)
ROI_IN, ROI_OUT = (37, 50), (8, 6)
MAX_SIDE = 40

roi_rows = jax.jit(partial(roi_align_matrix, in_size=ROI_IN[0], out_size=ROI_OUT[0]))
roi_columns = jax.jit(partial(roi_align_matrix, in_size=ROI_IN[1], out_size=ROI_OUT[1]))
boxes_from_masks = jax.jit(segments.boxes_from_masks)
padded_matrix = jax.jit(partial(padded_resize_matrix, in_length=MAX_SIDE, out_length=MAX_SIDE))


def padded_clip_image(image_chw):
    image_hwc = (image_chw.transpose(1, 2, 0).astype(np.float32) - MEAN) / STD
    height, width, _ = image_hwc.shape
    return np.pad(image_hwc, ((0, -height % 32), (0, -width % 32), (0, 0)))


def torch_bilinear(line, out_size):
    """PyTorch's upsample_bilinear2d on one axis, align_corners=False, in float64."""
    in_size, result = len(line), []
    for i in range(out_size):
        source = max((i + 0.5) * in_size / out_size - 0.5, 0.0)
        low = min(int(source), in_size - 1)
        high = low + (1 if low < in_size - 1 else 0)
        fraction = min(max(source - low, 0.0), 1.0)
        result.append((1 - fraction) * line[low] + fraction * line[high])
    return np.array(result)


def torchvision_bilinear(image, y, x):
    """torchvision's bilinear_interpolate of roi_align_kernel.cpp."""
    height, width = image.shape
    if y < -1.0 or y > height or x < -1.0 or x > width:
        return 0.0
    y, x = max(y, 0.0), max(x, 0.0)
    y_low, x_low = int(y), int(x)
    if y_low >= height - 1:
        y_low = y_high = height - 1
        y = float(y_low)
    else:
        y_high = y_low + 1
    if x_low >= width - 1:
        x_low = x_high = width - 1
        x = float(x_low)
    else:
        x_high = x_low + 1
    dy, dx = y - y_low, x - x_low
    return (
        (1 - dy) * (1 - dx) * image[y_low, x_low]
        + (1 - dy) * dx * image[y_low, x_high]
        + dy * (1 - dx) * image[y_high, x_low]
        + dy * dx * image[y_high, x_high]
    )


def torchvision_roi_align(image, box, out_height, out_width):
    """torchvision's RoIAlign with aligned=True, sampling_ratio=0 and spatial_scale=1."""
    x1, y1, x2, y2 = (float(edge) - 0.5 for edge in box)
    bin_height, bin_width = (y2 - y1) / out_height, (x2 - x1) / out_width
    grid_y, grid_x = math.ceil(bin_height), math.ceil(bin_width)
    result = np.zeros((out_height, out_width))
    for row in range(out_height):
        for column in range(out_width):
            for iy in range(grid_y):
                y = y1 + row * bin_height + (iy + 0.5) * bin_height / grid_y
                for ix in range(grid_x):
                    x = x1 + column * bin_width + (ix + 0.5) * bin_width / grid_x
                    result[row, column] += torchvision_bilinear(image, y, x)
    return result / max(grid_y * grid_x, 1)


@pytest.mark.parametrize("in_size, out_size", [(24, 96), (117, 176), (96, 17), (1, 5), (5, 1)])
def test_resize_matrix_is_pytorchs(in_size, out_size):
    line = np.random.default_rng(in_size).normal(size=in_size)
    matrix = jax.jit(resize_matrix, static_argnums=(0, 1))(in_size, out_size)
    resized = np.asarray(matrix) @ line
    np.testing.assert_allclose(resized, torch_bilinear(line, out_size), atol=2e-6)


@settings(max_examples=60)
@given(st.integers(1, MAX_SIDE), st.integers(1, MAX_SIDE))
def test_padded_resize_matrix_uses_true_sizes(in_size, out_size):
    line = np.random.default_rng(in_size).normal(size=MAX_SIDE)
    matrix = np.asarray(padded_matrix(in_size, out_size))
    expected = torch_bilinear(line[:in_size], out_size)
    np.testing.assert_allclose((matrix @ line)[:out_size], expected, atol=2e-6)
    assert not matrix[out_size:].any() and not matrix[:, in_size:].any()


def test_resize_positions_stay_exact_on_long_sides():
    """PyTorch's formula in float32 is off by up to 1e-4 of a pixel here."""
    in_size, out_size = 2047, 4093
    low, _, weight = resize_taps(in_size, out_size, out_size)
    position = (np.arange(out_size) + 0.5) * in_size / out_size - 0.5
    inside = (position > 0) & (position < in_size - 1)
    np.testing.assert_allclose(
        (np.asarray(low, np.float64) + np.asarray(weight))[inside], position[inside], atol=2e-7
    )


def test_upsample_masks_resizes_both_axes():
    masks_qhw = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    upsampled = jax.jit(upsample_masks, static_argnums=(1, 2))(masks_qhw, 12, 20)
    wide = np.apply_along_axis(torch_bilinear, 2, masks_qhw, 20)
    np.testing.assert_allclose(
        upsampled, np.apply_along_axis(torch_bilinear, 1, wide, 12), atol=1e-6
    )


@settings(max_examples=40)
@given(st.data())
def test_roi_align_matrices_are_torchvisions(data):
    (height, width), (out_height, out_width) = ROI_IN, ROI_OUT
    x1, y1 = data.draw(st.integers(-9, width + 9)), data.draw(st.integers(-9, height + 9))
    x2, y2 = x1 + data.draw(st.integers(0, width)), y1 + data.draw(st.integers(0, height))
    image = np.random.default_rng(0).normal(size=ROI_IN)
    crop = np.asarray(roi_rows(y1, y2)) @ image @ np.asarray(roi_columns(x1, x2)).T
    expected = torchvision_roi_align(image, (x1, y1, x2, y2), out_height, out_width)
    np.testing.assert_allclose(crop, expected, atol=3e-6)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 17)), max_size=4))
@example([(3, 5), (7, 5)])  # one column
@example([(3, 5), (3, 9)])  # one row
@example([(3, 5)])
@example([])
def test_boxes_enclose_the_segments(pixels):
    mask_hw = np.zeros((12, 18), bool)
    for row, column in pixels:
        mask_hw[row, column] = True
    rows, columns = np.nonzero(mask_hw)
    if len(rows) and np.ptp(rows) and np.ptp(columns):
        expected = [columns.min(), rows.min(), columns.max(), rows.max()]
    else:
        expected = [0, 0, 18, 12]
    np.testing.assert_array_equal(boxes_from_masks(mask_hw[None])[0], expected)


def test_a_squeezed_picture_has_no_masks_of_its_size():
    def temporaries(queries):
        run = jax.jit(partial(squeeze, side=16, grid=4))
        arrays = np.zeros((256, 256, 3), np.float32), np.zeros((queries, 16, 16), np.float32)
        compiled = run.lower(*arrays, np.array([256, 256])).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(60) - temporaries(20) < 40 * 256 * 256


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="sizes must be positive, not 0 -> 4"):
        resize_matrix(0, 4)


def test_a_squeeze_is_squeezed_without_its_padding():
    rng = np.random.default_rng(0)
    image = np.zeros((24, 32, 3), np.float32)
    image[:19, :30] = rng.normal(size=(19, 30, 3))
    logits = np.asarray(rng.normal(size=(3, 6, 8)), np.float32)
    logits[2] = -5
    size = jnp.array([19, 30])
    square, coverage = jax.jit(squeeze, static_argnums=(3, 4))(image, logits, size, 12, 3)

    def resized(maps_nhw, size):
        for axis, length in zip((1, 2), size, strict=True):
            maps_nhw = np.apply_along_axis(torch_bilinear, axis, maps_nhw, length)
        return maps_nhw

    expected = resized(image[:19, :30].transpose(2, 0, 1), (12, 12))
    np.testing.assert_allclose(square, expected.transpose(1, 2, 0), atol=1e-5)
    wide = resized(resized(logits, (24, 32))[:, :19, :30], (12, 12)) > 0
    shares = [
        [[mask[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].mean() for c in range(3)] for r in range(3)]
        for mask in wide
    ]
    np.testing.assert_allclose(coverage, shares, atol=1e-6)
    assert 0 < coverage[0].mean() < 1 and not coverage[2].any()


def test_rows_are_mixed_by_their_weights():
    """Rows, not queries or columns: all three axes have other lengths."""
    maps = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    low, high = np.array([0, 4, 2, 1]), np.array([1, 4, 3, 2])
    weight = np.array([0.25, 0.5, 0.0, 1.0], np.float32)
    mixed = mix_rows(maps, low, high, weight)
    taps = list(zip(low, high, weight, strict=True))
    expected = [[(1 - w) * rows[a] + w * rows[b] for a, b, w in taps] for rows in maps]
    np.testing.assert_allclose(mixed, expected, rtol=1e-6)
