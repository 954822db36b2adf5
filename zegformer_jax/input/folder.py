"""A user's data set: images, label images and a list of classes in a folder."""

import dataclasses
import functools
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from zegformer_jax.input import colours, decoding, photographs, unknown
from zegformer_jax.input.benchmarks import FOLDER, files
from zegformer_jax.input.benchmarks.benchmark import Benchmark, Example
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.vocabulary import Vocabulary

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIX = ".png"
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
DIR/train.txt and DIR/validation.txt: an image's name per line, with or without its suffix."""


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
        counts = {split: len(list_examples(root, split)) for split in splits if _find(root, split)}
        if not counts:
            raise _no_split(root, splits[0])
        return cls(FOLDER, str(root / CLASSES_FILE), counts, GUIDE, root, classes)

    def examples(self, source: Path, split: str) -> list[Example]:
        """Lists a split's records; see `Benchmark.examples` and `list_examples`."""
        if Path(source) != self.root:
            raise UserError(f"{source}: this data set was opened from {self.root}")
        return list_examples(self.root, split)

    def read(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Reads a record; see `Benchmark.read`."""
        return read_files(example.image, example.label, self.classes)

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
        raise MissingFile(f"{path}: no such file; it lists the classes: see data/README.md")
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


def list_examples(root: Path, split: str) -> list[Example]:
    """Lists the records of a folder's split, sorted by id; opens no image.

    Missing files are found when their record is read. Every file in the folder of images, and in
    folders inside it, becomes a record, except hidden files; reading it fails if it is no image.

    Args:
        root: The folder.
        split: Name of a sub-folder or of a list; `val` and `validation` are the same.

    Raises:
        MissingFile: There is no such split, or a folder is missing or has no images.
        UserError: Two images share a stem, a label image is a JPEG, or a list is empty, names an
            image twice, or is no list of names.
    """
    place = _find(root, split)
    if place is None:
        raise _no_split(root, split)
    is_list = place.suffix == ".txt"
    parent = place.parent if is_list else place
    images, annotations = _existing(parent / "images"), _existing(parent / "annotations")
    found = _listed(place, images) if is_list else _found(images)
    labels = {_stem(path, annotations): path for path in _label_files(annotations)}
    examples = {}
    for file in found:
        stem = _stem(file, images)
        example = Example(stem, file, labels.get(stem, annotations / f"{stem}{LABEL_SUFFIX}"))
        other = examples.setdefault(example.id, example)
        if other is not example and other.image == file:
            raise UserError(f"{place}: '{example.id}' is listed twice")
        if other is not example:
            raise UserError(f"{file}: {other.image.name} has the same stem, and so the same label")
    _refuse_jpegs([example.label for example in examples.values()])
    return sorted(examples.values())


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _files(folder: Path) -> list[Path]:
    """Returns all files under a folder that are not hidden, sorted; links are followed."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _label_files(annotations: Path) -> list[Path]:
    """Returns the images under a folder of labels, PNG last, so that it is preferred."""
    found = [path for path in _files(annotations) if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found, key=lambda path: path.suffix.lower() == LABEL_SUFFIX)


def _refuse_jpegs(labels: Sequence[Path]) -> None:
    jpegs = [path for path in labels if path.suffix.lower() != LABEL_SUFFIX]
    if jpegs:
        raise UserError(
            f"{jpegs[0]}: a JPEG label image ({len(jpegs)} of {len(labels)} are); JPEG changes "
            "ids, so export the labels as PNG"
        )


def _find(root: Path, split: str) -> Path | None:
    """Returns a split's sub-folder or list."""
    names = (split, *({"validation", "val"} - {split} if split in ("validation", "val") else ()))
    places = [path for name in names for path in (root / name, root / f"{name}.txt")]
    found = [path for path in places if path.exists()]
    if len(found) > 1:
        raise UserError(f"{found[0]}: {found[1].name} is there, too; keep one of them")
    return found[0] if found else None


def _no_split(root: Path, split: str) -> MissingFile:
    return MissingFile(
        f"{root / split}: no such folder, nor a list {split}.txt; see data/README.md for the layout"
    )


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise MissingFile(f"{folder}: no such folder; see data/README.md for the layout")
    return folder


def _found(images: Path) -> Iterable[Path]:
    found = _files(images)
    if not any(file.suffix.lower() in IMAGE_SUFFIXES for file in found):
        raise MissingFile(f"{images}: no .jpg or .png images")
    return found


def _listed(file: Path, images: Path) -> Iterable[Path]:
    """Returns the images that a list names."""
    names = files.read_lines(file)
    if not names:
        raise UserError(f"{file}: the list is empty")
    paths: dict[str, Path] = {}
    for path in _files(images):
        name = path.relative_to(images)
        paths[name.as_posix()] = path
        if path.suffix.lower() in IMAGE_SUFFIXES:
            paths.setdefault(name.with_suffix("").as_posix(), path)
    for line, name in enumerate(names, 1):
        if Path(name).is_absolute():
            raise UserError(f"{file}: name {line}, '{name}': expected a name under {images}")
    return [paths.get(name, images / name) for name in names]


def _image_bytes(path: Path) -> bytes:
    if path.exists() and path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: not a .jpg or .png image; convert it or remove it")
    return decoding.read_file(path)
