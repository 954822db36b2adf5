"""Vocabularies that scores are reported for: parts of the data set's vocabulary.

Axes: c class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np

from zegformer_jax.input import benchmarks
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import Vocabulary, load_vocabulary


@dataclass(frozen=True, eq=False)
class Subset:
    """Classes of the data set's vocabulary that are reported together.

    Attributes:
        name: The vocabulary file's name, or the data set's for all of its classes.
        vocabulary: The c classes.
        indices: int [c], their indices in the data set's vocabulary.
        merged: Names of the classes that scores are reported for where several count as one.
        merge: int [c], each class's index in `merged`; None reports every class.
    """

    name: str
    vocabulary: Vocabulary
    indices: np.ndarray
    merged: tuple[str, ...] = ()
    merge: np.ndarray | None = None

    @property
    def stem(self) -> str:
        """The name without folders and suffix, for files and tables."""
        return PurePosixPath(self.name.removesuffix(".json")).name

    @cached_property
    def reported(self) -> dict[str, bool]:
        """Names and seen flags of the classes that scores are reported for.

        A merged class is seen if one of its classes is.
        """
        if self.merge is None:
            return dict(zip(self.vocabulary.names, self.vocabulary.seen, strict=True))
        seen = np.zeros(len(self.merged), bool)
        np.logical_or.at(seen, self.merge, np.asarray(self.vocabulary.seen))
        return dict(zip(self.merged, seen.tolist(), strict=True))

    @property
    def seen_c(self) -> np.ndarray:
        """Seen flags, bool [c]; merged classes share the flag of their merged class."""
        seen = np.asarray(list(self.reported.values()), bool)
        return seen if self.merge is None else seen[self.merge]

    def table(self, ignore_label: int) -> np.ndarray:
        """Returns the table from the data set's labels to this vocabulary's.

        Other classes become the ignore label.
        """
        table = np.full(ignore_label + 1, ignore_label, np.int32)
        table[self.indices] = np.arange(len(self.indices))
        return table


def load_subsets(names: Sequence[str], vocabulary: Vocabulary, dataset: str) -> tuple[Subset, ...]:
    """Reads the vocabularies to report.

    Args:
        names: Vocabulary files; none reports the whole vocabulary of the data set.
        vocabulary: The data set's vocabulary.
        dataset: The data set's name; `pascal_voc_20b` counts all kinds of background as one class.

    Raises:
        UserError: A class is not in the data set's vocabulary, or two files have the same name;
            the message says which.
    """
    if not names:
        return (_whole(vocabulary, dataset),)
    subsets = tuple(_load_subset(name, vocabulary) for name in names)
    stems = [subset.stem for subset in subsets]
    for place, stem in enumerate(stems):
        first = stems.index(stem)
        if first < place:
            raise UserError(
                f"eval.vocabularies: '{names[first]}' and '{names[place]}' would both be reported "
                f"as '{stem}': leave one out, or rename its file"
            )
    return subsets


def _whole(vocabulary: Vocabulary, dataset: str) -> Subset:
    everything = np.arange(len(vocabulary))
    benchmark = benchmarks.find(dataset) if dataset in benchmarks.BENCHMARKS else None
    table = benchmark.merge_table() if benchmark else None
    if table is None:
        return Subset(dataset, vocabulary, everything)
    merge = table[everything].astype(np.int64)
    return Subset(dataset, vocabulary, everything, benchmark.merged_names, merge)


def _load_subset(name: str, vocabulary: Vocabulary) -> Subset:
    wanted = load_vocabulary(name)
    missing = [x for x in wanted.names if x not in vocabulary.names]
    if missing:
        raise UserError(
            f"eval.vocabularies: '{name}' has the class '{missing[0]}', which is not in the data "
            "set's vocabulary: name another file"
        )
    indices = np.array([vocabulary.names.index(x) for x in wanted.names])
    return Subset(name, vocabulary.select(indices), indices)
