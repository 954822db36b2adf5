"""The report of an evaluation: tables as JSON, Markdown and text, and the loss curves.

Plain data in, files out; no jax here. Scores are fractions in [0, 1], NaN where there was nothing
to measure: null in JSON, "-" in tables, which show percent.
"""

import dataclasses
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zegformer_jax.drawing.overlay import UNSEEN_MARK

SUMMARY_LINES, SUMMARY_COLUMNS = 24, 80  # A terminal's usual screen.
_NO_BREAK = "\u00a0"
_SCORES = ("seen", "unseen", "harmonic", "pixel_accuracy")
_HEADINGS = ("seen", "unseen", "harmonic", "pixel acc.")


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """Scores of one method on one vocabulary, fractions in [0, 1] or NaN.

    Attributes:
        name: of the method, such as "ZegFormer".
        vocabulary: name of the vocabulary, a key of ``Report.vocabularies``.
        seen: mean IoU over the seen classes.
        unseen: mean IoU over the unseen classes.
        harmonic: harmonic mean of the two, the headline.
        pixel_accuracy: share of labelled pixels that are right.
        iou: IoU of each class of the vocabulary, by name; NaN where it is not in the labels.
        others: further scores by name, for report.json.
    """

    name: str
    vocabulary: str
    seen: float
    unseen: float
    harmonic: float
    pixel_accuracy: float
    iou: Mapping[str, float]
    others: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_scores(
        cls, name: str, vocabulary: str, classes: Sequence[str], scores: Any
    ) -> "MethodResult":
        """Takes over a ``metrics.Scores`` of the classes; what the table leaves out is in others.

        Raises:
            ValueError: if there are more or fewer classes than IoUs.
        """
        values = dataclasses.asdict(scores)
        iou_c, accuracy_c = values.pop("iou_c"), values.pop("accuracy_c")
        if len(iou_c) != len(classes):
            raise ValueError(f"{name}: {len(iou_c)} IoUs for {len(classes)} classes")
        return cls(
            name=name,
            vocabulary=vocabulary,
            seen=values.pop("seen_iou"),
            unseen=values.pop("unseen_iou"),
            harmonic=values.pop("harmonic_iou"),
            pixel_accuracy=values.pop("pixel_accuracy"),
            iou=dict(zip(classes, map(float, iou_c), strict=True)),
            others=values
            | {f"accuracy/{c}": float(a) for c, a in zip(classes, accuracy_c, strict=True)},
        )


@dataclasses.dataclass(frozen=True)
class SegmentFit:
    """How well segments fit the labelled regions, whatever class they are given.

    Attributes:
        vocabulary: name of the vocabulary, a key of ``Report.vocabularies``.
        seen: best-overlap IoU, mean over the regions of seen classes, in [0, 1] or NaN.
        unseen: the same over the regions of unseen classes.
    """

    vocabulary: str
    seen: float
    unseen: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall-clock times in seconds, by name.

    Attributes:
        step: of one training step, for each stage of the training.
        image: of one image, for each method.
        stage: of each stage of the whole run.
    """

    step: Mapping[str, float] = dataclasses.field(default_factory=dict)
    image: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stage: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a report says.

    Attributes:
        title: one line.
        vocabularies: for each vocabulary its classes, and whether each was seen in training; the
            first one is the headline.
        methods: scores, one for each method and vocabulary, in the order of the table's rows.
        segment_fit: one for each vocabulary it was measured on.
        timing: times.
        settings: what was run: seed, sizes, steps, device, versions. Nested mappings are fine.
        losses: training losses as ``loss_curves`` takes them.
        pictures: captions by file name, for the pictures beside the report.
    """

    title: str
    vocabularies: Mapping[str, Mapping[str, bool]]
    methods: Sequence[MethodResult]
    segment_fit: Sequence[SegmentFit] = ()
    timing: Timing = Timing()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]] = dataclasses.field(
        default_factory=dict
    )
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        rows = [(method.name, method.vocabulary) for method in self.methods]
        for method in self.methods:
            if method.vocabulary not in self.vocabularies:
                raise ValueError(
                    f"{method.name} is scored on {method.vocabulary!r}, which is none of the "
                    f"report's vocabularies: {', '.join(self.vocabularies)}"
                )
            if rows.count((method.name, method.vocabulary)) > 1:
                raise ValueError(f"{method.name} is scored twice on {method.vocabulary!r}")
            if set(method.iou) != set(self.vocabularies[method.vocabulary]):
                raise ValueError(
                    f"{method.name}: the classes of its IoUs are not those of {method.vocabulary!r}"
                )

    def find(self, name: str, vocabulary: str) -> MethodResult | None:
        """Gives a method's scores on a vocabulary, or None where it has none."""
        for method in self.methods:
            if (method.name, method.vocabulary) == (name, vocabulary):
                return method
        return None

    @property
    def method_names(self) -> list[str]:
        """Gives the names of the methods, each once, in the order of the table's rows."""
        return list(dict.fromkeys(method.name for method in self.methods))


