"""Tables of a report: the screen's, the summary that fits a terminal, and Markdown."""

import json
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from zegformer_jax.drawing.overlay import UNSEEN_MARK
from zegformer_jax.evaluation.metrics.confusion import COLUMNS
from zegformer_jax.evaluation.report.schema import Report, Row, Timing, plain

PAIRS_SHOWN = 5
SCREEN_COLUMNS = 100  # of notes below the table of an evaluation
HEADLINE_MARK = ">"
FOOTNOTE = """\
>: the headline, eval.scores in the first of eval.vocabularies
in %, mean IoU but for the last two; mIoU: over the classes in the labels; mIoU*: the older
definition, divided by the number of classes in labels or predictions; fwIoU: weighted by the
classes' pixels; accuracy: share of right pixels, mean over classes; pixels: over all pixels"""
SUMMARY_LINES, SUMMARY_COLUMNS = 24, 80  # a terminal's usual screen
NAME_WIDTH, SCORE_WIDTH = 32, 10  # columns of the summary
# The scores of the paper's tables, and their headings.
MAIN_SCORES = {
    "seen": "seen",
    "unseen": "unseen",
    "harmonic": "harmonic",
    "pixels": "pixel acc.",
}
_NO_BREAK = "\u00a0"


def screen(report: Report) -> str:
    """Returns what an evaluation shows on the screen."""
    headline = report.find(report.shown, report.headline)
    rows = [
        [
            f"{HEADLINE_MARK if row is headline else ' '} {row.vocabulary}",
            row.name,
            *(percent(row.values[name]) for name in COLUMNS),
        ]
        for row in report.scores
    ]
    table = _plain_table([["  vocabulary", "method", *COLUMNS], *rows], texts=2)
    notes = [textwrap.fill(note, SCREEN_COLUMNS, subsequent_indent="  ") for note in _notes(report)]
    lines = [table, FOOTNOTE, *notes]
    if report.partial:
        lines.insert(0, f"PARTIAL: {report.images:,} of {report.of:,} images")
    return "\n".join([*lines, *report.published])


def summary(report: Report) -> str:
    """Returns the main scores as text that fits a screen of 24 lines of 80 columns."""
    lines = [report.title, ""]
    for vocabulary in report.vocabularies:
        block = _summary_block(report, vocabulary)
        if len(lines) + len(block) <= SUMMARY_LINES - 4:
            lines += block
    timing = report.timing
    for heading, times in (
        ("time", timing.stage),
        ("a step", timing.step),
        ("an image", timing.image),
    ):
        # No-break spaces keep a time and its unit on one line.
        parts = [f"{k} {_seconds(x)}".replace(" ", _NO_BREAK) for k, x in times.items()]
        text = f"{heading}: " + ", ".join(parts)
        lines += textwrap.wrap(text, SUMMARY_COLUMNS, subsequent_indent="  ") if times else []
    return "\n".join(_cut(line).replace(_NO_BREAK, " ") for line in lines[:SUMMARY_LINES])


def markdown(report: Report) -> str:
    """Returns `report.md`."""
    parts = [f"# {report.title}", *_score_section(report), *_metric_section(report)]
    parts += [f"![{caption}]({file})\n\n{caption}" for file, caption in report.figures.items()]
    for place, vocabulary in enumerate(report.vocabularies):
        parts += _class_section(report, vocabulary, folded=place > 0)
    parts += _timing_section(report.timing)
    if report.settings:
        settings = json.dumps(plain(report.settings), indent=1)
        parts += ["## Settings", f"```json\n{settings}\n```"]
    return "\n\n".join(parts) + "\n"


def percent(fraction: float | None) -> str:
    """Returns a fraction as percent with one decimal; "-" if there was nothing to measure."""
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f}"


