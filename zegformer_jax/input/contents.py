"""What prepared records hold: pixel counts as a table, and a sheet of labelled pictures."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from zegformer_jax.input.shards import BadRecord, Note
from zegformer_jax.vocabulary import Vocabulary

SHEET_RECORDS = 12
SHEET_COLUMNS = 2  # of records: a picture and its labels each


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """What a prepared split holds.

    Attributes:
      records: how many.
      pictures: int64 [C], records that show a class.
      pixels: int64 [C], pixels of a class.
      ignored: pixels without a label.
    """

    records: int
    pictures: np.ndarray
    pixels: np.ndarray
    ignored: int

    @classmethod
    def of(cls, notes: Sequence[Note]) -> "SplitCounts":
        """Adds up the notes of a split's shards."""
        pixels = np.sum([note.pixels for note in notes], axis=0)
        shown_nc = np.unpackbits(np.concatenate([note.classes for note in notes]), axis=1)
        return cls(
            records=len(shown_nc),
            pictures=shown_nc[:, : len(pixels)].sum(0, dtype=np.int64),
            pixels=pixels,
            ignored=int(sum(note.ignored for note in notes)),
        )

    def to_json(self) -> dict[str, Any]:
        """Gives what `from_json` takes."""
        fields = dataclasses.asdict(self)
        return {name: np.asarray(value).tolist() for name, value in fields.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "SplitCounts":
        """Takes what `to_json` gave."""
        arrays = {name: np.array(content[name], np.int64) for name in ("pictures", "pixels")}
        return cls(records=content["records"], ignored=content["ignored"], **arrays)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was prepared.

    Attributes:
      name: of the data set.
      directory: where it lies.
      vocabulary: the classes that the labels tell apart.
      splits: what each holds.
      left_out: bad records that are not among them.
    """

    name: str
    directory: str
    vocabulary: Vocabulary
    splits: Mapping[str, SplitCounts]
    left_out: Sequence[BadRecord]

    def table(self) -> str:
        """Gives a line a class: seen or unseen, its pictures and its pixels in each split."""
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
        heads = [head for split in self.splits for head in (f"{split}: pictures", "pixels")]
        return _aligned([["class", "", *heads], *rows])


def _cells(pairs: Sequence[tuple[int | None, int | None]]) -> list[str]:
    return ["" if number is None else f"{number:,}" for pair in pairs for number in pair]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need: two of words, then numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{x:<{w}}" for x, w in zip(row[:2], widths[:2], strict=True)]
        cells += [f"{x:>{w}}" for x, w in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def draw_sheet(sources: Sequence[Any], vocabulary: Vocabulary) -> bytes:
    """Draws twelve records, as many of each source, at even distances: pictures and labels.

    Args:
      sources: each a `zegformer_jax.input.datasets.Source`, the splits.
      vocabulary: of the labels.

    Returns:
      A PNG file's content.
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
            titles=("picture", "labels"),
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
    """Divides the sheet's records evenly among splits, as far as each has as many."""
    shares = [0] * len(sizes)
    for _ in range(min(SHEET_RECORDS, sum(sizes))):
        free = [i for i, size in enumerate(sizes) if shares[i] < size]
        shares[min(free, key=lambda i: shares[i])] += 1
    return shares
