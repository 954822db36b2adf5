"""What every data set that can be prepared gives: where its records are, and how to read one."""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zegformer_jax.text.vocabulary import Vocabulary, load_vocabulary


class Example(NamedTuple):
    """Where one record's files are.

    Attributes:
        id: Unique within the split, such as "2007_000032".
        image: The picture's file.
        label: The annotation's file.
    """

    id: str
    image: Path
    label: Path


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark(abc.ABC):
    """Reads a data set's own files.

    Attributes:
        name: Such as "pascal_voc".
        vocabulary: The name of its vocabulary under `data/vocabularies`, such as "pascal_voc_20".
        counts: The official number of records by split, `train` or `validation`.
        guide: Which archives are needed, where to get them, how the unpacked folder looks.
    """

    name: str
    vocabulary: str
    counts: Mapping[str, int]
    guide: str

    def load_vocabulary(self) -> Vocabulary:
        """Reads the vocabulary; see `vocabulary.load_vocabulary`."""
        return load_vocabulary(self.vocabulary)

    def label_vocabulary(self) -> Vocabulary:
        """The classes that labels tell apart, to count and to show: all of the vocabulary."""
        return self.load_vocabulary()

    @property
    def merged_names(self) -> tuple[str, ...] | None:
        """Names of the classes that are evaluated if several count as one, else None."""
        return None

    def merge_table(self) -> np.ndarray | None:
        """Returns the table from labels to indices in `merged_names`; None without merging."""
        return None

    @abc.abstractmethod
    def examples(self, source: Path, split: str) -> list[Example]:
        """Lists a split's records, sorted by id; opens no picture.

        Args:
            source: The folder in which the archives were unpacked.
            split: A key of `counts`.

        Raises:
            FileNotFoundError: A folder or list is missing; the message names it, and the archive
                that holds it with its address. Single files that are missing are found by `read`.
            ValueError: There is no such split, or a list is not what it should be.
        """

    @abc.abstractmethod
    def read(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Reads a record.

        Returns:
            image uint8 RGB [h, w, 3]; label uint8 or uint16 [h, w] in the vocabulary's order
            0..C-1, unseen classes included, or its ignore label.

        Raises:
            FileNotFoundError: A file is missing; the message starts with its path.
            ValueError: A file is truncated or not what it should be, the label has another size
                than the image, or an id is neither a class nor known to be ignored; the
                message starts with the path.
        """

    @abc.abstractmethod
    def encoded_image(self, example: Example) -> bytes | None:
        """The picture's own bytes where they may be stored as they are, else None.

        They may where `read` gives their pixels unchanged and `decoding.is_storable` says so.

        Raises:
            FileNotFoundError: The file is missing; the message starts with its path.
            ValueError: It is not a picture; the message starts with its path.
        """
