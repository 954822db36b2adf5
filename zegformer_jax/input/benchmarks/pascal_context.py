"""The common part of both PASCAL-Context benchmarks: VOC 2010's images, lists and label maps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from zegformer_jax.input.benchmarks import files
from zegformer_jax.input.benchmarks.benchmark import Example
from zegformer_jax.input.benchmarks.published import TRAIN, Published

VOC_2010 = files.Archive(
    "VOCtrainval_03-May-2010.tar",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
    ("VOCdevkit/VOC2010/JPEGImages/*.jpg", "VOCdevkit/VOC2010/ImageSets/Main/train.txt"),
)
LABEL_MAPS = files.Archive(
    "trainval.tar.gz (PASCAL-Context)",
    "https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz",
    ("trainval/*.mat",),
)
UNLABELLED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class PascalContext(Published):
    """VOC 2010's images and the lists of PASCAL-Context's splits."""

    def _list(self, source: Path, split: str) -> list[Example]:
        images = files.find(source, places("JPEGImages"), VOC_2010)
        if split == TRAIN:
            ids = files.read_lines(files.find(source, places("ImageSets/Main/train.txt"), VOC_2010))
        else:
            ids = files.read_lines(self.lists / "pascal_context_val.txt")
        label = self._find_labels(source)
        return [Example(id_, images / f"{id_}.jpg", label(id_)) for id_ in ids]

    def _find_labels(self, source: Path) -> Callable[[str], Path]:
        """Returns the function from an id to its label file."""
        folder = files.find(source, ["trainval", *places("trainval")], LABEL_MAPS)
        return lambda id_: folder / f"{id_}.mat"


def places(path: str) -> list[str]:
    """Returns the possible paths of a VOC 2010 folder under the folder of the archives."""
    return [f"{parent}{path}" for parent in ("VOCdevkit/VOC2010/", "VOC2010/", "")]
