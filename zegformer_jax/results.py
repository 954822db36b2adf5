"""What an evaluation counts, over pictures and hosts, and the scores that follow from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import jax
import numpy as np

from zegformer_jax import experiment, hosts, metrics
from zegformer_jax.checkpoints import SCORE
from zegformer_jax.vocabulary import Vocabulary

PICTURES = ("pictures", "counted")
# Oracles beside the methods: what the method's other half costs.
RIGHT_NAMES, RIGHT_SEGMENTS = "right names", "right segments"
ORACLES = {
    RIGHT_NAMES: "the segments with their right names",
    RIGHT_SEGMENTS: "the labelled regions with the names of the segments that fit best",
}
OVERLAP = ("segments", "overlap")  # beside the (method, vocabulary) of the confusion counts


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
    from zegformer_jax.input import builders

    everything = np.arange(len(vocabulary))
    benchmark = builders.find(dataset) if dataset in builders.BENCHMARKS else None
    if not hasattr(benchmark, "merge_table"):
        return Subset(dataset, vocabulary, everything)
    merge = benchmark.merge_table()[everything].astype(np.int64)
    return Subset(dataset, vocabulary, everything, benchmark.merged_names, merge)


def _load_subset(name: str, vocabulary: Vocabulary) -> Subset:
    wanted = experiment.load_vocabulary(name)
    missing = [x for x in wanted.names if x not in vocabulary.names]
    if missing:
        raise ValueError(f"eval.vocabularies: '{name}' has '{missing[0]}', the data set has not")
    indices = np.array([vocabulary.names.index(x) for x in wanted.names])
    return Subset(name, vocabulary.select(indices), indices)


@dataclass
class Evaluation:
    """Sums over a data set, and what is reported from them.

    Attributes:
        subsets: the vocabularies, the headline first.
        vocabulary: of the data set.
        shown: the method whose label maps are kept and whose scores come first.
        confusion: int64 [C, C] (label, prediction) by (method, vocabulary's name).
        overlap: float64 [3, C] of each class of the data set: sums of the best-fitting segment's
            IoU and of its boundary F, and how often the class occurs.
        pictures: that were counted.
        of: pictures that there are.
        seconds: of the steps, compilation apart.
        images: evaluated in these seconds.
        examples: a few (image, truth, prediction) by `eval.scores`, in the headline vocabulary.
        finish: to be called when the results are written: removes what is kept for an interrupt.
    """

    subsets: tuple[Subset, ...]
    vocabulary: Vocabulary
    shown: str
    confusion: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    overlap: np.ndarray | None = None
    pictures: int = 0
    of: int = 0
    seconds: float = 0.0
    images: int = 0
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    finish: Callable[[], None] = lambda: None

    @property
    def partial(self) -> bool:
        """Whether pictures are missing, as in an evaluation that was interrupted."""
        return self.pictures < self.of

    def methods(self, subset: Subset) -> list[str]:
        """The methods that were counted in a vocabulary, in their order."""
        return [m for m, name in self.confusion if name == subset.name and m not in ORACLES]

    def reported_confusion(self, method: str, subset: Subset) -> np.ndarray:
        """A method's pixels by label and prediction, of the classes that are reported."""
        confusion_cc = self.confusion[method, subset.name]
        return (
            confusion_cc
            if subset.merge is None
            else metrics.merge_confusion(confusion_cc, subset.merge)
        )

    def scores(self, method: str, subset: Subset) -> metrics.Scores:
        """The scores of a method in a vocabulary."""
        confusion_cc = self.reported_confusion(method, subset)
        return metrics.scores_from_confusion(confusion_cc, subset.reported[1])

    def segment_fit(self, subset: Subset) -> tuple[float, float]:
        """Mean best-overlap IoU of the seen and of the unseen classes' regions.

        NaN where the labels have none.
        """
        return self._fit(subset, 0)

    def boundary_fit(self, subset: Subset) -> tuple[float, float]:
        """Mean boundary F of the same segments, likewise."""
        return self._fit(subset, 1)

    def _fit(self, subset: Subset, row: int) -> tuple[float, float]:
        total, count = self.overlap[[row, 2]][:, subset.indices]
        sums = [(total[m].sum(), count[m].sum()) for m in (subset.seen_c, ~subset.seen_c)]
        return tuple(float(fit / regions) if regions else float("nan") for fit, regions in sums)

    def oracle_rows(self) -> list[dict[str, Any]]:
        """What each half of the method reaches, in the headline: rows with a `name` and scores."""
        subset, rows = self.subsets[0], []
        if (RIGHT_NAMES, subset.name) not in self.confusion:
            return rows
        for title, fit in (("IoU", self.segment_fit), ("boundary F", self.boundary_fit)):
            seen, unseen = fit(subset)
            rows.append(
                {"name": f"segments that fit best, {title}", "seen": seen, "unseen": unseen}
            )
        for key, name in ORACLES.items():
            scores = self.scores(key, subset)
            values = (scores.seen_iou, scores.unseen_iou, scores.harmonic_iou)
            rows.append({"name": name} | dict(zip(("seen", "unseen", SCORE), values, strict=True)))
        return rows

    def line(self) -> dict[str, float]:
        """The headline's scores by `shown`, for a training's log."""
        scores = self.scores(self.shown, self.subsets[0])
        return {
            "seen": scores.seen_iou,
            "unseen": scores.unseen_iou,
            SCORE: scores.harmonic_iou,
            "mIoU": scores.mean_iou_labels,
            "pixel_accuracy": scores.pixel_accuracy,
        }

    def rank(self) -> float:
        """What the best checkpoint has most of: harmonic mIoU, or mIoU where no class is unseen."""
        line = self.line()
        return line["mIoU"] if np.isnan(line[SCORE]) else line[SCORE]

    def add_hosts(self) -> None:
        """Adds what the other processes counted on their pictures."""
        if jax.process_count() == 1:
            return
        # A process without a picture has counted nothing: of it the others get zeros.
        gathered = hosts.gather(self.counts() | {PICTURES: np.array(self.pictures, np.int64)})
        self.confusion, self.overlap, self.pictures = {}, None, 0
        for own in gathered:
            self.pictures += int(own.pop(PICTURES))
            self.add(own)

    def counts(self) -> dict[tuple[str, str], np.ndarray]:
        """Everything that is counted, as `add` takes it."""
        counts = dict(self.confusion)
        if self.overlap is not None:
            counts[OVERLAP] = self.overlap
        return counts

    def add(self, sums: dict[Any, np.ndarray]) -> None:
        """Adds a step's counts."""
        for key, counts in sums.items():
            if key == OVERLAP:
                # Fractions of thousands of pictures: the devices' float32 would round their sum.
                counts = np.asarray(counts, np.float64)
                self.overlap = counts if self.overlap is None else self.overlap + counts
            else:
                self.confusion[key] = counts.astype(np.int64) + self.confusion.get(key, 0)
