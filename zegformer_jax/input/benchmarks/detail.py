"""PASCAL in Detail's annotations: masks of categories in one JSON, run-length encoded as COCO's.

Formats: the Detail API (Simplified BSD), and COCO's maskApi.c (Simplified BSD).
"""

import collections
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zegformer_jax.input import decoding

SPACES = re.compile(r"[ \t\n\r]*")
BITS = 5  # of a run's length in one character
MORE, NEGATIVE = 0x20, 0x10  # flags: another character follows; the last one's sign
FIRST_CHARACTER = ord("0")
LARGEST = 0x3F  # six bits: five of the number and one flag


class Mask(NamedTuple):
    """Pixels of a category.

    Attributes:
      category: its id.
      size: height and width.
      runs: lengths of runs down the columns, of pixels outside and inside in turn, compressed.
    """

    category: int
    size: tuple[int, int]
    runs: str


class Annotation(NamedTuple):
    """An image's masks, in the order in which they are painted.

    Attributes:
      size: height and width.
      masks: later ones cover earlier ones.
    """

    size: tuple[int, int]
    masks: Sequence[Mask]


@functools.lru_cache(maxsize=1)  # of several hundred MB; each record's reading needs it
def load(path: Path) -> Mapping[str, Annotation]:
    """Reads `trainval_merged.json`, once for all calls with the same path.

    Args:
      path: a JSON object with `images` (`image_id`, `file_name`, `height`, `width`) and
        `annos_segmentation` (`image_id`, `category_id`, `segmentation` with `size` and `counts`).

    Returns:
      An annotation for each image, by the name of its file without the ending.

    Raises:
      FileNotFoundError: there is no such file; the message starts with the path.
      ValueError: not such a file, likewise.
    """
    names, sizes, masks = {}, {}, collections.defaultdict(list)
    try:
        for key, item in _items(decoding.read_file(path).decode()):
            if key == "images":
                names[item["image_id"]] = Path(item["file_name"]).stem
                sizes[item["image_id"]] = item["height"], item["width"]
            elif key == "annos_segmentation":
                runs = item["segmentation"]
                mask = Mask(item["category_id"], tuple(runs["size"]), runs["counts"])
                masks[item["image_id"]].append(mask)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not the annotations of PASCAL in Detail: {error!r}") from error
    if not names or not masks:
        raise ValueError(f"{path}: has {len(names)} images, and masks for {len(masks)}")
    return {name: Annotation(sizes[number], masks[number]) for number, name in names.items()}


def _items(text: str) -> Iterator[tuple[str, Any]]:
    """Gives the items of the lists in a JSON object one by one, each with its list's key.

    So the file's many other objects (parts, joints, occlusion) never are in memory together: every
    process that reads records reads this file.

    Raises:
      ValueError, IndexError: not such a text, or cut off.
    """
    decode = json.JSONDecoder().raw_decode
    place = _skip(text, 0, "{")
    while text[place] != "}":
        key, place = decode(text, place)
        place = _skip(text, place, ":")
        if text[place] == "[":
            place = _skip(text, place, "[")
            while text[place] != "]":
                item, place = decode(text, place)
                yield key, item
                place = _skip(text, place, ",", last="]")
            place = _skip(text, place, "]")
        else:
            _, place = decode(text, place)
        place = _skip(text, place, ",", last="}")


def _skip(text: str, place: int, sign: str, last: str = "") -> int:
    """The place after a sign and the spaces around it; at `last`, if that stands there instead."""
    place = SPACES.match(text, place).end()
    if text[place : place + 1] != sign:
        if last and text[place] == last:
            return place
        raise ValueError(f"expected {sign!r} at character {place}")
    return SPACES.match(text, place + 1).end()


def paint(annotation: Annotation) -> np.ndarray:
    """Draws an image's masks.

    Returns:
      int32 [h, w]: ids of categories, 0 where there is no mask.

    Raises:
      ValueError: a mask of another size, or one whose runs do not fill it.
    """
    ids_hw = np.zeros(annotation.size, np.int32)
    for mask in annotation.masks:
        if mask.size != tuple(annotation.size):
            sizes = f"{mask.size}, its image {annotation.size}"
            raise ValueError(f"category {mask.category}: the mask's size is {sizes}")
        ids_hw[decode_mask(mask.runs, mask.size)] = mask.category
    return ids_hw


def decode_mask(runs: str, size: tuple[int, int]) -> np.ndarray:
    """Decodes a compressed run-length encoding.

    Args:
      runs: as in `Mask`.
      size: height and width.

    Returns:
      bool [h, w].

    Raises:
      ValueError: the runs do not fill the size.
    """
    height, width = size
    lengths = np.asarray(_decode_lengths(runs), np.int64)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"the runs of a mask do not fill its {height}x{width} pixels")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def _decode_lengths(runs: str) -> list[int]:
    """Numbers of five bits a character, lowest first; from the fourth on, as differences."""
    lengths = []
    value = shift = 0
    for character in runs:
        code = ord(character) - FIRST_CHARACTER
        if not 0 <= code <= LARGEST:
            raise ValueError(f"{character!r} does not belong in the runs of a mask")
        value |= (code & (2**BITS - 1)) << shift
        shift += BITS
        if code & MORE:
            continue
        if code & NEGATIVE:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the runs of a mask end in the middle of a number")
    return lengths
