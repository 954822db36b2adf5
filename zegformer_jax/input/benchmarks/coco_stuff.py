"""COCO-Stuff (164k): 171 classes of things and stuff on COCO 2017's images."""

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np

from zegformer_jax.input.benchmarks import files
from zegformer_jax.input.benchmarks.benchmark import Example
from zegformer_jax.input.benchmarks.published import TRAIN, VALIDATION, Published

FOLDERS = {TRAIN: "train2017", VALIDATION: "val2017"}
IMAGES = {
    split: files.Archive(
        f"{folder}.zip",
        f"http://images.cocodataset.org/zips/{folder}.zip",
        (f"{folder}/*.jpg",),
    )
    for split, folder in FOLDERS.items()
}
LABELS = files.Archive(
    "stuffthingmaps_trainval2017.zip",
    "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
    "stuffthingmaps_trainval2017.zip",
    tuple(f"stuffthingmaps_trainval2017/{folder}/*.png" for folder in FOLDERS.values()),
)
# The zip has no common folder: unpacked beside the images, its files are in the images' folders.
LABEL_PARENTS = ("stuffthingmaps_trainval2017/", "annotations/", "")
NUM_IDS = 182  # nightrome/cocostuff, labels.txt: 182 categories; pixel values are one less
UNLABELLED = 255


@dataclasses.dataclass(frozen=True, eq=False)
class CocoStuff(Published):
    """COCO-Stuff's label images.

    Pixels of the 11 categories that COCO announced and never used are ignored.
    """

    def _list(self, source: Path, split: str) -> list[Example]:
        folder = FOLDERS[split]
        images = files.find(source, [folder, f"images/{folder}"], IMAGES[split])
        stems = files.stems(images, ".jpg", IMAGES[split])
        labels = self._find_labels(source, folder, set(stems))
        return [Example(stem, images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]

    def _find_labels(self, source: Path, folder: str, stems: set[str]) -> Path:
        for parent in LABEL_PARENTS:
            labels = source / parent / folder
            if any(name.removesuffix(".png") in stems for name in files.names(labels)):
                return labels
        raise files.missing(source / LABEL_PARENTS[0] / folder / "*.png", LABELS)

    @cached_property
    def _table(self) -> np.ndarray:
        vocabulary = self.load_vocabulary()
        ignored = (*range(NUM_IDS), UNLABELLED)
        return files.label_table(vocabulary.ids, ignored, vocabulary.ignore_label)


BENCHMARK = CocoStuff(
    name="coco_stuff",
    vocabulary="coco_stuff_171",
    counts={TRAIN: 118287, VALIDATION: 5000},
    category_offset=1,
    archives=(IMAGES[TRAIN], IMAGES[VALIDATION], LABELS),
    advice=(
        "Unpack the last one in a folder stuffthingmaps_trainval2017. A pixel's value is its "
        "category less one; 255 (unlabelled) and the 11 categories that COCO never uses are "
        "ignored."
    ),
)
