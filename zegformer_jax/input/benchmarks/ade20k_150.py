"""ADE20K's 150 classes: the scene parsing challenge of 2016."""

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np

from zegformer_jax.input.benchmarks import files
from zegformer_jax.input.benchmarks.benchmark import Example
from zegformer_jax.input.benchmarks.published import TRAIN, VALIDATION, Published

FOLDERS = {TRAIN: "training", VALIDATION: "validation"}
ARCHIVE = files.Archive(
    "ADEChallengeData2016.zip",
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    (
        "ADEChallengeData2016/images/{training,validation}/*.jpg",
        "ADEChallengeData2016/annotations/{training,validation}/*.png",
    ),
)
UNLABELLED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Ade20k150(Published):
    """ADEChallengeData2016: pixel value 1..150 is class 0..149, 0 is ignored."""

    def _list(self, source: Path, split: str) -> list[Example]:
        folder = FOLDERS[split]
        images = files.find(source, _places(f"images/{folder}"), ARCHIVE)
        labels = files.find(source, _places(f"annotations/{folder}"), ARCHIVE)
        stems = files.stems(images, ".jpg", ARCHIVE)
        return [Example(stem, images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]

    @cached_property
    def _table(self) -> np.ndarray:
        vocabulary = self.load_vocabulary()
        ids = range(1, len(vocabulary) + 1)
        return files.label_table(ids, (UNLABELLED,), vocabulary.ignore_label)


def _places(folder: str) -> list[str]:
    return [f"ADEChallengeData2016/{folder}", folder]


BENCHMARK = Ade20k150(
    name="ade20k_150",
    vocabulary="ade20k_150",
    counts={TRAIN: 20210, VALIDATION: 2000},
    category_offset=1,
    archives=(ARCHIVE,),
    advice="Label 0 is ignored; label i is class i - 1.",
)
