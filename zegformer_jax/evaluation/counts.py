"""Counts of an evaluation over images and hosts, and the scores computed from them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from zegformer_jax.evaluation.metrics.confusion import (
    Scores,
    merge_confusion,
    scores_from_confusion,
)
from zegformer_jax.evaluation.subsets import Subset
from zegformer_jax.runtime.checkpoints import SCORE
from zegformer_jax.runtime.processes import gather
from zegformer_jax.text.vocabulary import Vocabulary

PICTURES = ("pictures", "counted")
# Oracles beside the methods: what the method's other half costs.
RIGHT_NAMES, RIGHT_SEGMENTS = "right names", "right segments"
ORACLES = {
    RIGHT_NAMES: "the segments with their right names",
    RIGHT_SEGMENTS: "the labelled regions with the names of the segments that fit best",
}
OVERLAP = ("segments", "overlap")  # beside the (method, vocabulary) of the confusion counts


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
        return confusion_cc if subset.merge is None else merge_confusion(confusion_cc, subset.merge)

    def scores(self, method: str, subset: Subset) -> Scores:
        """The scores of a method in a vocabulary."""
        confusion_cc = self.reported_confusion(method, subset)
        return scores_from_confusion(confusion_cc, subset.reported[1])

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
        gathered = gather(self.counts() | {PICTURES: np.array(self.pictures, np.int64)})
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
