"""Published figures, shown beside an evaluation."""

import dataclasses
import json

from zegformer_jax.experiment import Experiment
from zegformer_jax.models.backbones.resnet import BLOCKS, ResNet
from zegformer_jax.runtime.assets import DATA
from zegformer_jax.segmentation.zegformer import Model, ZegFormer

PUBLISHED = DATA / "published.json"
# The report's names of scores, and the file's.
SCORES = {
    "seen": "seen_iou",
    "unseen": "unseen_iou",
    "harmonic": "harmonic_iou",
    "mIoU": "mean_iou",
}


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """One row of a published table; scores are fractions in [0, 1], None if not published.

    Attributes:
        seen_iou: Mean IoU over the seen classes.
        unseen_iou: Mean IoU over the unseen classes.
        harmonic_iou: Their harmonic mean.
        mean_iou: Mean IoU over all classes; the source does not say by which definition.
        source: Who published it.
    """

    seen_iou: float | None
    unseen_iou: float | None
    harmonic_iou: float | None
    mean_iou: float | None
    source: str


def published_rows(
    trained_on: str, all_seen: bool, backbone_name: str, evaluated_on: str
) -> tuple[PublishedRow, ...]:
    """Returns the published figures for an evaluation, in `data/published.json`.

    Args:
        trained_on: Name of the data set of the training, such as "coco_stuff".
        all_seen: Whether all of its classes were trained on.
        backbone_name: "r101" and the like; figures whose source does not name it fit any.
        evaluated_on: Name of the data set of the evaluation.

    Returns:
        The rows, the paper's own first.
    """
    wanted = {"trained_on": trained_on, "all_seen": all_seen, "evaluated_on": evaluated_on}
    return tuple(
        PublishedRow(
            **{name: row[name] / 100 if name in row else None for name in SCORES.values()},
            source=row["source"],
        )
        for row in json.loads(PUBLISHED.read_text("utf-8"))["rows"]
        if wanted.items() <= row.items() and row.get("backbone", backbone_name) == backbone_name
    )


def published_lines(model: Model, experiment: Experiment, dataset: str) -> list[str]:
    """Returns lines with the published figures for a model.

    Args:
        model: The model, without its arrays.
        experiment: The experiment that trained it.
        dataset: Name of the data set of the evaluation.
    """
    if not isinstance(model, ZegFormer) or not isinstance(model.grouper.backbone, ResNet):
        return []
    names = {tuple(blocks): f"r{depth}" for depth, blocks in BLOCKS.items()}
    backbone = names.get(tuple(model.grouper.backbone.blocks), "")
    trained = experiment.dataset
    lines = []
    for row in published_rows(trained.name, trained.all_seen, backbone, dataset):
        values = {name: getattr(row, field) for name, field in SCORES.items()}
        known = ", ".join(f"{k} {100 * v:.1f}" for k, v in values.items() if v is not None)
        lines.append(f"published: {known} ({row.source})")
    return lines
