"""A user's data set: images, label images or shapes, and a list of classes in a folder."""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from zegformer_jax.input import colours, decoding, photographs, unknown
from zegformer_jax.input.benchmarks import FOLDER, files
from zegformer_jax.input.benchmarks.benchmark import Benchmark, Example
from zegformer_jax.input.listing import (
    IMAGE_SUFFIXES,
    coco_files,
    find_split,
    list_examples,
    list_files,
    no_split,
)
from zegformer_jax.input.shapes.labels import has_shapes, suggest_classes
from zegformer_jax.input.shapes.labels import read_label as read_shapes
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.vocabulary import Vocabulary

CLASSES_FILE = "classes.json"
SPLITS = ("train", "validation")
GUIDE = """\
DIR/train/images/*.jpg, *.jpeg or *.png   the images
DIR/train/annotations/*.png               label images of the same stems: one channel of class ids
                                          with 8 or 16 bits, or a palette, whose indices are the ids
                                          folders inside images are the same inside annotations
DIR/validation/...                        the same files for validation; `val` is accepted
DIR/classes.json                          {"classes": [{"id": 1, "name": "sheep", "seen": true}]};
                                          also "ignore_label": 65535 for 16-bit ids (else 255), and
                                          "ignored_ids": [0], other ids that mean no label; for
                                          labels in colour "colour": [128, 0, 0] for each class in
                                          place of "id", and "ignored_colours": [[0, 0, 0]]
or, in place of the folders train and validation, DIR/images, DIR/annotations, and the lists
DIR/train.txt and DIR/validation.txt: an image's name per line, with or without its suffix.
For `prepare` labels may be polygons, whose names are those of the classes in classes.json:
annotations/*.json, or images/*.json beside the images, as labelme writes them; or, as COCO's format
has them, DIR/annotations/train.json and validation.json, whose images are in DIR/train/images,
DIR/train, DIR/images or DIR. Pixels outside all polygons are of the class "background" if there is
one, else they have no label; "ignored_names": ["crowd"] are names that mean no label."""


@dataclasses.dataclass(frozen=True)
class Folder(Benchmark):
    """A user's folder, which can be read as it is or prepared.

    Attributes:
        root: The folder; `examples` accepts no other one.
        classes: Classes of the label images' ids or colours.
    """

    root: Path
    classes: Vocabulary

    @classmethod
    def open(
        cls,
        root: str | Path,
        classes: Vocabulary | None = None,
        splits: Sequence[str] = SPLITS,
    ) -> "Folder":
        """Finds the splits of a folder.

        Args:
            root: The folder; `GUIDE` describes its layout.
            classes: Classes of the label images' ids; None reads `classes.json` in the folder.
            splits: Names of the splits to look for.

        Raises:
            MissingFile: The folder or a part of it is missing or empty; the message names it.
            UserError: `classes.json` or a list is invalid, or two images have the same stem.
        """
        root = Path(root)
        if not root.is_dir():
            raise MissingFile(f"{root}: no such folder")
        classes = read_classes(root) if classes is None else classes
        counts = {
            split: len(list_examples(root, split)) for split in splits if find_split(root, split)
        }
        if not counts:
            raise no_split(root, splits[0])
        return cls(FOLDER, str(root / CLASSES_FILE), counts, GUIDE, root, classes)

    def examples(self, source: Path, split: str) -> list[Example]:
        """Lists a split's records; see `Benchmark.examples` and `list_examples`."""
        if Path(source) != self.root:
            raise UserError(f"{source}: this data set was opened from {self.root}")
        return list_examples(self.root, split)

    def read(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Reads a record; see `Benchmark.read`."""
        if not has_shapes(example.label):
            return read_files(example.image, example.label, self.classes)
        image_hw3 = photographs.decode_photograph(_image_bytes(example.image), example.image)
        is_coco = any(example.label in coco_files(self.root, split) for split in self.counts)
        size = image_hw3.shape[:2]
        return image_hw3, read_shapes(example, size, self.classes, is_coco)

    def advise(self, values: Collection[unknown.Value]) -> str:
        """Returns what to do about unknown ids or colours; see `Benchmark.advise`."""
        return unknown.advise(values, self.classes)

    def load_vocabulary(self) -> Vocabulary:
        """Returns the classes."""
        return self.classes

    def encoded_image(self, example: Example) -> bytes | None:
        """Returns the image file's bytes if they may be stored; see `Benchmark.encoded_image`."""
        data = _image_bytes(example.image)
        return data if photographs.is_plain(data, example.image) else None


def read_classes(root: Path) -> Vocabulary:
    """Reads a folder's `classes.json`.

    Raises:
        MissingFile: The file is missing.
        UserError: The file is invalid; the message starts with its path.
    """
    path = root / CLASSES_FILE
    if not path.is_file():
        fitting = suggest_classes(filter(has_shapes, list_files(root)))
        if fitting:
            raise MissingFile(f"{path}: no such file; for the names in the labels write {fitting}")
        raise MissingFile(
            f"{path}: no such file; write the classes and their ids in the annotations into it, "
            'such as {"classes": [{"id": 1, "name": "boat"}]}: docs/datasets.md has an example'
        )
    return Vocabulary.parse(path.read_bytes(), str(path))


def read_files(image: Path, label: Path, classes: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image and its label image.

    Returns:
        Image, uint8 RGB [h, w, 3], and label map, as `read_label` returns it.

    Raises:
        MissingFile: A file is missing; the message starts with its path.
        UserError: A file is invalid, or the sizes differ; the message starts with its path.
    """
    image_hw3 = photographs.decode_photograph(_image_bytes(image), image)
    label_hw = read_label(label, classes)
    if label_hw.shape != image_hw3.shape[:2]:
        shapes = f"{label_hw.shape}, but {image.name} is {image_hw3.shape[:2]}"
        raise UserError(f"{label}: expected the image's size: {shapes}")
    return image_hw3, label_hw


def read_label(path: Path, classes: Vocabulary) -> np.ndarray:
    """Reads a label image.

    Args:
        path: Path of the label image.
        classes: Classes of its ids, or of its colours if they have any.

    Returns:
        Label map, uint8 or uint16 [h, w]: indices of classes, or their ignore label.

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UnknownValues: An id or colour is neither a class's nor ignored; the message starts with the
            path.
        UserError: The file is no label image; the message starts with the path.
    """
    try:
        if classes.colours:
            return colours.read_label(path, classes)
        table = id_table(classes)
        return files.map_ids(files.read_ids(path), table, path, classes.label_dtype)
    except unknown.UnknownValues as error:
        advice = unknown.advise(error.values, classes)
        raise unknown.UnknownValues(f"{error}; {advice}", error.values) from None


@functools.lru_cache(maxsize=8)
def id_table(classes: Vocabulary) -> np.ndarray:
    """Returns the table from ids of label images to labels; see `files.label_table`."""
    ignored = (classes.ignore_label, *classes.ignored_ids)
    return files.label_table(classes.ids, ignored, classes.ignore_label)


def _image_bytes(path: Path) -> bytes:
    if path.exists() and path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: not a .jpg or .png image; convert it or remove it")
    return decoding.read_file(path)
