import colorsys

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zegformer_jax.input import transforms

SIZES = [((40, 57), (20, 29)), ((40, 57), (97, 60)), ((31, 31), (31, 12)), ((64, 48), (13, 200))]
NO_JITTER, NO_FLIP = 0.9, 0.9


def pillow_resize(array, size, method):
    return np.asarray(Image.fromarray(array).resize(size[::-1], method))


@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
def test_resize_image_is_pillow_bilinear(in_size, out_size):
    image = np.random.default_rng(0).integers(0, 256, (*in_size, 3), np.uint8)
    expected = pillow_resize(image, out_size, Image.Resampling.BILINEAR)
    resized = transforms.resize_image(tf.constant(image), tf.constant(out_size)).numpy()
    difference = np.abs(resized.astype(int) - expected)
    assert resized.dtype == np.uint8
    assert difference.max() <= 1  # Pillow rounds between its two passes
    assert difference.mean() < 0.25


@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resize_label_is_pillow_nearest(in_size, out_size, dtype):
    label = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, in_size).astype(dtype)
    expected = pillow_resize(label, out_size, Image.Resampling.NEAREST)
    resized = transforms.resize_label(tf.constant(label), tf.constant(out_size))
    # Where a pixel's centre falls exactly between two, Pillow's sum of steps has rounding errors.
    between = [
        (2 * np.arange(out) + 1) * side % (2 * out) == 0
        for side, out in zip(in_size, out_size, strict=True)
    ]
    clear = ~between[0][:, None] & ~between[1][None]
    wrong = resized.numpy() != expected
    assert not np.any(wrong & clear)
    assert wrong.mean() < 0.03


@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
def test_a_window_is_a_part_of_the_whole(in_size, out_size):
    rng = np.random.default_rng(2)
    image = tf.constant(rng.integers(0, 256, (*in_size, 3), np.uint8))
    label = tf.constant(rng.integers(0, 256, in_size, np.uint8))
    size, window = tf.constant(out_size), (3, 5, out_size[0] - 4, out_size[1] - 7)
    part = np.s_[3 : out_size[0] - 1, 5 : out_size[1] - 2]
    whole = transforms.resize_image(image, size).numpy()[part].astype(int)
    window_image = transforms.resize_image(image, size, window).numpy()
    assert np.abs(window_image - whole).max() <= 1
    whole = transforms.resize_label(label, size).numpy()[part]
    np.testing.assert_array_equal(transforms.resize_label(label, size, window).numpy(), whole)


@settings(max_examples=60)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    short_side=st.integers(8, 1200),
    max_long_side=st.integers(1200, 2600),
)
def test_resized_sides(height, width, short_side, max_long_side):
    new = [short_side * side / min(height, width) for side in (height, width)]
    if max(new) > max_long_side:
        new = [side * max_long_side / max(new) for side in new]
    got = transforms.resized_sides(height, width, short_side, max_long_side)
    for side, exact in zip(got, new, strict=True):
        assert abs(int(side) - max(exact, 1)) <= 0.5 + 1e-6


def test_resized_sides_round_half_up():
    assert [int(side) for side in transforms.resized_sides(4, 6, 3, 100)] == [3, 5]  # 4.5
    assert [int(side) for side in transforms.resized_sides(375, 500, 512, 2048)] == [512, 683]


def oracle_jitter(image, uniform):
    """SSD's colour jitter by the book, pixel by pixel with colorsys."""

    def cut(values):
        return np.clip(values, 0, 255).astype(np.uint8)

    def through_hsv(image, change):
        changed = np.empty_like(image)
        for place in np.ndindex(image.shape[:2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255))
            eight_bit = int(hue * 180 + 0.5) % 180, int(saturation * 255 + 0.5)
            hue, saturation = change(*eight_bit)
            rgb = colorsys.hsv_to_rgb(hue / 180, saturation / 255, value)
            changed[place] = [int(channel * 255 + 0.5) for channel in rgb]
        return changed

    contrast, saturation = 0.5 + uniform[4], 0.5 + uniform[6]
    hue = int(uniform[8] * 37) - 18
    if uniform[0] < 0.5:
        image = cut(image + 64.0 * uniform[1] - 32)
    if uniform[3] < 0.5 and uniform[2] < 0.5:
        image = cut(image * contrast)
    if uniform[5] < 0.5:
        image = through_hsv(image, lambda h, s: (h, min(int(s * saturation), 255)))
    if uniform[7] < 0.5:
        image = through_hsv(image, lambda h, s: ((h + hue) % 180, s))
    if uniform[3] < 0.5 and uniform[2] >= 0.5:
        image = cut(image * contrast)
    return image


