"""What an evaluation leaves: a table on the screen, and files beside the run."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from zegformer_jax.evaluation.counts import Evaluation
from zegformer_jax.evaluation.metrics.confusion import scores_from_confusion
from zegformer_jax.evaluation.report.files import (
    confused_pairs,
    prediction_json,
    write_classes,
    write_confusion,
    write_label_png,
)
from zegformer_jax.evaluation.report.published import published_rows
from zegformer_jax.evaluation.subsets import Subset
from zegformer_jax.models.backbones.resnet import BLOCKS
from zegformer_jax.runtime.files import write_bytes

FOLDER = "evaluation"
REPORT = "report.json"
PREDICTIONS = ("png", "rle")
PAIRS_SHOWN = 5
COLUMNS = {
    "seen": "seen_iou",
    "unseen": "unseen_iou",
    "harmonic": "harmonic_iou",
    "mIoU": "mean_iou_labels",
    "mIoU*": "mean_iou_labels_or_predictions",
    "fwIoU": "frequency_weighted_iou",
    "accuracy": "mean_accuracy",
    "pixels": "pixel_accuracy",
}
FOOTNOTE = """\
in %, mean IoU but for the last two; mIoU: over the classes in the labels; mIoU*: the older
definition, divided by the number of classes in labels or predictions; fwIoU: weighted by the
classes' pixels; accuracy: share of right pixels, mean over classes; pixels: over all pixels"""


def parse_predictions(text: str) -> tuple[str, ...]:
    """Reads kinds of label maps by commas.

    Raises:
        ValueError: there is no such kind.
    """
    kinds = tuple(kind.strip() for kind in text.split(",") if kind.strip())
    for kind in kinds:
        if kind not in PREDICTIONS:
            raise ValueError(f"--predictions: no '{kind}'; choose of {', '.join(PREDICTIONS)}")
    return kinds


class PredictionWriter:
    """Writes pictures' label maps, a file each, named by their ids."""

    def __init__(self, folder: epath.Path, kinds: Sequence[str]):
        """Writes into `png` and `rle` in a folder."""
        self.kinds = tuple(kinds)
        self._folders = {kind: folder / kind for kind in kinds}

    def __call__(self, id_: str, labels_hw: np.ndarray) -> None:
        """Writes one picture's label map."""
        for kind, folder in self._folders.items():
            path = folder / f"{id_}.{'png' if kind == 'png' else 'json'}"
            if kind == "png":
                write_label_png(path, labels_hw)
            else:
                content = json.dumps(prediction_json(labels_hw, id_))
                write_bytes(path, content.encode())


