"""The result of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zegformer_jax.evaluation.metric import Metric, States
from zegformer_jax.evaluation.metrics.confusion import Confusion
from zegformer_jax.evaluation.plan import Plan

Example = tuple[np.ndarray, np.ndarray, np.ndarray]  # an image, its labels, its label map


@dataclass(frozen=True)
class Evaluation:
    """Sums over a data set, and the metrics that report from them.

    Attributes:
        plan: What was asked of the model.
        metrics: The metrics by key.
        states: Their summed states by key.
        images: Number of images that were counted.
        of: Number of images in the data set.
        examples: A few images with their labels and their label maps by `plan.shown`, in the
            headline vocabulary.
        seconds_per_image: Time of the steps without compilation; NaN if every step compiled.
    """

    plan: Plan
    metrics: Mapping[str, Metric]
    states: States
    images: int
    of: int
    examples: Sequence[Example] = ()
    seconds_per_image: float = float("nan")

    @property
    def partial(self) -> bool:
        """True if images are missing, as after an interruption."""
        return self.images < self.of

    def shown(self) -> list[tuple[Confusion, np.ndarray]]:
        """Returns the confusion of the shown label maps in every vocabulary, the headline first."""
        return [
            (metric, self.states[key])
            for key, metric in self.metrics.items()
            if isinstance(metric, Confusion) and metric.name == self.plan.shown
        ]

    def line(self) -> dict[str, float]:
        """Returns the headline's scores for a training's log."""
        metric, state = self.shown()[0]
        scores = metric.scores(state)
        return {
            "seen": scores.seen_iou,
            "unseen": scores.unseen_iou,
            "harmonic": scores.harmonic_iou,
            "mIoU": scores.mean_iou_labels,
            "pixel_accuracy": scores.pixel_accuracy,
        }

    def rank(self) -> float:
        """Returns the score of the best checkpoint: harmonic mIoU, or mIoU if nothing is unseen."""
        line = self.line()
        return line["mIoU"] if np.isnan(line["harmonic"]) else line["harmonic"]


class Interrupted(KeyboardInterrupt):
    """An evaluation was interrupted; what it counted is saved, and the same command resumes.

    Attributes:
        evaluation: What was counted; None if that is nothing, or if other processes count other
            images.
    """

    def __init__(self, evaluation: Evaluation | None):
        super().__init__()
        self.evaluation = evaluation
