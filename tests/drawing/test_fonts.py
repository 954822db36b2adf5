"""Names in all scripts: in a font of the system that has their letters, else as numbers."""

import shutil

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image, ImageDraw, features

from zegformer_jax.drawing import fonts
from zegformer_jax.drawing.overlay import UNSEEN_MARK, overlay
from zegformer_jax.drawing.sheet import sheet

CAT = "猫"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """Forgets the fonts and warnings of other tests."""
    for function in (fonts._find, fonts._letters, fonts._warn):
        function.cache_clear()


@pytest.fixture
def written(monkeypatch):
    """List of every text that is drawn, with the name of its font."""
    texts = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, font, **kwargs):
        texts.append((text, font.path.rpartition("/")[2]))
        return draw_text(self, xy, text, *args, font=font, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def make_font(path, letters):
    """A font in which each letter is a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(x): name for x, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def let_fontconfig_answer(folder, monkeypatch, answer):
    """Puts a `fc-match` first on the path that knows a font with the cat alone."""
    script = folder / "fc-match"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *charset=732b*) printf "%s\\n0" "{answer}";; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def draw(names, seen=None):
    """An overlay of as many stripes as there are classes."""
    labels = np.repeat(np.arange(len(names)), 100)[None].repeat(200, axis=0)
    return overlay(np.full((*labels.shape, 3), 128, np.uint8), labels, names, seen=seen)


def test_letters_that_the_own_font_lacks_come_from_the_systems(tmp_path, monkeypatch, written):
    let_fontconfig_answer(tmp_path, monkeypatch, make_font(tmp_path / "cats.ttf", CAT))
    draw([f"{CAT}, cat", "кот"], seen=[False, True])
    assert written == [
        (UNSEEN_MARK, "DejaVuSans-Bold.ttf"),
        (f" {CAT}", "cats.ttf"),
        ("кот", "DejaVuSans-Bold.ttf"),
    ]


def test_parts_of_a_name_stand_side_by_side_in_its_tag(tmp_path, monkeypatch):
    """The two squares are as far apart as one is wide, and the three parts are centred."""
    let_fontconfig_answer(tmp_path, monkeypatch, make_font(tmp_path / "cats.ttf", CAT))
    image = Image.new("L", (200, 40))
    fonts.write(ImageDraw.Draw(image), (100, 20), f"I {CAT}", 20, fill=255, anchor="mm")
    columns = np.flatnonzero(np.asarray(image).max(axis=0) > 128)
    width = fonts.measure(f"I {CAT}", 20)
    assert columns[0] == pytest.approx(100 - width / 2, abs=3)
    assert columns[-1] == pytest.approx(100 + width / 2 - 4, abs=2)
    assert np.sum(np.asarray(image)[:, int(100 - width / 2 + width - 20) :] > 128) == 16 * 16


@pytest.mark.parametrize("answer", ["", "/no/such/font.ttf", "another"])
def test_a_name_that_no_font_can_write_is_its_number(
    answer, tmp_path, monkeypatch, written, caplog
):
    if answer == "another":
        answer = make_font(tmp_path / "other.ttf", "犬")
    let_fontconfig_answer(tmp_path, monkeypatch, answer)
    draw(["cat", CAT, CAT * 2], seen=[True, False, True])
    assert [text for text, _ in written] == ["cat", f"{UNSEEN_MARK} 1", "2"]
    (message,) = caplog.messages
    assert f"1 is {CAT}, 2 is {CAT * 2}; to see the names, install a font" in message


def test_a_sheet_has_the_same_numbers_and_warns_once(tmp_path, monkeypatch, written, caplog):
    let_fontconfig_answer(tmp_path, monkeypatch, "")
    labels = np.zeros((60, 80), int)
    row = np.zeros((60, 80, 3), np.uint8), labels, labels + 1
    sheet([row, row], [CAT, "cat", CAT * 3], show_ignored=True)
    assert "0" in dict(written) and CAT not in dict(written)
    assert len(caplog.messages) == 1 and f"0 is {CAT}; to see" in caplog.text


def test_without_fontconfig_all_fonts_are_tried(tmp_path, monkeypatch, written):
    make_font(tmp_path / "LastResort.otf", CAT)
    files = [make_font(tmp_path / f"{name}.ttf", x) for name, x in (("dogs", "犬"), ("cats", CAT))]
    found = [str(tmp_path / "LastResort.otf"), str(tmp_path / "none.ttf"), *map(str, files)]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found)
    draw([CAT])
    assert written == [(CAT, "cats.ttf")]


@pytest.mark.parametrize("has_layout", [True, False])
def test_letters_that_join_need_a_layout_engine(has_layout, tmp_path, monkeypatch, written, caplog):
    """Without one Pillow writes Arabic letters apart, and from the left."""
    monkeypatch.setattr(features, "check", lambda name: has_layout)
    draw(["قطة"])
    assert dict(written).keys() == {"قطة" if has_layout else "0"}
    assert ("0 is قطة" in caplog.text) == (not has_layout)


@pytest.mark.parametrize("text", ["cat", f"{UNSEEN_MARK} sofa, couch", "naïve Ωμέγα кот"])
def test_a_size_that_fits_is_the_largest(text):
    size = fonts.fit_size(text, 64, 90)
    assert fonts.measure(text, size) + size <= 90 < fonts.measure(text, size + 1) + size + 1
    assert fonts.fit_size(text, 12, 10_000) == 12
    assert fonts.fit_size(text, 64, 5) is None