@pytest.mark.parametrize("case", range(12))
def test_colour_jitter_follows_its_steps(case):
    rng = np.random.default_rng(case)
    image = rng.integers(0, 256, (12, 10, 3), np.uint8)
    uniform = rng.random(9).astype(np.float32)
    if case == 0:
        uniform[[0, 3, 5, 7]] = 0.1  # all steps, contrast first
    if case == 1:
        uniform[[0, 3, 5, 7]], uniform[2] = 0.1, 0.8  # all steps, contrast last
    jittered = transforms.colour_jitter(tf.constant(image), tf.constant(uniform)).numpy()
    difference = np.abs(jittered.astype(int) - oracle_jitter(image, uniform))
    # An exact tie in rounding may fall either way, by one step of hue (at most 9 grey levels).
    assert np.mean(difference > 2) < 0.01
    assert difference.max() <= 14


def test_each_colour_step_has_its_probability():
    image = np.full((1, 1, 3), (200, 90, 40), np.uint8)
    uniform = np.full(9, 0.9, np.float32)
    unchanged = transforms.colour_jitter(tf.constant(image), tf.constant(uniform)).numpy()
    np.testing.assert_array_equal(unchanged, image)
    for step in (0, 3, 5, 7):
        for chance, changes in ((0.49, True), (0.51, False)):
            uniform = np.full(9, 0.9, np.float32)
            uniform[step] = chance
            jittered = transforms.colour_jitter(tf.constant(image), tf.constant(uniform)).numpy()
            assert np.any(jittered != image) == changes


def still(seed):
    """Random numbers for `augment` without colour jitter."""
    uniform = np.random.default_rng(seed).random(transforms.NUM_RANDOM).astype(np.float32)
    uniform[[3, 6, 8, 10]] = NO_JITTER
    return uniform


def run_augment(image, label, uniform, crop_size=48, short_sides=(24, 40, 64), **options):
    image, label = transforms.augment(
        tf.constant(image),
        tf.constant(label),
        tf.constant(uniform),
        crop_size=crop_size,
        short_sides=short_sides,
        max_long_side=options.get("max_long_side", 200),
        ignore_label=255,
    )
    return image.numpy(), label.numpy()


@pytest.mark.parametrize("seed", range(10))
def test_image_and_label_stay_aligned(seed):
    rows, columns = np.mgrid[:60, :80]
    image = np.stack([rows * 4, columns * 3, 0 * rows], -1).astype(np.uint8)
    label = (rows // 4 * 16 + columns // 5).astype(np.uint8)
    image, label = run_augment(image, label, still(seed))
    inside = label != 255
    row_of_label, column_of_label = label[inside] // 16, label[inside] % 16
    row_of_image = image[inside][:, 0] / 4 + 0.5
    column_of_image = image[inside][:, 1] / 3 + 0.5
    assert np.all(np.abs(row_of_image - (row_of_label * 4 + 2)) <= 3.2)
    assert np.all(np.abs(column_of_image - (column_of_label * 5 + 2.5)) <= 3.7)
    assert np.all(image[~inside] == 128)
    assert inside.any()


def test_padding_is_at_the_bottom_and_right():
    image, label = np.full((30, 60, 3), 7, np.uint8), np.full((30, 60), 3, np.uint8)
    image, label = run_augment(image, label, still(0), short_sides=(20,))
    assert np.all(label[:20, :40] == 3) and np.all(image[:20, :40] == 7)
    assert np.all(label[20:] == 255) and np.all(image[20:] == 128)
    assert np.all(label[:, 40:] == 255) and np.all(image[:, 40:] == 128)


def test_flip_and_crop_follow_their_numbers():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    label = np.random.default_rng(1).integers(0, 200, (64, 64), np.uint8)
    uniform = still(0)
    uniform[12] = NO_FLIP
    for corner, start in ((0.0, 0), (0.5, 8), (0.9999999, 16)):
        uniform[1] = uniform[2] = corner
        cropped, cropped_label = run_augment(image, label, uniform, short_sides=(64,))
        np.testing.assert_array_equal(cropped, image[start : start + 48, start : start + 48])
        np.testing.assert_array_equal(cropped_label, label[start : start + 48, start : start + 48])
    uniform[12] = 0.49
    flipped, flipped_label = run_augment(image, label, uniform, short_sides=(64,))
    np.testing.assert_array_equal(flipped, cropped[:, ::-1])
    np.testing.assert_array_equal(flipped_label, cropped_label[:, ::-1])


def test_every_short_side_is_drawn():
    label = np.zeros((32, 32), np.uint8)
    sides = []
    for draw in (0.0, 0.32, 0.34, 0.66, 0.67, 0.999):
        uniform = still(0)
        uniform[0] = draw
        image = np.zeros((32, 32, 3), np.uint8)
        sides.append(np.sum(run_augment(image, label, uniform, 100)[1][:, 0] == 0))
    assert sides == [24, 24, 40, 40, 64, 64]
