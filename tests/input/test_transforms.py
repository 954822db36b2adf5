import numpy as np
import pytest
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
    np.testing.assert_array_equal(transforms.resize_image(image, out_size), expected)


@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resize_label_is_pillow_nearest(in_size, out_size, dtype):
    label = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, in_size).astype(dtype)
    expected = pillow_resize(label, out_size, Image.Resampling.NEAREST)
    resized = transforms.resize_label(label, out_size)
    # Where a pixel's centre falls exactly between two, Pillow's sum of steps has rounding errors.
    between = [
        (2 * np.arange(out) + 1) * side % (2 * out) == 0
        for side, out in zip(in_size, out_size, strict=True)
    ]
    clear = ~between[0][:, None] & ~between[1][None]
    wrong = resized != expected
    assert not np.any(wrong & clear)
    assert wrong.mean() < 0.03


@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
def test_a_window_is_a_part_of_the_whole(in_size, out_size):
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (*in_size, 3), np.uint8)
    label = rng.integers(0, 256, in_size, np.uint8)
    window = transforms.Window(3, 5, out_size[0] - 4, out_size[1] - 7)
    part = np.s_[3 : out_size[0] - 1, 5 : out_size[1] - 2]
    whole = transforms.resize_image(image, out_size)[part].astype(int)
    window_image = transforms.resize_image(image, out_size, window)
    assert np.abs(window_image - whole).max() <= 1  # Pillow's boxes have 32-bit numbers
    whole = transforms.resize_label(label, out_size)[part]
    np.testing.assert_array_equal(transforms.resize_label(label, out_size, window), whole)


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
    assert transforms.resized_sides(300, 5000, 512, 2048) == (123, 2048)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_padded_sides_are_few_and_near(height, width):
    sides = np.array([height, width])
    padded, label = transforms.padded_sides(height, width), transforms.label_sides(height, width)
    assert padded == tuple(32 * np.ceil(sides / 32))
    for side, rounded in zip(sides, label, strict=True):
        octave = 2.0 ** np.ceil(np.log2(side)) / 2  # side is in (octave, 2 * octave]
        few = octave * np.array([1.25, 1.5, 1.75, 2.0])
        assert rounded == (few[few >= side][0] if octave >= 128 else 32 * np.ceil(side / 32))


@pytest.mark.parametrize("sides", [("72x", 2048), (0, 2048), (72.0, 2048), (72, -1)])
def test_sides_that_are_no_sizes_are_refused(sides):
    with pytest.raises(ValueError, match="side of images .*: give an integer above 0"):
        transforms.resized_sides(4, 6, *sides)


def to_hsv(image):
    """OpenCV's RGB2HSV_b: whole numbers, and division by tables of 12 bits after the point."""
    red, green, blue = (image[..., i].astype(int) for i in range(3))
    value, least = image.max(-1).astype(int), image.min(-1).astype(int)
    spread = value - least
    by_value = np.round((255 << 12) / np.maximum(value, 1)).astype(int) * (value > 0)
    by_spread = np.round((180 << 12) / (6.0 * np.maximum(spread, 1))).astype(int) * (spread > 0)
    hue = np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    hue = np.where(value == red, green - blue, hue)
    hue = (hue * by_spread + (1 << 11)) >> 12
    saturation = (spread * by_value + (1 << 11)) >> 12
    return np.stack([hue + 180 * (hue < 0), saturation, value], -1)


def to_rgb(hsv):
    """OpenCV's HSV2RGB_b: six sectors of 30 steps, 32 bits, cut to whole grey levels."""
    scales = np.float32([6 / 180, 1 / 255, 1 / 255])
    hue, saturation, value = np.moveaxis(hsv.astype(np.float32) * scales, -1, 0)
    sector, part, one = hue.astype(int) % 6, hue % 1, np.float32(1)
    low, falling = value * (one - saturation), value * (one - saturation * part)
    rising = value * ((one - saturation) + saturation * part)
    sectors = [
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    ]
    rgb = np.select(
        [(sector == i)[..., None] for i in range(6)], [np.stack(x, -1) for x in sectors]
    )
    return (rgb * np.float32(255)).astype(np.uint8)


def oracle_jitter(image, uniform):
    """SSD's colour jitter by the book, with OpenCV's arithmetic written out."""

    def cut(values):
        return np.clip(values, 0, 255).astype(np.uint8)

    contrast, saturation = 0.5 + uniform[4], 0.5 + uniform[6]
    if uniform[0] < 0.5:
        image = cut(image + (64.0 * uniform[1] - 32))
    if uniform[3] < 0.5 and uniform[2] < 0.5:
        image = cut(image * contrast)
    if uniform[5] < 0.5:
        hsv = to_hsv(image)
        hsv[..., 1] = cut(hsv[..., 1] * saturation)
        image = to_rgb(hsv)
    if uniform[7] < 0.5:
        hsv = to_hsv(image)
        hsv[..., 0] = (hsv[..., 0] + int(uniform[8] * 37) - 18) % 180
        image = to_rgb(hsv)
    if uniform[3] < 0.5 and uniform[2] >= 0.5:
        image = cut(image * contrast)
    return image


@pytest.mark.parametrize("case", range(12))
def test_colour_jitter_follows_its_steps(case):
    rng = np.random.default_rng(case)
    image = rng.integers(0, 256, (100, 128, 3), np.uint8)  # the ends of other rows are rounded
    uniform = rng.random(9)
    if case == 0:
        uniform[[0, 3, 5, 7]] = 0.1  # all steps, contrast first
    if case == 1:
        uniform[[0, 3, 5, 7]], uniform[2] = 0.1, 0.8  # all steps, contrast last
    difference = np.abs(
        transforms.colour_jitter(image, uniform).astype(int) - oracle_jitter(image, uniform)
    )
    # Where a result is nearly whole, a fused multiplication may be cut to one less.
    assert np.mean(difference > 0) < 1e-3
    assert difference.max() <= 3


def test_each_colour_step_has_its_probability():
    image = np.full((1, 1, 3), (200, 90, 40), np.uint8)
    uniform = np.full(9, 0.9)
    unchanged = transforms.colour_jitter(image, uniform)
    np.testing.assert_array_equal(unchanged, image)
    for step in (0, 3, 5, 7):
        for chance, changes in ((0.49, True), (0.51, False)):
            uniform = np.full(9, 0.9)
            uniform[step] = chance
            jittered = transforms.colour_jitter(image, uniform)
            assert np.any(jittered != image) == changes


def still(seed):
    """Random numbers for `augment` without colour jitter."""
    uniform = np.random.default_rng(seed).random(transforms.NUM_RANDOM)
    uniform[[3, 6, 8, 10]] = NO_JITTER
    return uniform


def run_augment(image, label, uniform, crop_size=48, short_sides=(24, 40, 64), **options):
    return transforms.augment(
        image,
        label,
        uniform,
        crop_size=crop_size,
        short_sides=short_sides,
        max_long_side=options.get("max_long_side", 200),
        ignore_label=255,
    )


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
