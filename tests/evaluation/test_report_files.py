"""Files of an evaluation read back; run lengths decoded by hand; published figures by name."""

import csv
import json

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from PIL import Image

from zegformer_jax.evaluation.metrics.confusion import confused_pairs, scores_from_confusion
from zegformer_jax.evaluation.report.files import (
    LabelMapWriter,
    encode_rle,
    parse_kinds,
    segments_json,
    write_classes,
    write_confusion,
    write_label_png,
)
from zegformer_jax.evaluation.report.published import PUBLISHED, published_rows
from zegformer_jax.input import benchmarks
from zegformer_jax.input.decoding import LABEL_MODES

CLASSES = {"sofa, couch": True, "tree": False, 'a "b"': True, "sea": False}
NAMES, SEEN = tuple(CLASSES), tuple(CLASSES.values())
CONFUSION = np.array([[5, 3, 0, 0], [3, 2**33, 1, 0], [0, 0, 0, 0], [0, 7, 0, 0]])


def test_classes_are_a_table(tmp_path):
    path = tmp_path / "new" / "classes.csv"
    scores = scores_from_confusion(CONFUSION, SEEN)
    write_classes(path, CLASSES, scores, CONFUSION)
    with path.open(newline="") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["class", "kind", "iou", "accuracy", "labelled_pixels", "predicted_pixels"]
    assert rows == [
        ["sofa, couch", "seen", "0.454545", "0.625000", "8", "8"],  # 5 / 11 and 5 / 8
        ["tree", "unseen", "1.000000", "1.000000", str(2**33 + 4), str(2**33 + 10)],
        ['a "b"', "seen", "", "", "0", "1"],
        ["sea", "unseen", "0.000000", "0.000000", "7", "0"],
    ]
    assert [item.name for item in path.parent.iterdir()] == ["classes.csv"]


def test_a_confusion_matrix_is_read_back(tmp_path):
    path = tmp_path / "confusion.npz"
    write_confusion(path, CLASSES, CONFUSION)
    with np.load(path, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["confusion"], CONFUSION)
        assert arrays["confusion"].dtype == np.int64 and arrays["seen"].dtype == bool
        assert tuple(arrays["names"]) == NAMES and tuple(arrays["seen"]) == SEEN


def test_a_table_is_of_as_many_classes_as_scores(tmp_path):
    path, scores = tmp_path / "x", scores_from_confusion(CONFUSION, SEEN)
    with pytest.raises(ValueError):
        write_classes(path, {"a": True, "b": True, "c": False}, scores, CONFUSION)
    assert not path.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "confusion.npz"
    write_confusion(path, CLASSES, CONFUSION)
    before = path.read_bytes()

    def fail(self, target):
        raise OSError(f"no {target}")

    monkeypatch.setattr(type(epath.Path(path)), "replace", fail)
    with pytest.raises(OSError):
        write_confusion(path, CLASSES, 2 * CONFUSION)
    assert path.read_bytes() == before


def test_pairs_are_the_most_confused_ones():
    pairs = confused_pairs(CONFUSION, NAMES)
    assert [(p["label"], p["prediction"], p["pixels"]) for p in pairs] == [
        ("sea", "tree", 7),
        ("sofa, couch", "tree", 3),
        ("tree", "sofa, couch", 3),
        ("tree", 'a "b"', 1),
    ]
    np.testing.assert_allclose([p["share"] for p in pairs[:2]], [1, 3 / 8])
    assert confused_pairs(CONFUSION, NAMES, count=2) == pairs[:2]
    assert confused_pairs(np.diag([4, 5]), NAMES[:2]) == []
    json.dumps(pairs)
    equal = confused_pairs(np.ones((9, 9), int), "abcdefghi")
    in_order = [a + b for a in "abcdefghi" for b in "abcdefghi" if a != b]
    assert [p["label"] + p["prediction"] for p in equal] == in_order[:20]


