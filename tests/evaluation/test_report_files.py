"""Files of an evaluation read back; published figures by name."""

import csv
import json

import numpy as np
import pytest
from etils import epath

from zegformer_jax.evaluation.metrics.confusion import confused_pairs, scores_from_confusion
from zegformer_jax.evaluation.report.files import (
    write_classes,
    write_confusion,
)
from zegformer_jax.evaluation.report.published import PUBLISHED, published_rows
from zegformer_jax.input import benchmarks

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
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


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