def write_report(directory: str | os.PathLike[str], report: Report) -> None:
    """Writes report.json (everything) and report.md (tables) into a directory, made if missing."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(dataclasses.asdict(report)), indent=1, allow_nan=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    (directory / "report.md").write_text(_markdown(report), encoding="utf-8")


def _plain(value: Any) -> Any:
    """Turns a value into what JSON has: NumPy's numbers into Python's, NaN and infinity to null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _percent(fraction: float | None) -> str:
    """Writes a fraction as percent with one decimal, or "-" for what was not measured."""
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f}"


def _seconds(seconds: float) -> str:
    """Writes a duration with a unit that suits it."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _markdown(report: Report) -> str:
    """Writes the whole of report.md."""
    parts = [f"# {report.title}", *_score_section(report)]
    if report.segment_fit:
        rows = [
            [fit.vocabulary, _percent(fit.seen), _percent(fit.unseen)] for fit in report.segment_fit
        ]
        parts += [
            "## Segments alone",
            "Best-overlap IoU of the segments with the labelled regions, whatever class they are "
            "given; mean, in percent.",
            _table(["vocabulary", "seen", "unseen"], rows),
        ]
    parts += [f"![{caption}]({file})\n\n{caption}" for file, caption in report.pictures.items()]
    for place, vocabulary in enumerate(report.vocabularies):
        parts += _class_section(report, vocabulary, folded=place > 0)
    parts += _timing_section(report.timing)
    if report.settings:
        settings = json.dumps(_plain(report.settings), indent=1)
        parts += ["## Settings", f"```json\n{settings}\n```"]
    return "\n\n".join(parts) + "\n"


def _score_section(report: Report) -> list[str]:
    """Writes the paper's table: a row for each method, four columns for each vocabulary."""
    headings = ["method"]
    for vocabulary in report.vocabularies:
        headings += [f"{vocabulary}: {heading}" for heading in _HEADINGS]
    columns = [
        [_score(report.find(name, vocabulary), score) for name in report.method_names]
        for vocabulary in report.vocabularies
        for score in _SCORES
    ]
    rows = [list(row) for row in zip(report.method_names, *map(_best_bold, columns), strict=True)]
    counts = [
        f"{vocabulary}: {sum(classes.values())} seen and "
        f"{len(classes) - sum(classes.values())} unseen classes"
        for vocabulary, classes in report.vocabularies.items()
    ]
    explanation = (
        "Mean IoU over seen and unseen classes, their harmonic mean, and pixel accuracy, in "
        f"percent; the best in bold. {'; '.join(counts)}."
    )
    return ["## Zero-shot segmentation", explanation, _table(headings, rows)]


def _score(method: MethodResult | None, score: str) -> float | None:
    return None if method is None else getattr(method, score)


