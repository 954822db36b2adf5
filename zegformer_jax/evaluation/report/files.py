"""Files that an evaluation writes: report.json, report.md, CSV, NPZ.

Axes: c class.
"""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from zegformer_jax.evaluation.evaluation import Evaluation
from zegformer_jax.evaluation.metrics.confusion import Scores
from zegformer_jax.evaluation.report import tables
from zegformer_jax.evaluation.report.schema import Report
from zegformer_jax.runtime.files import write_bytes

FOLDER = "evaluation"  # of a workdir
REPORT, REPORT_TABLES = "report.json", "report.md"
CLASS_COLUMNS = ("class", "kind", "iou", "accuracy", "labelled_pixels", "predicted_pixels")


def write_report(folder: epath.PathLike, report: Report) -> None:
    """Writes report.json, which has everything, and report.md, the tables."""
    folder = epath.Path(folder)
    write_bytes(folder / REPORT, report.to_json().encode())
    write_bytes(folder / REPORT_TABLES, tables.markdown(report).encode())


def write_evaluation(folder: epath.Path, evaluation: Evaluation, report: Report) -> str:
    """Writes an evaluation's report and tables of classes, and returns what the screen shows.

    A partial evaluation does not replace the files of a finished one.

    Args:
        folder: Gets report.json and, by vocabulary, NAME_classes.csv and NAME_confusion.npz.
        evaluation: The evaluation.
        report: Its report.
    """
    text = tables.screen(report)
    if report.partial and _is_finished(folder):
        return f"{text}\nnot written: {folder} has a finished evaluation's tables"
    for metric, state in evaluation.shown():
        stem, classes, matrix_cc = metric.vocabulary, metric.subset.reported, metric.matrix(state)
        path = folder / f"{stem}_classes.csv"
        write_classes(path, classes, metric.scores(state), matrix_cc)
        write_confusion(folder / f"{stem}_confusion.npz", classes, matrix_cc)
    write_bytes(folder / REPORT, report.to_json().encode())
    return f"{text}\nwritten: {folder}"


def read_place(folder: epath.Path) -> str | None:
    """Returns the data set's directory in a folder's report; None if there is no such report."""
    return _read_report(folder).get("data")


def _is_finished(folder: epath.Path) -> bool:
    """Returns whether a folder has the report of a finished evaluation."""
    return not _read_report(folder).get("partial", True)


def _read_report(folder: epath.Path) -> dict[str, Any]:
    """Reads a folder's report; {} if there is none, or a damaged one, which is no loss."""
    path = folder / REPORT
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def write_classes(
    path: epath.PathLike, classes: Mapping[str, bool], scores: Scores, confusion_cc: np.ndarray
) -> None:
    """Writes the per-class table as CSV, a line for each class in the vocabulary's order.

    The columns are `CLASS_COLUMNS`: kind is "seen" or "unseen"; IoU and accuracy are fractions with
    six decimals, empty for classes that are not in the labels.

    Args:
        path: The file.
        classes: Seen flags of the c classes by name.
        scores: Their scores.
        confusion_cc: Integer [c, c], indexed [label, prediction].
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CLASS_COLUMNS)
    columns = (
        classes,
        ["seen" if flag else "unseen" for flag in classes.values()],
        ["" if np.isnan(value) else f"{value:.6f}" for value in scores.iou_c],
        ["" if np.isnan(value) else f"{value:.6f}" for value in scores.accuracy_c],
        confusion_cc.sum(axis=1).tolist(),
        confusion_cc.sum(axis=0).tolist(),
    )
    writer.writerows(zip(*columns, strict=True))
    write_bytes(path, text.getvalue().encode())


def write_confusion(
    path: epath.PathLike, classes: Mapping[str, bool], confusion_cc: np.ndarray
) -> None:
    """Writes a confusion matrix as NPZ: `confusion`, `names` and `seen`.

    Args:
        path: The file.
        classes: Seen flags of the c classes by name.
        confusion_cc: Integer [c, c], indexed [label, prediction].
    """
    names, seen = np.asarray(list(classes), str), np.asarray(list(classes.values()), bool)
    data = io.BytesIO()
    np.savez_compressed(data, confusion=confusion_cc, names=names, seen=seen)
    write_bytes(path, data.getvalue())
