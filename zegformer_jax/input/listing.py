"""Files of a user's folder: its splits, their images, and the label file of each image."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from zegformer_jax.input.benchmarks import files
from zegformer_jax.input.benchmarks.benchmark import Example
from zegformer_jax.input.shapes import coco
from zegformer_jax.input.shapes.labels import SHAPES_SUFFIX, has_shapes
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.cleaning import is_writable

IMAGES, ANNOTATIONS = "images", "annotations"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIX = ".png"
# Of label files; of several with the same stem the last one in this order is taken.
LABEL_SUFFIXES = (".jpg", ".jpeg", SHAPES_SUFFIX, LABEL_SUFFIX)


def list_examples(root: Path, split: str) -> list[Example]:
    """Lists the records of a folder's split, sorted by id; opens no image.

    Missing files are found when their record is read. Every file in the folder of images, and in
    folders inside it, becomes a record, except hidden files; reading it fails if it is no image.

    Args:
        root: The folder.
        split: Name of a sub-folder, of a list, or of COCO's annotation file; `val` and `validation`
            are the same.

    Raises:
        MissingFile: There is no such split, or a folder is missing or has no images.
        UserError: Two images share a stem, a label image is a JPEG, no label has an image's stem, a
            list is empty, names an image twice, or is no list of names, or COCO's annotation file
            is damaged.
    """
    place = find_split(root, split)
    if place is None:
        raise no_split(root, split)
    if place in coco_files(root, split):
        names = {stem: x.image for stem, x in coco.load(place).items()}
        images = _coco_images(root, split, names.values())
        return sorted(Example(stem, images / name, place) for stem, name in names.items())
    is_list = place.suffix == ".txt"
    parent = place.parent if is_list else place
    images, annotations = _existing(parent / IMAGES), parent / ANNOTATIONS
    found = _listed(place, images) if is_list else _found(images)
    labels = _label_files(images, annotations)
    are_shapes = bool(labels) and all(map(has_shapes, labels.values()))
    suffix = SHAPES_SUFFIX if are_shapes else LABEL_SUFFIX
    usual = annotations if annotations.is_dir() else images
    examples = {}
    for file in found:
        stem = _stem(file, images)
        if not is_writable(stem):
            raise UserError(
                f"{images}: {stem!a} has a control character or is not UTF-8: rename it"
            )
        example = Example(stem, file, labels.get(stem, usual / f"{stem}{suffix}"))
        other = examples.setdefault(example.id, example)
        if other is not example and other.image == file:
            raise UserError(f"{place}: '{example.id}' is listed twice")
        if other is not example:
            raise UserError(f"{file}: {other.image.name} has the same stem, and so the same label")
    _refuse_jpegs([example.label for example in examples.values()])
    if labels and labels.keys().isdisjoint(_stem(file, images) for file in list_files(images)):
        raise _no_label(min(examples.values()), labels, usual)
    return sorted(examples.values())


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def list_files(folder: Path) -> list[Path]:
    """Returns all files under a folder that are not hidden, sorted; links are followed."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _label_files(images: Path, annotations: Path) -> dict[str, Path]:
    """Returns the label files by stem; beside the images only files of shapes are labels."""
    found = [(images, path) for path in list_files(images) if has_shapes(path)]
    there = list_files(annotations if found else _existing(annotations))
    found += [(annotations, path) for path in there if path.suffix.lower() in LABEL_SUFFIXES]
    found.sort(key=lambda item: LABEL_SUFFIXES.index(item[1].suffix.lower()))
    return {_stem(path, folder): path for folder, path in found}


def _no_label(example: Example, labels: Mapping[str, Path], folder: Path) -> UserError:
    """Returns the error of labels that all have other names than the images."""
    similar = max(sorted(labels), key=lambda stem: len(os.path.commonprefix((stem, example.id))))
    return UserError(
        f"{folder}: no label has the name of an image: {example.image.name} needs "
        f"{example.label.name}, and there is {labels[similar].name}; rename the labels as their "
        "images"
    )


def _refuse_jpegs(labels: Sequence[Path]) -> None:
    jpegs = [path for path in labels if path.suffix.lower() in (".jpg", ".jpeg")]
    if jpegs:
        raise UserError(
            f"{jpegs[0]}: a JPEG label image ({len(jpegs)} of {len(labels)} are); JPEG changes "
            "ids, so export the labels as PNG"
        )


def find_split(root: Path, split: str) -> Path | None:
    """Returns a split's annotation file of COCO, its sub-folder or list; None without any.

    Raises:
        UserError: There are two of them.
    """
    places = [root / name for name in _names(split)]
    found = [path for path in coco_files(root, split) if path.is_file()]
    if found:  # the images may be in the sub-folder, but not other labels
        places = [place / ANNOTATIONS for place in places]
    lists = [root / f"{name}.txt" for name in _names(split)]
    found += [path for path in (*places, *lists) if path.exists()]
    if len(found) > 1:
        other = found[1].relative_to(root)
        raise UserError(f"{found[0]}: {other} is there, too; keep one of them")
    return found[0] if found else None


def coco_files(root: Path, split: str) -> list[Path]:
    """Returns the paths at which a split may have COCO's annotation file."""
    return [root / ANNOTATIONS / f"{name}{SHAPES_SUFFIX}" for name in _names(split)]


def _coco_images(root: Path, split: str, names: Collection[str]) -> Path:
    """Returns the folder that holds the images of COCO's annotation file."""
    folders = [path for name in _names(split) for path in (root / name / IMAGES, root / name)]
    folders = [path for path in (*folders, root / IMAGES, root) if path.is_dir()]
    return next((x for x in folders if any((x / name).is_file() for name in names)), folders[0])


def _names(split: str) -> list[str]:
    return [split, *({"validation", "val"} - {split} if split in ("validation", "val") else ())]


def no_split(root: Path, split: str) -> MissingFile:
    """Returns the error of a split that is not in the folder."""
    return MissingFile(
        f"{root / split}: no such folder, nor a list {split}.txt, nor {ANNOTATIONS}/{split}.json; "
        "see data/README.md for the layout"
    )


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise MissingFile(f"{folder}: no such folder; see data/README.md for the layout")
    return folder


def _found(images: Path) -> Iterable[Path]:
    found = list_files(images)
    stems = {path.with_suffix("") for path in found if path.suffix.lower() in IMAGE_SUFFIXES}
    if not stems:
        raise MissingFile(f"{images}: no .jpg or .png images")
    return [path for path in found if not (has_shapes(path) and path.with_suffix("") in stems)]


def _listed(file: Path, images: Path) -> Iterable[Path]:
    """Returns the images that a list names."""
    names = files.read_lines(file)
    if not names:
        raise UserError(f"{file}: the list is empty")
    paths: dict[str, Path] = {}
    for path in list_files(images):
        name = path.relative_to(images)
        paths[name.as_posix()] = path
        if path.suffix.lower() in IMAGE_SUFFIXES:
            paths.setdefault(name.with_suffix("").as_posix(), path)
    for line, name in enumerate(names, 1):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{file}: name {line}, '{name}': expected a name under {images}")
    return [paths.get(name, images / name) for name in names]
