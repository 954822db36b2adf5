"""Files that an evaluation writes: report.json, report.md, CSV, NPZ, PNG, RLE.

Axes: c class, h w pixels.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from zegformer_jax.evaluation.evaluation import Evaluation
from zegformer_jax.evaluation.metrics.confusion import Scores
from zegformer_jax.evaluation.report import tables
from zegformer_jax.evaluation.report.schema import Report
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.files import write_bytes

FOLDER = "evaluation"  # of a workdir
REPORT, REPORT_TABLES = "report.json", "report.md"
LABEL_MAPS = ("png", "rle")  # kinds of files
CLASS_COLUMNS = ("class", "kind", "iou", "accuracy", "labelled_pixels", "predicted_pixels")


def parse_kinds(text: str) -> tuple[str, ...]:
    """Reads kinds of files of label maps, by commas.

    Raises:
        UserError: There is no such kind.
    """
    kinds = tuple(kind.strip() for kind in text.split(",") if kind.strip())
    for kind in kinds:
        if kind not in LABEL_MAPS:
            raise UserError(f"--predictions: no '{kind}'; choose of {', '.join(LABEL_MAPS)}")
    return kinds


class LabelMapWriter:
    """Writes images' label maps, a file each, named by their ids."""

    def __init__(self, folder: epath.Path, kinds: Sequence[str]):
        """Sets the folder, which gets a folder for each kind of file, see `LABEL_MAPS`."""
        self._folder, self._kinds = folder, tuple(kinds)

    def __call__(self, id_: str, labels_hw: np.ndarray) -> None:
        """Writes an image's label map."""
        if "png" in self._kinds:
            write_label_png(self._folder / "png" / f"{id_}.png", labels_hw)
        if "rle" in self._kinds:
            text = json.dumps(segments_json(labels_hw, id_))
            write_bytes(self._folder / "rle" / f"{id_}.json", text.encode())


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


def _is_finished(folder: epath.Path) -> bool:
    """Returns whether a folder has the report of a finished evaluation."""
    path = folder / REPORT
    try:
        return path.exists() and not json.loads(path.read_text()).get("partial")
    except (ValueError, AttributeError):  # a damaged one is no loss
        return False


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


def segments_json(labels_hw: np.ndarray, image_id: str) -> list[dict[str, Any]]:
    """Returns a label map in the format of COCO's results, a segment for each class in it.

    Args:
        labels_hw: Integer [h, w], class indices.
        image_id: The image's id.

    Returns:
        Dicts of `image_id`, `category_id` (the class's index in the vocabulary, from 0; not an id
        of the data set's files) and `segmentation` (see `encode_rle`), by rising index.
    """
    return [
        {
            "image_id": image_id,
            "category_id": index,
            "segmentation": encode_rle(labels_hw == index),
        }
        for index in np.unique(labels_hw).tolist()
    ]


def encode_rle(mask_hw: np.ndarray) -> dict[str, Any]:
    """Returns a mask's run lengths as COCO's tools read them.

    Args:
        mask_hw: bool [h, w].

    Returns:
        `size`: [h, w]; `counts`: compressed run lengths, a text.
    """
    from pycocotools import mask

    runs = mask.encode(np.asfortranarray(mask_hw, np.uint8))
    return {"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")}


def write_label_png(path: epath.PathLike, labels_hw: np.ndarray) -> None:
    """Writes a label map as a PNG of one channel, whose values are the labels.

    Args:
        path: The file.
        labels_hw: Integer [h, w]. uint8 gives 8 bits and uint16 gives 16; any other type gives 8
            if all labels fit, else 16. Cast to the vocabulary's `label_dtype` to have all images
            alike.

    Raises:
        ValueError: A label is not in 0..65535.
    """
    labels_hw = np.asarray(labels_hw)
    if labels_hw.dtype not in (np.uint8, np.uint16):
        least, most = int(labels_hw.min(initial=0)), int(labels_hw.max(initial=0))
        if least < 0 or most > np.iinfo(np.uint16).max:
            raise ValueError(f"{path}: labels {least}..{most}, but a PNG holds 0..65535")
        labels_hw = labels_hw.astype(np.uint8 if most <= np.iinfo(np.uint8).max else np.uint16)
    data = io.BytesIO()
    Image.fromarray(labels_hw).save(data, format="PNG")
    write_bytes(path, data.getvalue())
