"""Summary of prepared records: pixel counts as a table, and a sheet of labelled images."""

import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from zegformer_jax.input.benchmarks import FOLDER
from zegformer_jax.input.label_counts import LabelCounts, describe_fault
from zegformer_jax.input.records.shard import BadRecord, Contents
from zegformer_jax.text.vocabulary import Vocabulary

SHEET_RECORDS = 12
SHEET_COLUMNS = 2  # of records: an image and its labels each


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """Counts of a prepared split.

    Attributes:
        records: Number of records.
        pictures: int64 [C], number of records that show a class.
        pixels: int64 [C], number of pixels of a class.
        ignored: Number of pixels without a label.
    """

    records: int
    pictures: np.ndarray
    pixels: np.ndarray
    ignored: int

    @classmethod
    def of(cls, parts: Sequence[Contents]) -> "SplitCounts":
        """Adds up the contents of a split's shards."""
        pixels = np.sum([part.pixels for part in parts], axis=0)
        shown = [classes for part in parts for classes in part.classes]
        pictures = np.bincount(list(itertools.chain(*shown)), minlength=len(pixels))
        ignored = sum(part.ignored for part in parts)
        return cls(records=len(shown), pictures=pictures, pixels=pixels, ignored=ignored)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        fields = dataclasses.asdict(self)
        return {name: np.asarray(value).tolist() for name, value in fields.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "SplitCounts":
        """Reads the values of `to_json`."""
        arrays = {name: np.array(content[name], np.int64) for name in ("pictures", "pixels")}
        return cls(records=content["records"], ignored=content["ignored"], **arrays)


@dataclasses.dataclass(frozen=True)
class Report:
    """Report of a preparation.

    Attributes:
        name: Name of the data set.
        directory: Directory that holds the records.
        vocabulary: Classes that the labels distinguish.
        splits: Counts by split.
        left_out: Bad records, which are not counted.
    """

    name: str
    directory: str
    vocabulary: Vocabulary
    splits: Mapping[str, SplitCounts]
    left_out: Sequence[BadRecord]

    def faults(self) -> list[str]:
        """Returns a line for each split of a user's folder whose labels look wrong."""
        if self.name != FOLDER:
            return []
        classes, lines = self.vocabulary, []
        for split, held in self.splits.items():
            wanted = classes.seen_indices if split == "train" else range(len(classes))
            fault = describe_fault(LabelCounts(held.pixels, held.ignored), classes, wanted)
            lines += [f"{split}: {fault}"] if fault else []
        return lines

    def table(self) -> str:
        """Returns one line per class: seen or unseen, its images and pixels in each split."""
        counts, seen = list(self.splits.values()), np.array(self.vocabulary.seen)
        kinds = ["seen" if flag else "unseen" for flag in seen]
        rows = [
            [name.split(",")[0], kind, *_cells([(x.pictures[i], x.pixels[i]) for x in counts])]
            for i, (name, kind) in enumerate(zip(self.vocabulary.names, kinds, strict=True))
        ]
        for kind, chosen in (("seen", seen), ("unseen", ~seen)):
            sums = _cells([(None, x.pixels[: len(seen)][chosen].sum()) for x in counts])
            rows.append([f"{np.count_nonzero(chosen)} classes", kind, *sums])
        rows.append(["no label", "", *_cells([(None, x.ignored) for x in counts])])
        rows.append(["records", "", *_cells([(x.records, None) for x in counts])])
        heads = [head for split in self.splits for head in (f"{split}: images", "pixels")]
        return _aligned([["class", "", *heads], *rows])


def _cells(pairs: Sequence[tuple[int | None, int | None]]) -> list[str]:
    return ["" if number is None else f"{number:,}" for pair in pairs for number in pair]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns: two of words, the others of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{x:<{w}}" for x, w in zip(row[:2], widths[:2], strict=True)]
        cells += [f"{x:>{w}}" for x, w in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def draw_sheet(sources: Sequence[Any], vocabulary: Vocabulary) -> bytes:
    """Draws the images and labels of twelve records, evenly spread over the sources.

    Args:
        sources: Splits, each a `zegformer_jax.input.datasets.Source`.
        vocabulary: Vocabulary of the labels.

    Returns:
        The content of a PNG file.
    """
    from zegformer_jax.drawing.sheet import sheet

    records = []
    for source, count in zip(sources, _shares([len(x) for x in sources]), strict=True):
        places = np.linspace(0, len(source) - 1, count).round().astype(int)
        records += [source[int(place)] for place in places]
    rows = [(record["image"], record["label"].astype(np.int32)) for record in records]
    height = -(-len(rows) // SHEET_COLUMNS)
    columns = [
        sheet(
            rows[start : start + height],
            vocabulary.names,
            seen=vocabulary.seen,
            titles=("image", "labels"),
            ignore=vocabulary.ignore_label,
        )
        for start in range(0, len(rows), height)
    ]
    size = sum(column.width for column in columns), max(column.height for column in columns)
    page = Image.new("RGB", size, (255, 255, 255))
    for place, column in enumerate(columns):
        page.paste(column, (place * columns[0].width, 0))
    file = io.BytesIO()
    page.save(file, "png")
    return file.getvalue()


def _shares(sizes: Sequence[int]) -> list[int]:
    """Divides the sheet's records evenly among splits, as far as each has enough."""
    shares = [0] * len(sizes)
    for _ in range(min(SHEET_RECORDS, sum(sizes))):
        free = [i for i, size in enumerate(sizes) if shares[i] < size]
        shares[min(free, key=lambda i: shares[i])] += 1
    return shares
