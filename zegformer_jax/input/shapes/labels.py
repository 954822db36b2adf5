"""Label maps of images whose labels are shapes with names."""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from zegformer_jax.input import unknown
from zegformer_jax.input.benchmarks.benchmark import Example
from zegformer_jax.input.shapes import coco, labelme, masks
from zegformer_jax.input.shapes.annotation import Shape
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.synonyms import spellings_of
from zegformer_jax.text.vocabulary import IGNORE_LABEL_8BIT, IGNORE_LABEL_16BIT, Vocabulary

BACKGROUND = "background"  # the class of pixels outside all shapes, if there is one
SHAPES_SUFFIX = ".json"


def has_shapes(path: Path) -> bool:
    """Returns True if a label file has shapes."""
    return path.suffix.lower() == SHAPES_SUFFIX


def read_label(
    example: Example, size: tuple[int, int], classes: Vocabulary, is_coco: bool
) -> np.ndarray:
    """Reads the shapes of an image, and draws its label map; see `draw_label`.

    Args:
        example: The image and its label file.
        size: Height and width of the image as it is shown.
        classes: The classes.
        is_coco: True if the label file is COCO's, of a whole split, else labelme's.

    Raises:
        MissingFile: There is no label file; the message starts with its path.
        UnknownValues: Names of shapes are neither a class's nor ignored; so does this message.
        UserError: The file is damaged, or of an image of another size; so does this message.
    """
    path = example.label
    annotation = coco.load(path)[example.id] if is_coco else labelme.load(path)
    if annotation.size not in (None, size):
        turned = "; draw it on the image with its EXIF rotation" * (annotation.size[::-1] == size)
        sizes = f"{annotation.size}, but {example.image.name} is {size}{turned}"
        raise UserError(f"{path}: expected the image's size: {sizes}")
    try:
        return draw_label(annotation.shapes, size, classes)
    except unknown.UnknownValues as error:
        raise unknown.UnknownValues(f"{path}: {error}", error.values) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def draw_label(shapes: Sequence[Shape], size: tuple[int, int], classes: Vocabulary) -> np.ndarray:
    """Draws the label map of an image.

    Where shapes overlap, the one with fewer pixels is on top; of two equal ones, the later one.
    Pixels outside all shapes are of the class "background" if there is one, else they are ignored.

    Args:
        shapes: The image's shapes.
        size: Height and width of the image.
        classes: The classes.

    Returns:
        Label map, uint8 or uint16 [h, w]: indices of classes, or their ignore label.

    Raises:
        UnknownValues: Names of shapes are neither a class's nor ignored.
        UserError: A shape is damaged, or its name is that of several classes.
    """
    labels = [find_label(shape.name, classes) for shape in shapes]
    strange = {shape.name for shape, label in zip(shapes, labels, strict=True) if label is None}
    if strange:
        names, advice = sorted(strange), unknown.advise(strange, classes)
        quoted = ", ".join(map(repr, names))
        raise unknown.UnknownValues(f"no class has the name {quoted}; {advice}", names)
    runs = [masks.encode(shape.segmentation, size, shape.where) for shape in shapes]
    areas = np.array([masks.count_pixels(x) for x in runs])
    rest = find_label(BACKGROUND, classes)
    labels_hw = np.full(size, classes.ignore_label if rest is None else rest, classes.label_dtype)
    for place in np.argsort(-areas, kind="stable"):
        labels_hw[masks.decode(runs[place])] = labels[place]
    return labels_hw


@functools.lru_cache(maxsize=4096)
def find_label(name: str, classes: Vocabulary) -> int | None:
    """Finds the label of a shape's name, whatever its spelling.

    It is the class of the same synonyms, else the one that shares a synonym; the ignore label for
    one of the ignored names; None for other names.

    Raises:
        UserError: Several classes share a synonym with it.
    """
    wanted = spellings_of(name)
    if wanted in map(spellings_of, classes.ignored_names):
        return classes.ignore_label
    spellings = _spellings(classes)
    found = [place for place, known in enumerate(spellings) if known == wanted]
    found = found or [place for place, known in enumerate(spellings) if known & wanted]
    if len(found) > 1:
        names = " or ".join(repr(classes.names[place]) for place in found)
        raise UserError(f"the name {name!r} may be {names}: write the whole name there")
    return found[0] if found else None


@functools.lru_cache(maxsize=8)
def _spellings(classes: Vocabulary) -> list[frozenset[str]]:
    return [spellings_of(name) for name in classes.names]


def suggest_classes(files: Iterable[Path]) -> str:
    """Returns the content of a `classes.json` for the names in label files; empty without any.

    Args:
        files: JSON files of COCO or labelme; other ones are passed over.
    """
    names: dict[frozenset[str], str] = {}
    for path in files:
        for name in _names(path):
            names.setdefault(spellings_of(name), name)
    names.pop(frozenset(), None)
    if not names:
        return ""
    content = {"classes": [{"name": name} for name in names.values()]}
    if len(names) > IGNORE_LABEL_8BIT:
        content["ignore_label"] = IGNORE_LABEL_16BIT
    return json.dumps(content, ensure_ascii=False)


def _names(path: Path) -> list[str]:
    """Returns the names of a file's shapes in the order in which they come first."""
    for load in (lambda: [labelme.load(path)], lambda: coco.load(path).values()):
        try:
            return list(dict.fromkeys(shape.name for x in load() for shape in x.shapes))
        except UserError:
            continue
    return []
