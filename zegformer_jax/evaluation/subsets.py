"""Vocabularies whose classes are reported together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from zegformer_jax.experiment.data import load_vocabulary
from zegformer_jax.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Subset:
    """The classes of the data set's vocabulary that are reported together.

    Attributes:
        name: of the vocabulary file.
        vocabulary: the classes.
        indices: their places in the data set's vocabulary.
        merged: names of the classes that scores are reported for, where several count as one.
        merge: int [C], the place among `merged` of each class; None where each is reported.
    """

    name: str
    vocabulary: Vocabulary
    indices: np.ndarray
    merged: tuple[str, ...] = ()
    merge: np.ndarray | None = None

    @property
    def stem(self) -> str:
        """The name without its folders and suffix: for files, and for tables."""
        return PurePosixPath(self.name.removesuffix(".json")).name

    @property
    def reported(self) -> tuple[tuple[str, ...], tuple[bool, ...]]:
        """Names and seen flags of the classes that scores are reported for.

        A merged class is seen where one of its classes is.
        """
        if self.merge is None:
            return self.vocabulary.names, self.vocabulary.seen
        seen = np.zeros(len(self.merged), bool)
        np.logical_or.at(seen, self.merge, np.asarray(self.vocabulary.seen))
        return self.merged, tuple(seen.tolist())

    @property
    def seen_c(self) -> np.ndarray:
        """Whether each class counts as seen, bool [C]: where several are one, all as that one."""
        seen = np.asarray(self.reported[1], bool)
        return seen if self.merge is None else seen[self.merge]

    def table(self, ignore: int) -> np.ndarray:
        """Maps the data set's labels to this vocabulary's, other classes to the ignore label."""
        table = np.full(ignore + 1, ignore, np.int32)
        table[self.indices] = np.arange(len(self.indices))
        return table


def load_subsets(names: Sequence[str], vocabulary: Vocabulary, dataset: str) -> tuple[Subset, ...]:
    """Finds vocabulary files' classes in the data set's vocabulary; without files, all of it.

    Args:
        names: of the files.
        vocabulary: the data set's.
        dataset: its name; `pascal_voc_20b` counts all kinds of background as one class.

    Raises:
        ValueError: a class is not there, or two files would have the same results' files; the
            message names them.
    """
    if not names:
        return (_whole(vocabulary, dataset),)
    subsets = tuple(_load_subset(name, vocabulary) for name in names)
    stems = [subset.stem for subset in subsets]
    for place, stem in enumerate(stems):
        first = stems.index(stem)
        if first < place:
            raise ValueError(
                f"eval.vocabularies: '{names[first]}' and '{names[place]}' would both be reported "
                f"as '{stem}': leave one out, or rename its file"
            )
    return subsets


def _whole(vocabulary: Vocabulary, dataset: str) -> Subset:
    from zegformer_jax.input import benchmarks

    everything = np.arange(len(vocabulary))
    benchmark = benchmarks.find(dataset) if dataset in benchmarks.BENCHMARKS else None
    if not hasattr(benchmark, "merge_table"):
        return Subset(dataset, vocabulary, everything)
    merge = benchmark.merge_table()[everything].astype(np.int64)
    return Subset(dataset, vocabulary, everything, benchmark.merged_names, merge)


def _load_subset(name: str, vocabulary: Vocabulary) -> Subset:
    wanted = load_vocabulary(name)
    missing = [x for x in wanted.names if x not in vocabulary.names]
    if missing:
        raise ValueError(f"eval.vocabularies: '{name}' has '{missing[0]}', the data set has not")
    indices = np.array([vocabulary.names.index(x) for x in wanted.names])
    return Subset(name, vocabulary.select(indices), indices)
