"""An image's shapes, and checked reading of the JSON that lists them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from zegformer_jax.input import decoding
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.files import decode_text

MOST_QUOTED = 40  # characters of a wrong value in a message


class Shape(NamedTuple):
    """A region with a name.

    Attributes:
        name: Name of its class, as the file spells it.
        segmentation: Polygons or run lengths in COCO's form; see `masks.encode`.
        where: Its place in the file, such as "annotation 7", for error messages.
    """

    name: str
    segmentation: Any
    where: str


class Annotation(NamedTuple):
    """An image's shapes.

    Attributes:
        size: Height and width of the image; None if the file does not say.
        shapes: Shapes in the file's order.
        image: Name of the image's file, if the file has several images.
    """

    size: tuple[int, int] | None
    shapes: list[Shape]
    image: str = ""


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UserError: The file is not such JSON; the message starts with the path.
    """
    try:
        content = json.loads(decode_text(decoding.read_file(path), path))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, as COCO and labelme write")
    return content


def field(item: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Returns a field of a JSON object.

    Raises:
        UserError: There is no such field, or its value is of another kind; the message starts with
            `where`.
    """
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"got {repr(value)[:MOST_QUOTED]}" if value is not None else "found none"
        kinds = kind if isinstance(kind, tuple) else (kind,)
        words = " or ".join(JSON_WORDS[kind] for kind in kinds)
        raise UserError(f"{where}: '{key}' must be {words}, {found}")
    return value


JSON_WORDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def read_size(item: dict[str, Any], height: str, width: str, where: str) -> tuple[int, int] | None:
    """Returns an image's height and width from two fields; None if neither has a value.

    Raises:
        UserError: A field is no positive number; the message starts with `where`.
    """
    if item.get(height) is None and item.get(width) is None:
        return None
    size = field(item, height, int, where), field(item, width, int, where)
    if min(size) < 1:
        raise UserError(f"{where}: an image of {size[0]} rows and {size[1]} columns")
    return size