def _seconds(seconds: float) -> str:
    """Returns a duration with a unit that suits it."""
    if math.isnan(seconds):
        return "-"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _plain_table(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Returns aligned lines; the first few columns are texts, the others numbers."""
    return tabulate(lines, tablefmt="plain", **_columns(lines[0], texts))


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Returns a Markdown table; the first few columns are texts, the others numbers."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (headings, *rows)]
    return tabulate(lines[1:], lines[0], tablefmt="pipe", **_columns(headings, texts))


def _columns(headings: Sequence[str], texts: int) -> dict[str, Any]:
    """Returns the options of `tabulate` that keep cells as they are: texts left, numbers right."""
    alignment = ["left"] * texts + ["right"] * (len(headings) - texts)
    return {"colalign": alignment, "disable_numparse": True, "preserve_whitespace": True}


def _notes(report: Report) -> list[str]:
    """Returns lines on absent classes, on further metrics in the headline, and on confusions."""
    lines, seen = [], report.vocabularies[report.headline]
    row = report.find(report.shown, report.headline)
    absent = [seen[name] for name, iou in row.class_iou.items() if math.isnan(iou)]
    if absent:
        counts = f"{sum(absent)} seen, {len(absent) - sum(absent)} unseen classes"
        lines.append(f"{counts} are not in the labels, and in no mean")
    for row in report.metrics:
        if row.vocabulary == report.headline:
            values = ", ".join(f"{name} {percent(x)}" for name, x in row.values.items())
            lines.append(f"{row.name}: {values}")
    pairs = [
        f"{pair['label']} as {pair['prediction']} ({100 * pair['share']:.0f}%)"
        for pair in report.confused[:PAIRS_SHOWN]
    ]
    return [*lines, f"most confused by {report.shown}: {', '.join(pairs)}"] if pairs else lines


def _summary_block(report: Report, vocabulary: str) -> list[str]:
    """Returns the lines of a vocabulary's scores and of the first of its other metrics."""
    rows = [row for row in report.scores if row.vocabulary == vocabulary]
    rows += [row for row in report.metrics if row.vocabulary == vocabulary][:1]
    headings = [f"{_cut(vocabulary, NAME_WIDTH):<{NAME_WIDTH}}"]
    headings += [f"{heading:>{SCORE_WIDTH}}" for heading in MAIN_SCORES.values()]
    lines = [
        [_cut(f"  {row.name}", NAME_WIDTH), *(_score(row, name) for name in MAIN_SCORES)]
        for row in rows
    ]
    return [*_plain_table([headings, *lines]).splitlines(), ""]


def _score(row: Row | None, name: str) -> str:
    return percent(None if row is None else row.values.get(name))


def _score_section(report: Report) -> list[str]:
    """Returns the paper's table: a row for each method, four columns for each vocabulary."""
    names = list(dict.fromkeys(row.name for row in report.scores))
    headings, columns = ["method"], [names]
    for vocabulary in report.vocabularies:
        headings += [f"{vocabulary}: {heading}" for heading in MAIN_SCORES.values()]
        rows = [report.find(name, vocabulary) for name in names]
        columns += [_best_bold([_score(row, score) for row in rows]) for score in MAIN_SCORES]
    counts = [
        f"{vocabulary}: {sum(classes.values())} seen and "
        f"{len(classes) - sum(classes.values())} unseen classes"
        for vocabulary, classes in report.vocabularies.items()
    ]
    explanation = (
        "Mean IoU over seen and unseen classes, their harmonic mean, and pixel accuracy, in "
        f"percent; the best in bold. {'; '.join(counts)}."
    )
    table = _markdown_table(headings, list(zip(*columns, strict=True)))
    return ["## Zero-shot segmentation", explanation, table]


def _best_bold(texts: Sequence[str]) -> list[str]:
    """Returns a column of percentages with the best in bold, if there are several."""
    measured = [text for text in texts if text != "-"]
    best = max(measured, key=float) if len(measured) > 1 else None
    return [f"**{text}**" if text == best else text for text in texts]


def _metric_section(report: Report) -> list[str]:
    """Returns the table of all metrics that are no scores of a method."""
    if not report.metrics:
        return []
    names = list(dict.fromkeys(name for row in report.metrics for name in row.values))
    rows = [
        [row.name, row.vocabulary, *(_score(row, name) for name in names)] for row in report.metrics
    ]
    explanation = (
        "What each half of the method reaches, in percent. Segments that fit best: mean over the "
        "labelled regions, whatever class the segments are given. The other rows: mean IoU."
    )
    table = _markdown_table(["metric", "vocabulary", *names], rows, texts=2)
    return ["## Segments and names apart", explanation, table]


def _class_section(report: Report, vocabulary: str, folded: bool) -> list[str]:
    """Returns the IoU of every class of a vocabulary, seen classes first."""
    scores = [row for row in report.scores if row.vocabulary == vocabulary]
    if not scores:
        return []
    classes = sorted(report.vocabularies[vocabulary].items(), key=lambda item: not item[1])
    rows = [
        [
            name if seen else f"{name} {UNSEEN_MARK}",
            *(percent(row.class_iou[name]) for row in scores),
        ]
        for name, seen in classes
    ]
    table = _markdown_table(["class", *(row.name for row in scores)], rows)
    if folded:
        table = f"<details><summary>{len(rows)} classes</summary>\n\n{table}\n\n</details>"
    note = f"In percent; {UNSEEN_MARK} unseen in training, - not in the labels."
    return [f"## IoU per class: {vocabulary}", note, table]


def _timing_section(timing: Timing) -> list[str]:
    """Returns the table of times, if there are any."""
    rows = [[f"one training step, {name}", _seconds(x)] for name, x in timing.step.items()]
    rows += [[f"one image, {name}", _seconds(x)] for name, x in timing.image.items()]
    rows += [[f"stage: {name}", _seconds(x)] for name, x in timing.stage.items()]
    return ["## Times", _markdown_table(["what", "time"], rows)] if rows else []


def _cut(text: str, width: int = SUMMARY_COLUMNS) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