def _best_bold(values: Sequence[float | None]) -> list[str]:
    """Writes a column of fractions, the best in bold."""
    measured = [value for value in values if value is not None and not math.isnan(value)]
    texts = [_percent(value) for value in values]
    best = _percent(max(measured)) if len(measured) > 1 else None
    return [f"**{text}**" if text == best else text for text in texts]


def _class_section(report: Report, vocabulary: str, folded: bool) -> list[str]:
    """Writes the IoU of every class of a vocabulary, seen classes first."""
    methods = [method for method in report.methods if method.vocabulary == vocabulary]
    if not methods:
        return []
    classes = sorted(report.vocabularies[vocabulary].items(), key=lambda item: not item[1])
    rows = [
        [name if seen else f"{name} {UNSEEN_MARK}", *(_percent(m.iou[name]) for m in methods)]
        for name, seen in classes
    ]
    table = _table(["class", *(method.name for method in methods)], rows)
    if folded:
        table = f"<details><summary>{len(rows)} classes</summary>\n\n{table}\n\n</details>"
    note = f"In percent; {UNSEEN_MARK} unseen in training, - not in the labels."
    return [f"## IoU per class: {vocabulary}", note, table]


def _timing_section(timing: Timing) -> list[str]:
    """Writes the times there are."""
    kinds = ("training step", timing.step), ("image", timing.image), ("stage", timing.stage)
    rows = [
        [f"one {kind}, {name}" if kind != "stage" else f"stage: {name}", _seconds(seconds)]
        for kind, times in kinds
        for name, seconds in times.items()
    ]
    return ["## Times", _table(["what", "time"], rows)] if rows else []


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = [headings, rule, *rows]
    return "\n".join(
        f"| {' | '.join(str(c).replace('|', chr(92) + '|') for c in line)} |" for line in lines
    )


def summary(report: Report) -> str:
    """Gives the report's main numbers as text that fits a screen of 24 lines of 80 columns."""
    lines = [report.title, ""]
    fits = {fit.vocabulary: fit for fit in report.segment_fit}
    for vocabulary in report.vocabularies:
        block = _summary_block(report, vocabulary, fits.get(vocabulary))
        if len(lines) + len(block) <= SUMMARY_LINES - 4:
            lines += block
    timing = report.timing
    for heading, times in (
        ("time", timing.stage),
        ("a step", timing.step),
        ("an image", timing.image),
    ):
        text = f"{heading}: " + ", ".join(f"{name} {_unbroken(t)}" for name, t in times.items())
        lines += textwrap.wrap(text, SUMMARY_COLUMNS, subsequent_indent="  ") if times else []
    return "\n".join(_cut(line).replace(_NO_BREAK, " ") for line in lines[:SUMMARY_LINES])


def _unbroken(seconds: float) -> str:
    """Writes a duration that textwrap leaves on one line."""
    return _seconds(seconds).replace(" ", _NO_BREAK)


def _summary_block(report: Report, vocabulary: str, fit: SegmentFit | None) -> list[str]:
    """Writes one vocabulary's scores as aligned text."""
    width = SUMMARY_COLUMNS - 12 * len(_HEADINGS)
    lines = [f"{_cut(vocabulary, width):<{width}}" + "".join(f"{h:>12}" for h in _HEADINGS)]
    for name in report.method_names:
        method = report.find(name, vocabulary)
        if method is not None:
            scores = "".join(f"{_percent(_score(method, score)):>12}" for score in _SCORES)
            lines.append(f"{_cut('  ' + name, width):<{width}}{scores}")
    if fit is not None:
        lines.append(
            f"{'  segments alone':<{width}}{_percent(fit.seen):>12}{_percent(fit.unseen):>12}"
            "   (best-overlap IoU)"
        )
    return [*lines, ""]


def _cut(text: str, width: int = SUMMARY_COLUMNS) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
