"""One schema: the tables and files of an evaluation hold its numbers; the summary fits a screen."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from configs import coco_stuff
from zegformer_jax.evaluation.evaluation import Evaluation
from zegformer_jax.evaluation.metric import by_key, zeros
from zegformer_jax.evaluation.metrics import METRICS
from zegformer_jax.evaluation.metrics.oracles import RIGHT_NAMES, RIGHT_SEGMENTS
from zegformer_jax.evaluation.metrics.segment_fit import BOUNDARY_F, IOU, Fit
from zegformer_jax.evaluation.plan import Plan, ask
from zegformer_jax.evaluation.report import tables
from zegformer_jax.evaluation.report.files import write_evaluation, write_report
from zegformer_jax.evaluation.report.published import published_lines
from zegformer_jax.evaluation.report.schema import Report, Row, Timing, describe
from zegformer_jax.evaluation.subsets import Subset, load_subsets
from zegformer_jax.experiment import Experiment
from zegformer_jax.segmentation.zegformer import ZegFormer
from zegformer_jax.text.vocabulary import Vocabulary

NAN = float("nan")
MATRIX = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])


def make_evaluation(vocabulary, subsets, states, sweep=(), **fields):
    """An evaluation of a grouper; metrics without states have counted nothing."""
    methods, gammas = ("grouper", "ensemble"), (0.0,)
    plan = Plan(
        model=ZegFormer(None, None),
        vocabulary=vocabulary,
        subsets=subsets,
        questions=tuple(ask(subset, methods, gammas) for subset in subsets),
        shown="ensemble",
        gamma=0.0,
        sweep=sweep,
        oracles=True,
    )
    metrics = by_key(metric for make in METRICS for metric in make(plan))
    empty = np.zeros((len(vocabulary),) * 2, int)
    assert states.keys() <= metrics.keys()
    states = {key: states.get(key, empty) for key in metrics}
    fits = {key: zeros(Fit(empty[0] * 1.0, empty[0])) for key in metrics if "fit best, " in key}
    states |= {key: fit for key, fit in fits.items() if states[key] is empty}
    return Evaluation(plan, metrics, states, **({"images": 4, "of": 4} | fields))


def make_result(seen=(True, False, True), **fields):
    """Three classes, by default one of them unseen; of "c" nothing is labelled."""
    vocabulary = Vocabulary.from_names(["a, aa", "b", "c"], seen)
    states = {
        "grouper": MATRIX.T,
        "ensemble": MATRIX,
        RIGHT_NAMES: np.diag([8, 4, 0]),
        RIGHT_SEGMENTS: MATRIX,
        IOU: Fit(np.array([1.5, 0.5, 0]), np.array([2, 1, 0])),
        BOUNDARY_F: Fit(np.array([1.0, 0.25, 0]), np.array([2, 1, 0])),
    }
    states = {f"folder/{name}": state for name, state in states.items()}
    return make_evaluation(vocabulary, load_subsets((), vocabulary, "folder"), states, **fields)


def write(folder, evaluation, **fields):
    return write_evaluation(folder, evaluation, describe(evaluation, "folder", **fields))


def strict(path):
    """Reads a JSON file by the grammar, which has no NaN."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_everything_is_written(tmp_path):
    text = write(tmp_path / "out", make_result())
    report = strict(tmp_path / "out" / "report.json")
    assert (report["title"], report["images"], report["of"]) == ("folder", 4, 4)
    assert report["vocabularies"] == {"folder": {"a, aa": True, "b": False, "c": True}}
    ours = next(row for row in report["scores"] if row["name"] == "ensemble")
    assert ours["seen"] == pytest.approx(6 / 9) and ours["unseen"] == pytest.approx(3 / 6)
    assert ours["mIoU"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert ours["harmonic"] == pytest.approx(2 / (9 / 6 + 6 / 3))
    assert ours["class_iou"] == {"a, aa": pytest.approx(6 / 9), "b": 0.5, "c": None}
    assert ours["class_accuracy"] == {"a, aa": 0.75, "b": 0.75, "c": None}
    assert report["confused"][0]["pixels"] == 2 and report["shown"] == "ensemble"
    with (tmp_path / "out" / "folder_classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["seen", "unseen", "seen"]
    with np.load(tmp_path / "out" / "folder_confusion.npz") as arrays:
        assert arrays["confusion"].sum() == 12
    assert "66.7" in text and "1 seen, 0 unseen classes are not in the labels" in text
    assert "segments that fit best, IoU: seen 75.0, unseen 50.0" in text
    assert "segments that fit best, boundary F: seen 50.0, unseen 25.0" in text
    assert "the segments with their right names: seen 100.0, unseen 100.0" in text
    assert "most confused by ensemble: a, aa as b (25%), b as a, aa (25%)" in text
    assert text.endswith(f"written: {tmp_path / 'out'}")


def test_where_no_class_is_unseen_nothing_is_said_of_them(tmp_path):
    text = write(tmp_path, make_result(seen=None))
    report = strict(tmp_path / "report.json")
    assert all(row["unseen"] is None and row["seen"] > 0 for row in report["metrics"])
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
    regions = np.array([1, 4, 2, 1])
    states = {
        f"x/{IOU}": Fit(np.array([0.5, 3.0, 1.0, 0.25]), regions),
        f"x/{BOUNDARY_F}": Fit(np.array([0.5, 1.5, 0.5, 0.125]), regions),
    }
    report = describe(make_evaluation(vocabulary, (subset,), states), "x")
    assert report.vocabularies == {"x": {"a": True, "b or c": True, "d": False}}
    values = {row.name: row.values for row in report.metrics}
    assert values[IOU] == {"seen": (0.5 + 3.0 + 1.0) / 7, "unseen": 0.25}
    assert values[BOUNDARY_F] == {"seen": (0.5 + 1.5 + 0.5) / 7, "unseen": 0.125}


def test_every_score_is_in_the_table_and_in_the_report(tmp_path):
    text = write(tmp_path, make_result())
    row = strict(tmp_path / "report.json")["scores"][1]
    assert row["fwIoU"] == pytest.approx((8 * 6 / 9 + 4 * 3 / 6) / 12)
    assert row["accuracy"] == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert row["pixels"] == pytest.approx(9 / 12)
    heading, _, ours = (line.split() for line in text.splitlines()[:3])
    shown = dict(zip(["", *heading], ours, strict=True))
    assert (shown["fwIoU"], shown["accuracy"], shown["pixels"]) == ("61.1", "75.0", "75.0")
    assert all(f"{name}:" in tables.FOOTNOTE for name in ("mIoU", "fwIoU", "accuracy", "pixels"))


def test_the_headline_is_marked(tmp_path):
    """The method that is shown, in the first of two vocabularies."""
    vocabulary = Vocabulary.from_names(["a", "b"], [True, False])
    (one,), (two,) = (load_subsets((), vocabulary, name) for name in ("one", "two"))
    lines = write(tmp_path, make_evaluation(vocabulary, (two, one), {})).splitlines()[1:5]
    rows = [line.split()[:-8] for line in lines]
    assert rows == [
        ["two", "grouper"],
        [">", "two", "ensemble"],
        ["one", "grouper"],
        ["one", "ensemble"],
    ]
    assert f"{tables.HEADLINE_MARK}:" in tables.FOOTNOTE


def test_notes_are_broken_at_100_columns(tmp_path):
    names = [f"class with the number {place}" for place in range(8)]
    vocabulary = Vocabulary.from_names(names)
    subsets = load_subsets((), vocabulary, "folder")
    states = {"folder/ensemble": np.roll(10 * np.eye(8, dtype=int), 1, axis=0)}
    text = write(tmp_path, make_evaluation(vocabulary, subsets, states))
    lines = text.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) <= 100
    assert text.replace("\n  ", " ").count(" as class with the number ") == 5


def test_the_report_names_the_model(tmp_path):
    write(tmp_path, make_result(), model={"place": "runs/x", "step": 3}, data="/records")
    content = strict(tmp_path / "report.json")
    assert content["model"] == {"place": "runs/x", "step": 3} and content["data"] == "/records"


def test_the_widest_table_fits_a_screen(tmp_path):
    vocabulary = Vocabulary.from_names(["a", "b"], [True, False])
    subsets = load_subsets((), vocabulary, "pascal_context_459")
    result = make_evaluation(vocabulary, subsets, {}, sweep=(0.05,))
    lines = write(tmp_path, result).splitlines()[: 4 + len(tables.FOOTNOTE.splitlines())]
    assert lines[3].startswith("  pascal_context_459  ensemble, gamma 0.05")
    assert lines[-1] == tables.FOOTNOTE.splitlines()[-1]
    assert max(map(len, lines)) <= 110


def test_a_vocabulary_file_of_ones_own_gives_files_in_the_results_folder(tmp_path):
    files = [tmp_path / folder / "words.json" for folder in ("one", "two")]
    vocabulary = Vocabulary.from_names(["a", "b"], [True, False])
    for file in files:
        file.parent.mkdir()
        file.write_text(vocabulary.to_json())
    subsets = load_subsets([str(files[0])], vocabulary, "folder")
    text = write(tmp_path / "out", make_evaluation(vocabulary, subsets, {}))
    assert text.splitlines()[1].split()[0] == "words"
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.json", "words_classes.csv", "words_confusion.npz"}
    assert list(files[0].parent.iterdir()) == [files[0]]
    for pair in (files, [str(files[0])] * 2):
        with pytest.raises(ValueError, match="eval.vocabularies: .* both be reported as 'words'"):
            load_subsets(list(map(str, pair)), vocabulary, "folder")


def test_a_part_is_marked_and_does_not_replace_the_whole(tmp_path):
    whole, part = make_result(), make_result(of=1449)
    report = tmp_path / "report.json"

    def counted():
        content = json.loads(report.read_text())
        return content["partial"], content["images"], content["of"]

    lines = write(tmp_path, part).splitlines()
    assert lines[0] == "PARTIAL: 4 of 1,449 images" and lines[-1] == f"written: {tmp_path}"
    assert counted() == (True, 4, 1449)
    assert "PARTIAL" not in write(tmp_path, whole)
    assert counted() == (False, 4, 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    *lines, last = write(tmp_path, part).splitlines()
    assert lines[0].startswith("PARTIAL") and last.startswith(f"not written: {tmp_path}")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    report.write_text("{")
    assert write(tmp_path, part).endswith(f"written: {tmp_path}")
    assert counted() == (True, 4, 1449)


@pytest.mark.parametrize(
    "variant, dataset, line",
    [
        (None, "coco_stuff", "published: seen 36.6, unseen 33.2, harmonic 34.8"),
        ("r101,supervised", "ade20k_150", "published: mIoU 18.0"),
        ("r101", "openmoji_voc", ""),
        ("swin_b", "coco_stuff", ""),
    ],
)
def test_the_published_figure_stands_beside(tmp_path, variant, dataset, line):
    config = coco_stuff.get_config(*[variant] if variant else [])
    experiment = Experiment.open(config, tmp_path)
    model = ZegFormer(experiment.build_model(512), None)
    published = published_lines(model, experiment, dataset)
    text = write(tmp_path, make_result(), published=published)
    assert line in text and ("published:" in text) == bool(line)
    assert strict(tmp_path / "report.json")["published"] == published


def test_the_best_checkpoint_is_ranked_where_no_class_is_unseen():
    result = make_result()
    assert result.rank() == result.line()["harmonic"] == pytest.approx(2 / (9 / 6 + 6 / 3))
    supervised = make_result(seen=None)
    assert np.isnan(supervised.line()["harmonic"])
    assert supervised.rank() == pytest.approx((6 / 9 + 3 / 6) / 2)


VOC = {"cat": True, "bird": True, "sofa, couch": False, "a|b": False}


def scores(name, vocabulary="VOC", seen=0.7123, unseen=0.6049, classes=VOC, iou=None):
    values = {"seen": seen, "unseen": unseen, "pixels": 0.8}
    values["harmonic"] = 2 * seen * unseen / (seen + unseen)
    return Row(name, vocabulary, values, iou or dict.fromkeys(classes, 0.25) | {"bird": NAN})


def report(**changes):
    fields = {
        "scores": [scores("per-pixel baseline", unseen=0.2), scores("ZegFormer")],
        "metrics": [Row("fit", "VOC", {"seen": 0.7111, "unseen": NAN})],
        "timing": Timing({"grouper": 0.31}, {"ZegFormer": 0.05, "other": NAN}, {"CLIP": 271.0}),
        "settings": {"seed": np.int64(3), "model": {"queries": 16}},
        "losses": {"grouper": [(0, {"total": np.float32(2.5)})]},
        "figures": {"sheet.png": "Validation images"},
    }
    return Report("OpenMoji-VOC", 5, 5, {"VOC": VOC}, **(fields | changes))


def rows(markdown):
    """The rows of all Markdown tables, as lists of their cells."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]


def test_json_holds_the_numbers_given_and_null_for_nan(tmp_path):
    write_report(tmp_path / "new" / "run", report())
    read = strict(tmp_path / "new" / "run" / "report.json")
    zegformer = read["scores"][1]
    assert (zegformer["name"], zegformer["vocabulary"]) == ("ZegFormer", "VOC")
    assert (zegformer["seen"], zegformer["unseen"]) == (0.7123, 0.6049)
    assert zegformer["class_iou"] == {"cat": 0.25, "bird": None, "sofa, couch": 0.25, "a|b": 0.25}
    (fit,) = read["metrics"]
    assert (fit["name"], fit["seen"], fit["unseen"]) == ("fit", 0.7111, None)
    assert read["settings"] == {"seed": 3, "model": {"queries": 16}}
    assert read["losses"] == {"grouper": [[0, {"total": 2.5}]]}
    assert read["vocabularies"] == {"VOC": VOC}


def test_both_reports_have_one_schema(tmp_path):
    """The demo's and that of an evaluation: the same keys, down to the rows."""
    write(tmp_path / "one", make_result())
    write_report(tmp_path / "two", report())
    one, two = (strict(tmp_path / name / "report.json") for name in ("one", "two"))
    assert one.keys() == two.keys() == {"partial"} | {x.name for x in dataclasses.fields(Report)}
    for rows in ("scores", "metrics"):
        common = {"name", "vocabulary", "seen", "unseen", "class_iou", "class_accuracy"}
        assert all(common <= row.keys() for row in one[rows] + two[rows])


def test_markdown_holds_the_numbers_in_percent(tmp_path):
    write_report(tmp_path, report())
    text = (tmp_path / "report.md").read_text()
    table = rows(text)
    assert table[0] == ["method", "VOC: seen", "VOC: unseen", "VOC: harmonic", "VOC: pixel acc."]
    assert table[2] == ["per-pixel baseline", "**71.2**", "20.0", "31.2", "**80.0**"]
    assert table[3] == ["ZegFormer", "**71.2**", "**60.5**", "**65.4**", "**80.0**"]
    assert ["fit", "VOC", "71.1", "-"] in table
    assert ["bird", "-", "-"] in table
    assert ["sofa, couch ★", "25.0", "25.0"] in table
    assert ["a\\|b ★", "25.0", "25.0"] in table
    assert ["one training step, grouper", "310 ms"] in table
    assert ["one image, ZegFormer", "50 ms"] in table and ["one image, other", "-"] in table
    assert ["stage: CLIP", "4 min 31 s"] in table
    assert "![Validation images](sheet.png)" in text
    assert "2 seen and 2 unseen classes" in text
    assert '"queries": 16' in text


def test_a_method_without_scores_on_a_vocabulary_has_dashes(tmp_path):
    two = {"VOC": VOC, "all": {"cat": True}}
    methods = [scores("A"), scores("B"), scores("B", "all", iou={"cat": 0.5})]
    write_report(tmp_path, Report("two", 5, 5, two, methods))
    table = rows((tmp_path / "report.md").read_text())
    assert table[2][0] == "A"
    assert table[2][5:] == ["-"] * 4
    assert table[3][5:] == ["71.2", "60.5", "65.4", "80.0"]
    assert ["cat", "50.0"] in table


def test_summary_fits_a_screen_and_holds_the_headline():
    classes = {f"vocabulary number {n} with quite a long name": VOC for n in range(4)}
    methods = [scores(f"method {m}", v) for v in classes for m in ("a", "b" * 90, "c", "d")]
    times = {f"stage {n}": 100.0 * n for n in range(9)}
    long = Report("t" * 99, 5, 5, classes, methods, timing=Timing(stage=times))
    lines = tables.summary(long).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[3].split() == ["method", "a", "71.2", "60.5", "65.4", "80.0"]

    lines = tables.summary(report()).splitlines()
    assert lines[0] == "OpenMoji-VOC"
    assert lines[4].split() == ["ZegFormer", "71.2", "60.5", "65.4", "80.0"]
    assert lines[5].split() == ["fit", "71.1", "-", "-", "-"]
    assert len({len(line) for line in lines[2:6]}) == 1, "columns end in one place"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([scores("A", "ADE")], "none of the report's vocabularies: VOC"),
        ([scores("A"), scores("A")], "A is scored twice on 'VOC'"),
        ([scores("A", iou={"cat": 0.5})], "classes of its IoUs are not those of 'VOC'"),
    ],
)
def test_methods_that_do_not_fit_are_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        report(scores=methods)
