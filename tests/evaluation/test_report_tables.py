"""The table and the files that an evaluation leaves."""

import csv
import json

import numpy as np
import pytest

from configs import coco_stuff
from zegformer_jax.evaluation.counts import OVERLAP, RIGHT_NAMES, RIGHT_SEGMENTS, Evaluation
from zegformer_jax.evaluation.report import tables
from zegformer_jax.evaluation.subsets import Subset, load_subsets
from zegformer_jax.text.vocabulary import Vocabulary


def make_result():
    """Three classes, one of them unseen; of "c" nothing is labelled."""
    vocabulary = Vocabulary.from_names(["a, aa", "b", "c"], [True, False, True])
    (subset,) = load_subsets((), vocabulary, "folder")
    result = Evaluation((subset,), vocabulary, "ensemble", pictures=4)
    matrix = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    result.add({("grouper", "folder"): matrix.T, ("ensemble", "folder"): matrix})
    result.add({(RIGHT_NAMES, "folder"): np.diag([8, 4, 0])})
    result.add({(RIGHT_SEGMENTS, "folder"): matrix})
    result.add({OVERLAP: np.array([[1.5, 0.5, 0], [1.0, 0.25, 0], [2, 1, 0]])})
    return result


def test_everything_is_written(tmp_path):
    text = tables.write(tmp_path / "out", coco_stuff.get_config(), make_result(), "folder")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pictures"] == 4 and report["dataset"] == "folder"
    ours = next(row for row in report["scores"] if row["method"] == "ensemble")
    assert ours["seen"] == pytest.approx(6 / 9) and ours["unseen"] == pytest.approx(3 / 6)
    assert ours["mIoU"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert ours["harmonic"] == pytest.approx(2 / (9 / 6 + 6 / 3))
    assert report["confused"][0]["pixels"] == 2
    with (tmp_path / "out" / "folder_classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["seen", "unseen", "seen"]
    with np.load(tmp_path / "out" / "folder_confusion.npz") as arrays:
        assert arrays["confusion"].sum() == 12
    assert "66.7" in text and "1 seen, 0 unseen classes are not in the labels" in text
    assert "segments that fit best, IoU: seen 75.0, unseen 50.0" in text
    assert "segments that fit best, boundary F: seen 50.0, unseen 25.0" in text
    assert "the segments with their right names: seen 100.0, unseen 100.0" in text
    assert str(tmp_path / "out") in text


def strict(path):
    """What JSON's grammar admits, and no NaN."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_where_no_class_is_unseen_nothing_is_said_of_them(tmp_path):
    vocabulary = Vocabulary.from_names(["a, aa", "b", "c"])
    (subset,) = load_subsets((), vocabulary, "folder")
    result = Evaluation((subset,), vocabulary, "ensemble", pictures=4)
    result.add(make_result().counts())
    assert result.segment_fit(subset) == (2 / 3, pytest.approx(np.nan, nan_ok=True))
    text = tables.write(tmp_path, coco_stuff.get_config(), result, "folder")
    report = strict(tmp_path / "report.json")
    assert all(row["unseen"] is None and row["seen"] > 0 for row in report["oracles"])
    assert [row["unseen"] for row in report["scores"]] == [None, None]
    assert "segments that fit best, IoU: seen 66.7, unseen -" in text
    assert "right names: seen 100.0, unseen -, harmonic -" in text
    heading, row = text.splitlines()[:2]
    assert row.split()[heading.split().index("unseen")] == "-" and "nan" not in text


def test_regions_of_classes_that_count_as_one_count_as_that_one():
    """The second and third are one class, which is seen as one of them is."""
    vocabulary = Vocabulary.from_names(["a", "b", "c", "d"], [True, False, True, False])
    merge = np.array([0, 1, 1, 2])
    subset = Subset("x", vocabulary, np.arange(4), ("a", "b or c", "d"), merge)
    result = Evaluation((subset,), vocabulary, "clip")
    fits = np.array([[0.5, 3.0, 1.0, 0.25], [0.5, 1.5, 0.5, 0.125], [1, 4, 2, 1]])
    result.add({OVERLAP: fits})
    assert result.segment_fit(subset) == ((0.5 + 3.0 + 1.0) / 7, 0.25)
    assert result.boundary_fit(subset) == ((0.5 + 1.5 + 0.5) / 7, 0.125)


def test_every_score_is_in_the_table_and_in_the_report(tmp_path):
    text = tables.write(tmp_path, coco_stuff.get_config(), make_result(), "folder")
    row = strict(tmp_path / "report.json")["scores"][1]
    assert row["fwIoU"] == pytest.approx((8 * 6 / 9 + 4 * 3 / 6) / 12)
    assert row["accuracy"] == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert row["pixels"] == pytest.approx(9 / 12)
    heading, _, ours = (line.split() for line in text.splitlines()[:3])
    shown = dict(zip(heading, ours, strict=True))
    assert (shown["fwIoU"], shown["accuracy"], shown["pixels"]) == ("61.1", "75.0", "75.0")
    assert all(f"{name}:" in tables.FOOTNOTE for name in ("mIoU", "fwIoU", "accuracy", "pixels"))


def test_the_widest_table_fits_a_screen(tmp_path):
    vocabulary = Vocabulary.from_names(["a", "b"], [True, False])
    (subset,) = load_subsets((), vocabulary, "pascal_context_459")
    result = Evaluation((subset,), vocabulary, "ensemble")
    for method in ("ensemble", "ensemble, gamma 0.05"):
        result.add({(method, "pascal_context_459"): np.diag([3, 1])})
    text = tables.write(tmp_path, coco_stuff.get_config(), result, "pascal_context_459")
    lines = text.splitlines()[: 3 + len(tables.FOOTNOTE.splitlines())]
    assert lines[-1] == tables.FOOTNOTE.splitlines()[-1]
    assert max(map(len, lines)) <= 110


def test_a_vocabulary_file_of_ones_own_gives_files_in_the_results_folder(tmp_path):
    files = [tmp_path / folder / "words.json" for folder in ("one", "two")]
    vocabulary = Vocabulary.from_names(["a", "b"], [True, False])
    for file in files:
        file.parent.mkdir()
        vocabulary.save(file)
    subsets = load_subsets([str(files[0])], vocabulary, "folder")
    result = Evaluation(subsets, vocabulary, "ensemble")
    result.add({("ensemble", str(files[0])): np.diag([3, 1])})
    text = tables.write(tmp_path / "out", coco_stuff.get_config(), result, "folder")
    assert text.splitlines()[1].split()[0] == "words"
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.json", "words_classes.csv", "words_confusion.npz"}
    assert list(files[0].parent.iterdir()) == [files[0]]
    for pair in (files, [str(files[0])] * 2):
        with pytest.raises(ValueError, match="eval.vocabularies: .* both be reported as 'words'"):
            load_subsets(list(map(str, pair)), vocabulary, "folder")


def test_fractions_of_many_pictures_are_not_rounded_away():
    result = make_result()
    result.overlap = None
    for most in (2.0**24, 1.0, 1.0, 1.0):
        result.add({OVERLAP: np.full((3, 3), most, np.float32)})
    assert result.overlap.dtype == np.float64 and np.all(result.overlap == 2**24 + 3)


def test_a_part_is_marked_and_does_not_replace_the_whole(tmp_path):
    config, whole, part = coco_stuff.get_config(), make_result(), make_result()
    whole.of, part.of = 4, 1449
    report = tmp_path / "report.json"

    def counted():
        content = json.loads(report.read_text())
        return content["partial"], content["pictures"], content["of"]

    lines = tables.write(tmp_path, config, part, "folder").splitlines()
    assert lines[0] == "PARTIAL: 4 of 1,449 pictures" and lines[-1] == f"written: {tmp_path}"
    assert counted() == (True, 4, 1449)
    assert "PARTIAL" not in tables.write(tmp_path, config, whole, "folder")
    assert counted() == (False, 4, 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    *lines, last = tables.write(tmp_path, config, part, "folder").splitlines()
    assert lines[0].startswith("PARTIAL") and last.startswith(f"not written: {tmp_path}")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    report.write_text("{")
    assert tables.write(tmp_path, config, part, "folder").endswith(f"written: {tmp_path}")
    assert counted() == (True, 4, 1449)


def test_the_published_figure_stands_beside(tmp_path):
    config = coco_stuff.get_config()
    text = tables.write(tmp_path, config, make_result(), "coco_stuff")
    assert "published: seen 36.6, unseen 33.2, harmonic 34.8" in text
    supervised = coco_stuff.get_config("r101,supervised")
    text = tables.write(tmp_path, supervised, make_result(), "ade20k_150")
    assert "published: mIoU 18.0" in text
    text = tables.write(tmp_path, coco_stuff.get_config("swin_b"), make_result(), "coco_stuff")
    assert "published:" not in text


def test_predictions_are_files_by_id(tmp_path):
    write = tables.PredictionWriter(tmp_path, tables.parse_predictions("png, rle"))
    write("street/1", np.array([[0, 1], [1, 1]], np.uint8))
    assert (tmp_path / "png" / "street" / "1.png").exists()
    (first, second) = json.loads((tmp_path / "rle" / "street" / "1.json").read_text())
    assert first["segmentation"] == {"size": [2, 2], "counts": [0, 1, 3]}
    assert second["segmentation"] == {"size": [2, 2], "counts": [1, 3]}
    with pytest.raises(ValueError, match="--predictions: no 'jpg'; choose of png, rle"):
        tables.parse_predictions("jpg")


def test_the_best_checkpoint_is_ranked_where_no_class_is_unseen():
    result = make_result()
    assert result.rank() == result.line()["harmonic"] == pytest.approx(2 / (9 / 6 + 6 / 3))
    vocabulary = Vocabulary.from_names(["a, aa", "b", "c"])
    (subset,) = load_subsets((), vocabulary, "folder")
    supervised = Evaluation((subset,), vocabulary, "ensemble")
    supervised.add({("ensemble", "folder"): result.confusion["ensemble", "folder"]})
    assert np.isnan(supervised.line()["harmonic"])
    assert supervised.rank() == pytest.approx((6 / 9 + 3 / 6) / 2)