def run_lengths(text):
    """The run lengths in COCO's text: base 32, 48 the digit 0, differences to the last but one."""
    runs, place = [], 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            digit = ord(text[place]) - 48
            value |= (digit & 31) << shift
            place, shift, more = place + 1, shift + 5, bool(digit & 32)
            if not more and digit & 16:
                value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def decode(rle):
    """Writes the runs pixel by pixel: down the first column, then the next, from 0 on."""
    height, width = rle["size"]
    mask = np.zeros((height, width), bool)
    place = 0
    for turn, count in enumerate(run_lengths(rle["counts"])):
        for _ in range(count):
            mask[place % height, place // height] = turn % 2 == 1
            place += 1
    assert place == height * width
    return mask


def test_run_lengths_by_hand():
    """The columns are 0 1 1, 1 0 0."""
    mask = np.array([[0, 1], [1, 0], [1, 0]])
    assert encode_rle(mask) == {"size": [3, 2], "counts": "132"}  # and 2 is 1 + 1
    assert run_lengths(encode_rle(1 - mask)["counts"]) == [0, 1, 3, 2]
    assert run_lengths(encode_rle(np.zeros((2, 3)))["counts"]) == [6]
    assert run_lengths(encode_rle(np.ones((2, 3)))["counts"]) == [0, 6]


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_run_lengths_decode_to_the_mask(mask):
    rle = json.loads(json.dumps(encode_rle(mask)))
    np.testing.assert_array_equal(decode(rle), mask)


def test_label_maps_are_a_segment_for_each_class_in_them():
    labels = np.random.default_rng(0).choice([0, 2, 300], (7, 9)).astype(np.int32)
    segments = json.loads(json.dumps(segments_json(labels, "a/b")))
    assert [s["category_id"] for s in segments] == [0, 2, 300]
    for segment in segments:
        assert segment["image_id"] == "a/b"
        np.testing.assert_array_equal(
            decode(segment["segmentation"]), labels == segment["category_id"]
        )


def test_label_maps_are_files_by_id(tmp_path):
    labels = np.array([[0, 1], [1, 1]], np.uint8)
    LabelMapWriter(tmp_path, parse_kinds("png, rle"))("street/1", labels)
    with Image.open(tmp_path / "png" / "street" / "1.png") as image:
        np.testing.assert_array_equal(np.asarray(image), labels)
    segments = json.loads((tmp_path / "rle" / "street" / "1.json").read_text())
    for index, segment in enumerate(segments):
        np.testing.assert_array_equal(decode(segment["segmentation"]), labels == index)
    LabelMapWriter(tmp_path / "only", ["rle"])("1", labels)
    assert [path.name for path in (tmp_path / "only").iterdir()] == ["rle"]
    with pytest.raises(ValueError, match="--predictions: no 'jpg'; choose of png, rle"):
        parse_kinds("jpg")


@pytest.mark.parametrize(
    "dtype, most, mode",
    [
        ("uint8", 255, "L"),
        ("uint16", 3, "I;16"),
        ("uint16", 65535, "I;16"),
        ("int32", 255, "L"),
        ("int64", 256, "I;16"),
    ],
)
def test_labels_are_read_back_from_png(tmp_path, dtype, most, mode):
    labels = np.array([[0, 1, 2], [3, most, 0]], dtype)
    path = tmp_path / "a" / "b.png"
    write_label_png(path, labels)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == mode in LABEL_MODES
        np.testing.assert_array_equal(np.asarray(picture), labels)
    assert [item.name for item in path.parent.iterdir()] == ["b.png"]


@pytest.mark.parametrize("label", [-1, 65536])
def test_labels_that_no_png_holds_are_told(tmp_path, label):
    with pytest.raises(ValueError, match=rf"b.png: labels .*{label}.*0\.\.65535"):
        write_label_png(tmp_path / "b.png", np.array([[0, label]]))
    assert not list(tmp_path.iterdir())


def percents(row):
    scores = (row.seen_iou, row.unseen_iou, row.harmonic_iou, row.mean_iou)
    return tuple(None if score is None else round(100 * score, 6) for score in scores)


def test_published_figures_of_the_zero_shot_tables():
    rows = published_rows("coco_stuff", False, "r101", "coco_stuff")
    assert [percents(row) for row in rows] == [
        (36.6, 33.2, 34.8, None),
        (36.6, 36.2, None, None),
    ]
    assert "CVPR 2022" in rows[0].source and "released weights" in rows[1].source
    (row,) = published_rows("pascal_voc", False, "r101", "pascal_voc")
    assert percents(row) == (86.4, 63.6, 73.3, None)


@pytest.mark.parametrize(
    "all_seen, figures",
    [(False, (4.9, 9.1, 16.9, 42.8, 86.2)), (True, (5.6, 10.4, 18.0, 45.5, 89.5))],
)
def test_published_figures_of_the_cross_dataset_table(all_seen, figures):
    names = "ade20k_full", "pascal_context_459", "ade20k_150", "pascal_context_59", "pascal_voc"
    for name, figure in zip(names, figures, strict=True):
        (row,) = published_rows("coco_stuff", all_seen, "swin_t", name)
        assert percents(row) == (None, None, None, figure)
        assert ("171" if all_seen else "156") in row.source


def test_what_was_not_published_has_no_figures():
    find = published_rows
    assert find("coco_stuff", False, "r50", "coco_stuff") == ()
    assert find("coco_stuff", True, "r101", "coco_stuff") == ()
    assert find("pascal_voc", False, "r101", "ade20k_150") == ()
    assert find("coco_stuff", True, "r101", "pascal_voc_20b") == ()


def test_the_facts_name_data_sets_that_there_are():
    rows = json.loads(PUBLISHED.read_text())["rows"]
    assert {row[key] for row in rows for key in ("trained_on", "evaluated_on")} <= set(
        benchmarks.BENCHMARKS
    )
    known = {"trained_on", "all_seen", "backbone", "evaluated_on", "source"}
    known |= {"seen_iou", "unseen_iou", "harmonic_iou", "mean_iou"}
    assert all(row.keys() <= known for row in rows)
