"""COCO's annotation file of a split: images, categories, and polygons or run lengths of objects."""

import functools
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from zegformer_jax.input.shapes.annotation import (
    Annotation,
    Shape,
    field,
    read_object,
    read_size,
)
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.cleaning import is_writable

Id = (int, str)  # some tools write ids as texts


def load(path: Path) -> Mapping[str, Annotation]:
    """Reads an annotation file, once for all calls until the file changes.

    Args:
        path: Path of the file, a JSON object with the lists `images` (`id`, `file_name`, and
            optionally `height` and `width`), `annotations` (`image_id`, `category_id`,
            `segmentation`) and `categories` (`id`, `name`).

    Returns:
        Annotations by the images' file names without the ending, in the file's order.

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UserError: The file is not of this form; the message starts with the path.
    """
    if not path.is_file():
        raise MissingFile(f"{path}: no such file")
    status = path.stat()
    return _load(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # large, and needed for reading each record
def _load(path: Path, size: int, time: int) -> Mapping[str, Annotation]:
    content, by_stem = read_object(path), {}
    categories = _by_id(content, "categories", "name", path)
    images = _by_id(content, "images", "file_name", path)
    annotations = {}
    for id_, image in images.items():
        where, name = f"{path}: image {id_!r}", image["file_name"]
        if not _is_relative(name):
            raise UserError(f"{where}: 'file_name' {name!r} is no path below the folder of images")
        size = read_size(image, "height", "width", where)
        annotations[id_] = Annotation(size, [], name)
        other = by_stem.setdefault(_stem(name), annotations[id_])
        if other is not annotations[id_]:
            raise UserError(f"{where}: '{name}' has the same stem as an earlier '{other.image}'")
    for place, item in enumerate(field(content, "annotations", list, str(path)), 1):
        where = f"annotation {item.get('id', place) if isinstance(item, dict) else place}"
        image_id = field(item, "image_id", Id, f"{path}: {where}")
        category_id = field(item, "category_id", Id, f"{path}: {where}")
        for id_, known, what in (
            (image_id, images, "image"),
            (category_id, categories, "category"),
        ):
            if id_ not in known:
                raise UserError(f"{path}: {where}: no {what} has the id {id_!r}")
        name = categories[category_id]["name"]
        annotations[image_id].shapes.append(Shape(name, item.get("segmentation"), where))
    return by_stem


def _is_relative(name: str) -> bool:
    """Returns True for a path below a folder."""
    path = PurePosixPath(name)
    is_below = not path.is_absolute() and ".." not in path.parts
    return bool(path.name) and is_below and is_writable(name)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _by_id(content: dict[str, Any], key: str, name: str, path: Path) -> dict[int | str, Any]:
    """Returns the objects of a list, which have an id and a name, by their ids."""
    found = {}
    for place, item in enumerate(field(content, key, list, str(path)), 1):
        where = f"{path}: entry {place} of '{key}'"
        id_ = field(item, "id", Id, where)
        field(item, name, str, where)
        if found.setdefault(id_, item) is not item:
            raise UserError(f"{where}: the id {id_!r} is used twice")
    if not found:
        raise UserError(f"{path}: the list '{key}' is empty")
    return found
