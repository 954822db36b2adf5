"""The one schema of a report: `report.json`, and what the tables are made of.

Scores are fractions in [0, 1], NaN where there is nothing to measure and null in JSON.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zegformer_jax.evaluation.evaluation import Evaluation
from zegformer_jax.evaluation.metrics.confusion import Confusion, confused_pairs


@dataclasses.dataclass(frozen=True)
class Row:
    """Report of one metric.

    Attributes:
        name: Name of the metric: a way of scoring, or what else is measured.
        vocabulary: Name of its vocabulary.
        values: Scores by name.
        class_iou: IoU of each class by name, NaN for classes that are not in the labels; empty for
            metrics without classes.
        class_accuracy: Recall of each class by name.
    """

    name: str
    vocabulary: str
    values: Mapping[str, float]
    class_iou: Mapping[str, float] = dataclasses.field(default_factory=dict)
    class_accuracy: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall-clock times in seconds, by name.

    Attributes:
        step: Times of a training step.
        image: Times of an image.
        stage: Times of the stages of a whole run.
    """

    step: Mapping[str, float] = dataclasses.field(default_factory=dict)
    image: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stage: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that a report says.

    Attributes:
        title: One line.
        images: Number of images that were counted.
        of: Number of images in the data set; more if the evaluation was interrupted.
        vocabularies: For each vocabulary its classes with their seen flags; the first one is the
            headline.
        scores: Rows of the table of scores, one for each way of scoring and vocabulary.
        metrics: Rows of all other metrics.
        shown: The way of scoring of `confused`.
        confused: The classes that are confused most, see `metrics.confusion.confused_pairs`.
        published: Lines with published figures.
        timing: Times.
        model: Origin of the weights: workdir or file, step, and whether the training is finished.
        data: Directory of the data set.
        settings: What was run; nested mappings are fine.
        losses: Training losses, as `drawing.curves.loss_curves` takes them.
        figures: Captions of the images beside the report, by file name.

    Raises:
        ValueError: A row's vocabulary or classes are not among the report's, or two rows of scores
            are of the same way of scoring and vocabulary.
    """

    title: str
    images: int
    of: int
    vocabularies: Mapping[str, Mapping[str, bool]]
    scores: Sequence[Row]
    metrics: Sequence[Row] = ()
    shown: str = ""
    confused: Sequence[Mapping[str, Any]] = ()
    published: Sequence[str] = ()
    timing: Timing = Timing()
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]] = dataclasses.field(
        default_factory=dict
    )
    figures: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for row in self.scores:
            if row.vocabulary not in self.vocabularies:
                known = ", ".join(self.vocabularies)
                raise ValueError(
                    f"{row.name} is scored on '{row.vocabulary}', which is none of the report's "
                    f"vocabularies: {known}"
                )
            if self.find(row.name, row.vocabulary) is not row:
                raise ValueError(f"{row.name} is scored twice on '{row.vocabulary}'")
            if set(row.class_iou) != set(self.vocabularies[row.vocabulary]):
                raise ValueError(
                    f"{row.name}: the classes of its IoUs are not those of '{row.vocabulary}'"
                )

    @property
    def partial(self) -> bool:
        """True if images are missing, as after an interruption."""
        return self.images < self.of

    @property
    def headline(self) -> str:
        """Name of the first vocabulary."""
        return next(iter(self.vocabularies))

    def find(self, name: str, vocabulary: str) -> Row | None:
        """Returns the scores of a way of scoring in a vocabulary; None if there are none."""
        rows = (x for x in self.scores if (x.name, x.vocabulary) == (name, vocabulary))
        return next(rows, None)

    def to_json(self) -> str:
        """Returns strict JSON."""
        content = {"title": self.title, "partial": self.partial} | dataclasses.asdict(self)
        for rows in (content["scores"], content["metrics"]):
            for row in rows:
                row |= row.pop("values")
        return json.dumps(plain(content), indent=1, allow_nan=False) + "\n"


def describe(evaluation: Evaluation, title: str, **more: Any) -> Report:
    """Returns the report of an evaluation.

    Args:
        evaluation: The evaluation.
        title: Title of the report.
        **more: Further fields of `Report`.
    """
    rows = {key: _row(metric, evaluation.states[key]) for key, metric in evaluation.metrics.items()}
    is_score = {key: isinstance(x, Confusion) for key, x in evaluation.metrics.items()}
    shown, state = evaluation.shown()[0]
    return Report(
        title=title,
        images=evaluation.images,
        of=evaluation.of,
        vocabularies={subset.stem: subset.reported for subset in evaluation.plan.subsets},
        scores=[row for key, row in rows.items() if is_score[key]],
        metrics=[row for key, row in rows.items() if not is_score[key]],
        shown=shown.name,
        confused=confused_pairs(shown.matrix(state), list(shown.subset.reported)),
        **more,
    )


def _row(metric: Any, state: Any) -> Row:
    row = Row(metric.name, metric.vocabulary, metric.report(state))
    if not isinstance(metric, Confusion):
        return row
    scores, names = metric.scores(state), metric.subset.reported
    return dataclasses.replace(
        row,
        class_iou=dict(zip(names, scores.iou_c.tolist(), strict=True)),
        class_accuracy=dict(zip(names, scores.accuracy_c.tolist(), strict=True)),
    )


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: NumPy's numbers as Python's, null for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
