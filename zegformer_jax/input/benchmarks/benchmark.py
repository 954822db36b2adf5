"""What every data set that can be prepared gives: where its records are, and how to read one."""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zegformer_jax.runtime.assets import DATA
from zegformer_jax.text.vocabulary import Vocabulary


class Example(NamedTuple):
    """Where one record's files are.

    Attributes:
      id: unique within the split, such as "2007_000032".
      image: the picture's file.
      label: the annotation's file.
    """

    id: str
    image: Path
    label: Path


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark(abc.ABC):
    """Reads a data set's own files.

    Attributes:
      name: such as "pascal_voc".
      vocabulary: the name of its vocabulary under `data/vocabularies`, such as "pascal_voc_20".
      counts: the official number of records by split, of "train" and "validation" those there are.
      guide: which archives are needed, where to get them, how the unpacked folder looks.
    """

    name: str
    vocabulary: str
    counts: Mapping[str, int]
    guide: str

    def load_vocabulary(self) -> Vocabulary:
        """Reads the vocabulary; raises as `Vocabulary.load`."""
        return Vocabulary.load(DATA / "vocabularies" / f"{self.vocabulary}.json")

    def label_vocabulary(self) -> Vocabulary:
        """The classes that labels tell apart, to count and to show: all of the vocabulary."""
        return self.load_vocabulary()

    @property
    def merged_names(self) -> tuple[str, ...]:
        """Names of the classes that are evaluated if several count as one; else none."""
        return ()

    def merge_table(self) -> np.ndarray:
        """Returns the table from labels to the classes that are evaluated."""
        return np.arange(self.load_vocabulary().ignore_label + 1)

    @abc.abstractmethod
    def examples(self, source: Path, split: str) -> list[Example]:
        """Lists a split's records, sorted by id; opens no picture.

        Args:
          source: the folder in which the archives were unpacked.
          split: a key of `counts`.

        Raises:
          FileNotFoundError: a folder or list is missing; the message names it, and the archive
            that holds it with its address. Single files that are missing are found by `read`.
          ValueError: there is no such split, or a list is not what it should be.
        """

    @abc.abstractmethod
    def read(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Reads a record.

        Returns:
          image uint8 RGB [h, w, 3]; label uint8 or uint16 [h, w] in the vocabulary's order
          0..C-1, unseen classes included, or its ignore label.

        Raises:
          FileNotFoundError: a file is missing; the message starts with its path.
          ValueError: a file is truncated or not what it should be, the label has another size than
            the image, or an id that is neither a class nor one of those known to be ignored; the
            message starts with the path.
        """

    @abc.abstractmethod
    def encoded_image(self, example: Example) -> bytes | None:
        """The picture's own bytes where they may be stored as they are, else None.

        They may where `read` gives their pixels unchanged and `decoding.is_storable` says so.

        Raises:
          FileNotFoundError: the file is missing; the message starts with its path.
          ValueError: it is not a picture; the message starts with its path.
        """
