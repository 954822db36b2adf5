"""Overlays and sheets: sizes, positions of colours, names, marks of unseen classes, odd images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from zegformer_jax.drawing.overlay import SCREEN, UNSEEN_MARK, overlay
from zegformer_jax.drawing.palette import palette
from zegformer_jax.drawing.sheet import sheet

NAMES = ["sheep", "sofa, couch", "train"]


@pytest.fixture
def written(monkeypatch):
    """List of every text that is drawn."""
    texts = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, **kwargs):
        texts.append(text)
        return draw_text(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def halves(height=96, width=128, left=0, right=1):
    """A grey image whose left half has one label and whose right half has another."""
    labels = np.full((height, width), left)
    labels[:, width // 2 :] = right
    return np.full((height, width, 3), 128, np.uint8), labels


def test_palette_is_distinct_and_keeps_its_first_colours():
    colours = palette(150).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 1000 * np.eye(150, dtype=int)
    assert apart.min() >= 25
    for n in (0, 1, 20):
        np.testing.assert_array_equal(palette(n), colours[:n])
    assert palette(5000).shape == (5000, 3)
    with pytest.raises(ValueError, match="-1 colours"):
        palette(-1)


def test_overlay_blends_the_colour_of_each_class_and_leaves_unlabelled_pixels():
    image, labels = halves(400, 500, left=0, right=255)
    labels[300:, 250:] = 2
    drawn = np.asarray(overlay(image, labels, NAMES, alpha=0.5)).astype(int)
    assert drawn.shape == (400, 500, 3)
    for (row, column), index in {(20, 20): 0, (390, 490): 2}.items():
        expected = 0.5 * 128 + 0.5 * palette(3)[index].astype(float)
        np.testing.assert_allclose(drawn[row, column], expected, atol=0.5)
    np.testing.assert_array_equal(drawn[20, 480], [128, 128, 128])


def test_a_large_overlay_is_reduced_to_the_screen():
    """Half of each side; the border is where the labels change."""
    image, labels = halves(800, 1200, left=0, right=2)
    drawn = overlay(image, labels, NAMES, alpha=0.5, max_pixels=600 * 400)
    assert drawn.size == (600, 400)
    pixels = np.asarray(drawn).astype(int)
    for column, index in {297: 0, 302: 2}.items():
        expected = 0.5 * 128 + 0.5 * palette(3)[index].astype(float)
        np.testing.assert_allclose(pixels[20, column], expected, atol=0.5)
    assert pixels[20, 299].sum() < 0.5 * pixels[20, 297].sum()
    width, height = overlay(
        np.zeros((1500, 2600, 3), np.uint8), np.zeros((1500, 2600), int), []
    ).size
    assert 0.99 * SCREEN < width * height <= SCREEN
    assert width / height == pytest.approx(2600 / 1500, rel=1e-3)


def test_overlay_leaves_the_extra_ignore_value_out():
    image, labels = halves(400, 400, left=2, right=2)
    drawn = np.asarray(overlay(image, labels, NAMES, ignore=2))
    np.testing.assert_array_equal(drawn, image)


def test_overlay_draws_a_dark_border_between_classes():
    image, labels = halves(400, 400)
    drawn = np.asarray(overlay(image, labels, NAMES)).astype(int)
    assert drawn[20, 199].sum() < 0.5 * drawn[20, 100].sum()
    assert drawn[20, 200].sum() < 0.5 * drawn[20, 300].sum()


def test_overlay_stars_hatches_and_outlines_unseen_classes_only(written):
    image, labels = halves(400, 400)
    seen = np.asarray(overlay(image, labels, NAMES)).astype(int)
    assert sorted(written) == ["sheep", "sofa"]
    written.clear()
    unseen = np.asarray(overlay(image, labels, NAMES, seen=[True, False, True])).astype(int)
    assert sorted(written) == ["sheep", f"{UNSEEN_MARK} sofa"]
    np.testing.assert_array_equal(seen[:, :140], unseen[:, :140])
    hatched = np.any(seen[:100, 210:] != unseen[:100, 210:], axis=-1).mean()
    assert 0.1 < hatched < 0.4
    np.testing.assert_array_equal(unseen[20, 201], [255, 255, 255])


def test_a_name_is_inside_the_largest_region_of_its_class(monkeypatch):
    places = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, *a, **k: places.append(xy))
    labels = np.full((400, 600), 255)
    labels[10:60, 10:60] = 0
    labels[200:390, 300:590] = 0
    overlay(np.zeros((400, 600, 3), np.uint8), labels, NAMES)
    ((column, row),) = places
    assert 200 <= row < 390
    assert 300 <= column < 590


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [(1, 1, (384, 384)), (96, 128, (384, 288)), (5000, 300, (300, 5000)), (1, 700, (700, 1))],
)
def test_overlay_works_at_any_size_and_enlarges_small_images(height, width, shown):
    image, labels = halves(height, width)
    drawn = overlay(image, labels, NAMES, seen=[True, False, False])
    assert drawn.size == shown
    assert drawn.mode == "RGB"


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_overlay_draws_any_labels(height, width, seed):
    labels = np.random.default_rng(seed).integers(-3, 300, (height, width))
    drawn = overlay(np.zeros((height, width, 3), np.uint8), labels, [f"n{i}" for i in range(260)])
    factor = -(-384 // max(height, width))
    assert drawn.size == (width * factor, height * factor)


def test_overlay_without_classes_is_the_image():
    image, labels = halves(400, 400)
    np.testing.assert_array_equal(np.asarray(overlay(image, labels, [])), image)


def test_overlay_names_the_argument_that_does_not_fit():
    image, labels = halves()
    with pytest.raises(ValueError, match=r"image is float64 \(96, 128, 3\)"):
        overlay(image / 255, labels, NAMES)
    with pytest.raises(ValueError, match=r"labels are int64 \(95, 128\)"):
        overlay(image, labels[1:], NAMES)
    with pytest.raises(ValueError, match="2 flags for 3"):
        overlay(image, labels, NAMES, seen=[True, False])


def test_sheet_has_a_column_per_image_and_names_the_classes_in_it(written):
    image, truth = halves(left=0, right=255)
    prediction = np.full_like(truth, 1)
    page = sheet(
        [(image, truth, prediction)] * 3,
        NAMES,
        seen=[True, False, True],
        titles=("image", "truth", "ZegFormer"),
        cell=240,
    )
    assert page.size[0] == 3 * 240 + 4 * 10
    assert page.size[1] > 3 * 180
    assert {"image", "truth", "ZegFormer", "sheep", f"{UNSEEN_MARK} sofa"} <= set(written)
    assert not any("train" == text for text in written)


def test_sheet_draws_predictions_where_the_truth_has_labels_unless_asked():
    image, truth = halves(left=0, right=255)
    prediction = np.full_like(truth, 2)
    hidden = np.asarray(sheet([(image, truth, prediction)], NAMES, cell=240))
    shown = np.asarray(sheet([(image, truth, prediction)], NAMES, cell=240, show_ignored=True))
    right_of_prediction = 30 + 2 * 240 + 200
    row = 240 // 9 + 10
    np.testing.assert_array_equal(hidden[row, right_of_prediction], [128, 128, 128])
    assert np.any(shown[row, right_of_prediction] != 128)


def test_sheet_takes_scenes_of_different_shapes_and_refuses_uneven_rows():
    rows = [(*halves(40, 500), halves(40, 500)[1]), (*halves(300, 50), halves(300, 50)[1])]
    assert isinstance(sheet(rows, NAMES), Image.Image)
    with pytest.raises(ValueError, match="every row needs"):
        sheet([rows[0], rows[1][:2]], NAMES)
    with pytest.raises(ValueError, match="every row needs"):
        sheet([], NAMES)
