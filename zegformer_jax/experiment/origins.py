"""Origins of an experiment's parts, for the screen and for reports."""

import dataclasses
from typing import Any

from etils import epath

from zegformer_jax.experiment.models import LoadedClip
from zegformer_jax.experiment.settings import DatasetSettings
from zegformer_jax.experiment.workdir import CONFIG_FILE, CONVERTED_FILE, find_step, load_config
from zegformer_jax.text.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Origin:
    """Origin of trained weights.

    Attributes:
        place: Workdir, or a file of weights.
        step: Step of the training; None for converted weights.
        steps: Steps of the whole training; None for converted weights.
    """

    place: str
    step: int | None = None
    steps: int | None = None

    @property
    def is_finished(self) -> bool:
        """False before the training's last step."""
        return self.step is None or self.step >= self.steps

    def __str__(self) -> str:
        """Returns the place and the step in words."""
        if self.step is None:
            return f"{self.place}, converted weights"
        text = f"{self.place}, step {self.step:,} of {self.steps:,}"
        return text if self.is_finished else f"{text}: NOT TRAINED TO ITS END"

    def as_json(self) -> dict[str, Any]:
        """Returns the fields for a report."""
        return dataclasses.asdict(self) | {"finished": self.is_finished}


def origin_of(workdir: epath.PathLike, steps: int, checkpoint: str = "latest") -> Origin:
    """Returns the origin of a workdir's checkpoint.

    Args:
        workdir: Folder of the run, or of converted weights.
        steps: Steps of the whole training, if the workdir has no config that says it.
        checkpoint: `latest` or `best`.

    Raises:
        MissingFile: There is no such checkpoint.
    """
    if (epath.Path(workdir) / CONVERTED_FILE).exists():
        return Origin(str(workdir))
    step = find_step(workdir, checkpoint)
    if (epath.Path(workdir) / CONFIG_FILE).exists():
        steps = load_config(workdir).train.steps
    return Origin(str(workdir), step, steps)


def facts(
    dataset: DatasetSettings,
    directory: Any,
    split: str,
    images: int,
    vocabulary: Vocabulary,
    clip: LoadedClip | None,
) -> list[str]:
    """Returns lines on the data, the vocabulary and CLIP, for the start of a run.

    Args:
        dataset: The experiment's section `dataset`.
        directory: The data set's directory.
        split: `train` or `validation`.
        images: Number of the split's images.
        vocabulary: Vocabulary of the labels.
        clip: The CLIP; None for a baseline on word vectors.
    """
    seen = sum(vocabulary.seen)
    return [
        f"data: {dataset.name} in {directory}, {images:,} images ({split})",
        f"vocabulary: {dataset.vocabulary or 'classes.json of the data'}, {len(vocabulary):,} "
        f"classes: {seen:,} seen, {len(vocabulary) - seen:,} unseen",
        "CLIP: none, word vectors" if clip is None else f"CLIP: {clip.source}",
    ]