def write(
    folder: epath.Path,
    config: ConfigDict,
    result: Evaluation,
    dataset: str,
    settings: ConfigDict | None = None,
) -> str:
    """Writes an evaluation's tables, and gives what the screen shows.

    A part of an evaluation is marked as such, and does not replace a whole one's tables.

    Args:
        folder: gets report.json and, by vocabulary, NAME_classes.csv and NAME_confusion.npz, NAME
            without folders.
        config: the experiment.
        result: of the evaluation.
        dataset: that it was on.
        settings: of the evaluation; None for the experiment's own, `config.eval`.
    """
    rows = _rows(result)
    lines = [_table(rows), FOOTNOTE, *_notes(result), *_published(config, dataset)]
    if result.partial:
        lines.insert(0, f"PARTIAL: {result.pictures:,} of {result.of:,} pictures")
    if result.partial and _is_finished(folder):
        return "\n".join([*lines, f"not written: {folder} has a finished evaluation's tables"])
    for subset in result.subsets:
        _write_tables(folder, result, subset)
    content = {
        "dataset": dataset,
        "partial": result.partial,
        "pictures": result.pictures,
        "of": result.of,
        "scores": _json(rows),
        "oracles": _json(result.oracle_rows()),
        "confused": _pairs(result, result.subsets[0]),
        "published": _published(config, dataset),
        "settings": json.loads((settings or config.eval).to_json_best_effort()),
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_bytes(folder / REPORT, text.encode())
    return "\n".join([*lines, f"written: {folder}"])


def _rows(result: Evaluation) -> list[dict[str, Any]]:
    rows = []
    for subset in result.subsets:
        for method in result.methods(subset):
            scores = result.scores(method, subset)
            values = {name: getattr(scores, field) for name, field in COLUMNS.items()}
            rows.append({"vocabulary": subset.stem, "method": method} | values)
    return rows


def _is_finished(folder: epath.Path) -> bool:
    """Whether a folder has the tables of a finished evaluation."""
    path = folder / REPORT
    try:
        return path.exists() and not json.loads(path.read_text()).get("partial")
    except (ValueError, AttributeError):  # a damaged one is no loss
        return False


def _write_tables(folder: epath.Path, result: Evaluation, subset: Subset) -> None:
    method = result.shown
    confusion_cc = result.reported_confusion(method, subset)
    names, seen = subset.reported
    scores = scores_from_confusion(confusion_cc, seen)
    write_classes(folder / f"{subset.stem}_classes.csv", names, seen, scores, confusion_cc)
    write_confusion(folder / f"{subset.stem}_confusion.npz", confusion_cc, names, seen)


def _pairs(result: Evaluation, subset: Subset) -> list[dict[str, Any]]:
    confusion_cc = result.reported_confusion(result.shown, subset)
    return confused_pairs(confusion_cc, subset.reported[0])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of texts and fractions as aligned columns, fractions in percent."""
    texts = [list(rows[0])]
    texts += [[v if isinstance(v, str) else _percent(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row in texts:
        cells = [f"{x:<{w}}" for x, w in zip(row[:2], widths[:2], strict=True)]
        cells += [f"{x:>{w}}" for x, w in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _notes(result: Evaluation) -> list[str]:
    """Lines on what holds the result back, and on what is not in it."""
    subset, lines = result.subsets[0], []
    scores = result.scores(result.shown, subset)
    if scores.seen_absent or scores.unseen_absent:
        absent = f"{scores.seen_absent} seen, {scores.unseen_absent} unseen classes"
        lines.append(f"{absent} are not in the labels, and in no mean")
    for row in result.oracle_rows():
        numbers = ", ".join(f"{k} {_percent(v)}" for k, v in row.items() if k != "name")
        lines.append(f"{row['name']}: {numbers}")
    pairs = [
        f"{pair['label']} as {pair['prediction']} ({100 * pair['share']:.0f}%)"
        for pair in _pairs(result, subset)[:PAIRS_SHOWN]
    ]
    if pairs:
        lines.append(f"most confused by {result.shown}: {', '.join(pairs)}")
    return lines


def _published(config: ConfigDict, dataset: str) -> list[str]:
    """The published figures of this row, in words."""
    if config.model.kind != "zegformer" or config.model.backbone.kind != "resnet":
        return []
    names = {tuple(blocks): f"r{depth}" for depth, blocks in BLOCKS.items()}
    backbone = names.get(tuple(config.model.backbone.blocks), "")
    rows = published_rows(config.dataset.name, config.dataset.all_seen, backbone, dataset)
    lines = []
    for row in rows:
        numbers = {
            "seen": row.seen_iou,
            "unseen": row.unseen_iou,
            "harmonic": row.harmonic_iou,
            "mIoU": row.mean_iou,
        }
        known = ", ".join(f"{k} {100 * v:.1f}" for k, v in numbers.items() if v is not None)
        lines.append(f"published: {known} ({row.source})")
    return lines


def _percent(fraction: float) -> str:
    """Percent with one decimal, or "-" for what was not there to measure."""
    return "-" if np.isnan(fraction) else f"{100 * fraction:.1f}"


def _json(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as strict JSON has them, which knows no NaN: null for what was not there to measure."""
    return [
        {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]
