"""Published figures, shown beside an evaluation."""

import dataclasses
import json

from zegformer_jax.runtime.assets import DATA

PUBLISHED = DATA / "published.json"
_PERCENT_SCORES = ("seen_iou", "unseen_iou", "harmonic_iou", "mean_iou")


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """One row of a published table; scores are fractions in [0, 1], None where not published.

    Attributes:
        seen_iou: mean IoU over the seen classes.
        unseen_iou: the same over the unseen classes.
        harmonic_iou: their harmonic mean.
        mean_iou: over all classes; which of the two definitions is not said.
        source: who published it.
    """

    seen_iou: float | None
    unseen_iou: float | None
    harmonic_iou: float | None
    mean_iou: float | None
    source: str


def published_rows(
    trained_on: str, all_seen: bool, backbone_name: str, evaluated_on: str
) -> tuple[PublishedRow, ...]:
    """Finds the published figures for an evaluation, in ``data/published.json``.

    Args:
        trained_on: name of the data set of the training, such as "coco_stuff".
        all_seen: whether all of its classes were trained on.
        backbone_name: "r101" and the like; figures whose source leaves it open fit any.
        evaluated_on: name of the data set of the evaluation.

    Returns:
        the rows, the paper's own first; none where there is no published figure.
    """
    wanted = {"trained_on": trained_on, "all_seen": all_seen, "evaluated_on": evaluated_on}
    return tuple(
        PublishedRow(
            **{name: row[name] / 100 if name in row else None for name in _PERCENT_SCORES},
            source=row["source"],
        )
        for row in json.loads(PUBLISHED.read_text("utf-8"))["rows"]
        if wanted.items() <= row.items() and row.get("backbone", backbone_name) == backbone_name
    )
