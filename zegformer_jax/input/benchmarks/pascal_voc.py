"""PASCAL VOC 2012 with SBD's training labels: 20 classes, background ignored."""

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np

from zegformer_jax.input.benchmarks import files
from zegformer_jax.input.benchmarks.benchmark import Example
from zegformer_jax.input.benchmarks.published import TRAIN, VALIDATION, Published
from zegformer_jax.runtime.errors import MissingFile

VOC_2012 = files.Archive(
    "VOCtrainval_11-May-2012.tar",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    ("VOCdevkit/VOC2012/JPEGImages/*.jpg", "VOCdevkit/VOC2012/SegmentationClass/*.png"),
)
SBD = files.Archive(
    "benchmark.tgz (SBD)",
    "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
    "benchmark.tgz",
    ("benchmark_RELEASE/dataset/cls/*.mat",),
)
AUGMENTED = files.Archive(
    "SegmentationClassAug.zip",
    "https://www.dropbox.com/s/oeu149j8qtbs1x0/SegmentationClassAug.zip",
    ("SegmentationClassAug/*.png",),
)
BACKGROUND, BORDER = 0, 255  # VOC 2012 development kit


@dataclasses.dataclass(frozen=True, eq=False)
class PascalVoc(Published):
    """VOC 2012 with its own labels, or SBD's if it has none, as PNG or as published."""

    def _list(self, source: Path, split: str) -> list[Example]:
        images = files.find(source, _places("JPEGImages"), VOC_2012)
        list_name = {TRAIN: "pascal_voc_train.txt", VALIDATION: "pascal_voc_val.txt"}[split]
        ids = files.read_lines(self.lists / list_name)
        labels = _find_labels(source, split, ids)
        return [Example(id_, images / f"{id_}.jpg", labels[id_]) for id_ in ids]

    def _read_ids(self, path: Path) -> np.ndarray:
        if path.suffix == ".mat":
            return files.read_matlab(path, "GTcls", "Segmentation")
        return files.read_ids(path)

    @cached_property
    def _table(self) -> np.ndarray:
        vocabulary = self.load_vocabulary()
        return files.label_table(vocabulary.ids, (BACKGROUND, BORDER), vocabulary.ignore_label)


def _places(folder: str) -> list[str]:
    return [f"{parent}{folder}" for parent in ("VOCdevkit/VOC2012/", "VOC2012/", "")]


def _find_labels(source: Path, split: str, ids: list[str]) -> dict[str, Path]:
    """Returns each id's label file: VOC's if it exists, else SBD's, without ignored borders."""
    own = files.find(source, _places("SegmentationClass"), VOC_2012)
    labels = {id_: own / f"{id_}.png" for id_ in ids}
    if split == TRAIN:
        folder, suffix = _find_augmented(source)
        present = files.names(own)
        labels |= {i: folder / (i + suffix) for i in ids if f"{i}.png" not in present}
    return labels


def _find_augmented(source: Path) -> tuple[Path, str]:
    """Returns the folder of SBD's labels and the suffix of its files."""
    for place in ("SegmentationClassAug", *_places("SegmentationClassAug")):
        if (source / place).is_dir():
            return source / place, ".png"
    if (source / "benchmark_RELEASE/dataset/cls").is_dir():
        return source / "benchmark_RELEASE/dataset/cls", ".mat"
    raise MissingFile(
        f"{files.missing(source / 'SegmentationClassAug', AUGMENTED)}; or in {SBD.file}, see "
        f"{SBD.address}"
    )


BENCHMARK = PascalVoc(
    name="pascal_voc",
    vocabulary="pascal_voc_20",
    counts={TRAIN: 10582, VALIDATION: 1449},
    archives=(VOC_2012, AUGMENTED, SBD),
    advice=(
        "One of SegmentationClassAug and SBD is enough, and validation needs neither; if both "
        "exist, the former is read. Labels 0 (background) and 255 (border) are ignored."
    ),
)
