"""Folders of pictures and labels, for tests: as users have them."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from zegformer_jax.input.folder import Folder

CLASSES = [
    {"id": 3, "name": "sky", "seen": True},
    {"id": 7, "name": "road, street", "seen": False},
    {"id": 1, "name": "car", "seen": True},
]
IGNORED = 9


def make_folder(root: Path, train: int = 8, validation: int = 3) -> Path:
    """Pictures of odd sizes and of every kind; the labels of `labels_of`."""
    root.mkdir(parents=True, exist_ok=True)
    content = {"classes": CLASSES, "ignored_ids": [IGNORED]}
    (root / "classes.json").write_text(json.dumps(content))
    for split, count in (("train", train), ("validation", validation)):
        for kind in ("images", "annotations"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            add_record(root / split, index)
    return root


def add_record(folder: Path, index: int) -> None:
    rng = np.random.default_rng(index)
    height, width = 17 + index, 31 - index % 5
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    picture = small.resize((width, height), Image.Resampling.BICUBIC)
    kinds = [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpeg"), ("RGB", "png"), ("P", "png")]
    mode, suffix = kinds[index % len(kinds)]
    picture.convert(mode).save(folder / "images" / f"{index:03d}.{suffix}")
    ids = np.array([3, 7, 1, IGNORED, 255], np.uint8)
    ids_hw = ids[rng.integers(0, 5, (height, width))]
    if index % 4 == 1:
        ids_hw[...] = np.where(ids_hw % 2 == 0, ids_hw, 7)  # of the unseen class alone
    label = Image.fromarray(ids_hw)
    if index % 2:
        label = Image.frombytes("P", label.size, label.tobytes())
        label.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    label.save(folder / "annotations" / f"{index:03d}.png")


def colour_labels(root: Path, colours: dict[int, tuple[int, int, int]]) -> Path:
    """Turns ids of the labels into colours, in PNG in RGB, RGBA or with a palette in turn."""
    content = json.loads((root / "classes.json").read_text())
    for item in content["classes"]:
        item["colour"] = colours[item.pop("id")]
    del content["ignored_ids"]
    content["ignored_colours"] = [colours[IGNORED], colours[255]]
    (root / "classes.json").write_text(json.dumps(content))
    for index, path in enumerate(sorted(root.glob("*/annotations/*.png"))):
        with Image.open(path) as label:
            ids_hw = np.array(label)
        table = np.zeros((256, 3), np.uint8)
        table[list(colours)] = list(colours.values())
        image = Image.fromarray(table[ids_hw])
        modes = (image, image.convert("RGBA"), image.quantize(len(colours)))
        modes[index % 3].save(path)
    return root


def label_of(folder: Path, id_: str) -> np.ndarray:
    """A record's label, worked out value by value."""
    with Image.open(folder / "annotations" / f"{id_}.png") as picture:
        ids_hw = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.size[::-1])
    return np.vectorize({3: 0, 7: 1, 1: 2, IGNORED: 255, 255: 255}.get)(ids_hw)


def files_of(directory: Path) -> dict[str, bytes]:
    """The content of all files under a directory, by relative path."""
    files = (path for path in Path(directory).rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@dataclasses.dataclass(frozen=True)
class SlowFolder(Folder):
    """A folder on a slow disk."""

    def read(self, example):
        time.sleep(0.1)
        return super().read(example)
