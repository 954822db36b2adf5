"""The common part of the published benchmarks: archives, guides and checks of records."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zegformer_jax.input import decoding
from zegformer_jax.input.benchmarks import files
from zegformer_jax.input.benchmarks.benchmark import Benchmark, Example
from zegformer_jax.runtime.assets import DATA
from zegformer_jax.runtime.errors import UserError

TRAIN, VALIDATION = "train", "validation"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Published(Benchmark):
    """Reads the unpacked official archives of a published benchmark.

    Attributes:
        guide: Text made of the archives and the advice.
        archives: The official archives.
        advice: Text that tells which archives are needed, and peculiarities of the data set.
        lists: Folder of the lists of ids that come with this program.
    """

    guide: str = dataclasses.field(init=False)
    archives: Sequence[files.Archive]
    advice: str
    lists: Path = DATA / "splits"

    def __post_init__(self):
        """Writes the guide."""
        lines = [f"{self.name}: unpack these archives in one folder. {self.advice}"]
        for archive in self.archives:
            lines += [f"  {archive.file}", f"    from {archive.address}"]
            lines += [f"    gives {path}" for path in archive.gives]
        object.__setattr__(self, "guide", "\n".join(lines))  # the class is frozen

    def examples(self, source: Path, split: str) -> list[Example]:
        """Lists a split's records; see `Benchmark.examples`."""
        if split not in self.counts:
            raise UserError(f"{self.name} has no split {split!r}, but {', '.join(self.counts)}")
        return sorted(self._list(Path(source), split))

    def read(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Reads a record; see `Benchmark.read`."""
        image_hw3 = decoding.decode_image(decoding.read_file(example.image), example.image)
        label_hw = self._read_label(example)
        if label_hw.shape != image_hw3.shape[:2]:
            sizes = f"{_size(label_hw)} pixels, but {example.image} has {_size(image_hw3)}"
            raise UserError(f"{example.label}: the label of {example.id} has {sizes}")
        return image_hw3, label_hw

    def encoded_image(self, example: Example) -> bytes | None:
        """Returns the image file's bytes if they may be stored; see `Benchmark.encoded_image`."""
        data = decoding.read_file(example.image)
        return data if decoding.is_storable(data, example.image) else None

    @abc.abstractmethod
    def _list(self, source: Path, split: str) -> list[Example]:
        """Lists the records of a split that exists; see `examples`."""

    def _read_label(self, example: Example) -> np.ndarray:
        """Reads a label; see `read`."""
        ids_hw = self._read_ids(example.label)
        return files.map_ids(ids_hw, self._table, example.label, self._label_dtype)

    def _read_ids(self, path: Path) -> np.ndarray:
        """Reads an annotation's ids, integers [h, w]; by default from a label image."""
        return files.read_ids(path)

    @property
    @abc.abstractmethod
    def _table(self) -> np.ndarray:
        """The table from annotations' ids to labels; see `files.label_table`."""

    @functools.cached_property
    def _label_dtype(self) -> np.dtype:
        return self.load_vocabulary().label_dtype


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
