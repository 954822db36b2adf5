"""The interface of a data set that can be prepared."""

import abc
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zegformer_jax.input.unknown import Value
from zegformer_jax.text.vocabulary import Vocabulary, load_vocabulary


class Example(NamedTuple):
    """Files of one record.

    Attributes:
        id: Id, unique within the split, such as "2007_000032".
        image: The image file.
        label: The annotation file.
    """

    id: str
    image: Path
    label: Path


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark(abc.ABC):
    """Lists and reads a data set's original files.

    Attributes:
        name: Name of the data set, such as `pascal_voc`.
        vocabulary: Name of its vocabulary in `data/vocabularies`, or the path of a `.json` file.
        counts: Official number of records by split, `train` or `validation`.
        guide: Text that names the archives, their addresses and the layout of the unpacked folder.
        category_offset: What is added to an id of the vocabulary for the category's id in the data
            set's own lists; 1 where these count from 1 and the vocabulary's ids from 0.
    """

    name: str
    vocabulary: str
    counts: Mapping[str, int]
    guide: str
    category_offset: int = dataclasses.field(default=0, kw_only=True)

    def load_vocabulary(self) -> Vocabulary:
        """Reads the vocabulary; see `vocabulary.load_vocabulary`."""
        return load_vocabulary(self.vocabulary)

    def label_vocabulary(self) -> Vocabulary:
        """Returns the classes that labels distinguish: by default all of the vocabulary."""
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
        """Lists a split's records, sorted by id; opens no image.

        Args:
            source: Folder in which the archives were unpacked.
            split: Name of the split, a key of `counts`.

        Raises:
            MissingFile: A folder or list is missing; the message names it, its archive and
                the archive's address. `read` finds single files that are missing.
            UserError: There is no such split, or a list is invalid.
        """

    @abc.abstractmethod
    def read(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Reads a record.

        Returns:
            Image uint8 RGB [h, w, 3]; label uint8 or uint16 [h, w] in the vocabulary's order
            0..C-1, unseen classes included, or its ignore label.

        Raises:
            MissingFile: A file is missing; the message starts with its path.
            UserError: A file is damaged, the label has another size than the image, or an id that
                is neither a class nor ignored; the message starts with the path.
        """

    def advise(self, values: Collection[Value]) -> str:
        """Returns what to do about ids or colours that are neither a class's nor ignored."""
        return ""

    @abc.abstractmethod
    def encoded_image(self, example: Example) -> bytes | None:
        """Returns the image file's bytes if they may be stored unchanged, else None.

        They may if `read` returns their pixels and `decoding.is_storable` is true.

        Raises:
            MissingFile: The file is missing; the message starts with its path.
            UserError: The file is no image; the message starts with its path.
        """
