"""The report's tables hold the numbers they were given; the summary fits a screen."""

import json
import math

import numpy as np
import pytest

from zegformer_jax.drawing.curves import loss_curves
from zegformer_jax.evaluation.metrics.confusion import scores_from_confusion
from zegformer_jax.evaluation.report.demo_report import (
    MethodResult,
    Report,
    SegmentFit,
    Timing,
    summary,
    write_report,
)

VOC = {"cat": True, "bird": True, "sofa, couch": False, "a|b": False}
NAN = float("nan")


def method(name, vocabulary="VOC", seen=0.7123, unseen=0.6049, classes=VOC, **changes):
    fields = {
        "harmonic": 2 * seen * unseen / (seen + unseen),
        "pixel_accuracy": 0.8,
        "iou": dict.fromkeys(classes, 0.25) | {"bird": NAN},
    }
    return MethodResult(name, vocabulary, seen, unseen, **(fields | changes))


def report(**changes):
    fields = {
        "methods": [method("per-pixel baseline", unseen=0.2), method("ZegFormer")],
        "segment_fit": [SegmentFit("VOC", 0.7111, NAN)],
        "timing": Timing({"grouper": 0.31}, {"ZegFormer": 0.05}, {"CLIP": 271.0}),
        "settings": {"seed": np.int64(3), "model": {"queries": 16}},
        "losses": {"grouper": [(0, {"total": np.float32(2.5)})]},
        "pictures": {"sheet.png": "Validation scenes"},
    }
    return Report("OpenMoji-VOC", {"VOC": VOC}, **(fields | changes))


def rows(markdown):
    """The rows of all Markdown tables, as lists of their cells."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [line[2:-2].split(" | ") for line in lines]


def test_json_holds_the_numbers_given_and_null_for_nan(tmp_path):
    write_report(tmp_path / "new" / "run", report())
    read = json.loads((tmp_path / "new" / "run" / "report.json").read_text())
    zegformer = read["methods"][1]
    assert (zegformer["name"], zegformer["vocabulary"]) == ("ZegFormer", "VOC")
    assert (zegformer["seen"], zegformer["unseen"]) == (0.7123, 0.6049)
    assert zegformer["iou"] == {"cat": 0.25, "bird": None, "sofa, couch": 0.25, "a|b": 0.25}
    assert read["segment_fit"] == [{"vocabulary": "VOC", "seen": 0.7111, "unseen": None}]
    assert read["settings"] == {"seed": 3, "model": {"queries": 16}}
    assert read["losses"] == {"grouper": [[0, {"total": 2.5}]]}
    assert read["vocabularies"] == {"VOC": VOC}


def test_markdown_holds_the_numbers_in_percent(tmp_path):
    write_report(tmp_path, report())
    text = (tmp_path / "report.md").read_text()
    table = rows(text)
    assert table[0] == ["method", "VOC: seen", "VOC: unseen", "VOC: harmonic", "VOC: pixel acc."]
    assert table[2] == ["per-pixel baseline", "**71.2**", "20.0", "31.2", "**80.0**"]
    assert table[3] == ["ZegFormer", "**71.2**", "**60.5**", "**65.4**", "**80.0**"]
    assert ["VOC", "71.1", "-"] in table
    assert ["bird", "-", "-"] in table
    assert ["sofa, couch ★", "25.0", "25.0"] in table
    assert ["a\\|b ★", "25.0", "25.0"] in table
    assert ["one training step, grouper", "310 ms"] in table
    assert ["stage: CLIP", "4 min 31 s"] in table
    assert "![Validation scenes](sheet.png)" in text
    assert "2 seen and 2 unseen classes" in text
    assert '"queries": 16' in text


def test_a_method_without_scores_on_a_vocabulary_has_dashes(tmp_path):
    two = {"VOC": VOC, "all": {"cat": True}}
    methods = [method("A"), method("B"), method("B", "all", classes=["cat"], iou={"cat": 0.5})]
    write_report(tmp_path, Report("two", two, methods))
    table = rows((tmp_path / "report.md").read_text())
    assert table[2][0] == "A"
    assert table[2][5:] == ["-"] * 4
    assert table[3][5:] == ["71.2", "60.5", "65.4", "80.0"]
    assert ["cat", "50.0"] in table


def test_summary_fits_a_screen_and_holds_the_headline():
    classes = {f"vocabulary number {n} with quite a long name": VOC for n in range(4)}
    methods = [method(f"method {m}", v) for v in classes for m in ("a", "b" * 90, "c", "d")]
    times = {f"stage {n}": 100.0 * n for n in range(9)}
    long = Report("t" * 99, classes, methods, timing=Timing(stage=times))
    lines = summary(long).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[3].split() == ["method", "a", "71.2", "60.5", "65.4", "80.0"]

    lines = summary(report()).splitlines()
    assert lines[0] == "OpenMoji-VOC"
    assert lines[4].split() == ["ZegFormer", "71.2", "60.5", "65.4", "80.0"]
    assert lines[5].split()[:4] == ["segments", "alone", "71.1", "-"]


def test_from_scores_takes_over_every_score():
    scores = scores_from_confusion(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), [True, False, True])
    result = MethodResult.from_scores("ZegFormer", "VOC", ["cat", "sofa", "bird"], scores)
    assert (result.seen, result.unseen) == (0.75, 0.8)
    assert result.pixel_accuracy == 7 / 8
    assert result.iou["cat"] == 0.75
    assert math.isnan(result.iou["bird"])
    assert result.others["seen_absent"] == 1
    assert result.others["accuracy/cat"] == 0.75
    with pytest.raises(ValueError, match="3 IoUs for 1 classes"):
        MethodResult.from_scores("ZegFormer", "VOC", ["cat"], scores)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([method("A", "ADE")], "none of the report's vocabularies: VOC"),
        ([method("A"), method("A")], "A is scored twice on 'VOC'"),
        ([method("A", iou={"cat": 0.5})], "classes of its IoUs are not those of 'VOC'"),
    ],
)
def test_methods_that_do_not_fit_are_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        report(methods=methods)


def test_loss_curves_draws_a_panel_for_each_stage_and_skips_nan():
    history = [(step, {"total": 10.0 / (1 + step), "dice": NAN}) for step in range(20)]
    one = loss_curves({"CLIP": history})
    two = loss_curves({"CLIP": history, "grouper": history})
    assert one.mode == "RGB"
    assert two.width == 2 * one.width
    assert len(np.unique(np.asarray(one).reshape(-1, 3), axis=0)) > 10
    assert loss_curves({}).size == one.size
    assert loss_curves({"per-pixel": [], "zero": [(0, {"total": 0.0})]}).width == two.width
