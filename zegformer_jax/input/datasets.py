"""Data sets by name, as sources: a length, and records by index."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from zegformer_jax.vocabulary import Vocabulary

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class Source(Protocol):
    """Records with random access; may be read from several threads at once.

    `source[i]` is a dict: `image` uint8 RGB [h, w, 3]; `label` uint8 or uint16 [h, w] in the
    vocabulary's order 0..C-1 or the ignore label; `id` a text that names the record.
    """

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> dict:
        """Reads a record."""


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Records held in memory, mainly for tests and small sets.

    Attributes:
      images: uint8 RGB [h, w, 3] each.
      labels: uint8 or uint16 [h, w] each, in the vocabulary's order.
      ids: a text each.
    """

    images: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    ids: Sequence[str]

    def __len__(self) -> int:
        """Number of records."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        """Reads a record; see `Source`."""
        return {"image": self.images[index], "label": self.labels[index], "id": self.ids[index]}


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Pictures and label pictures in folders.

    Attributes:
      image_files: one path a record.
      label_files: one path a record; the pixel values are ids of the annotation.
      vocabulary: its `ids` say which pixel values are classes; all others are ignored.
    """

    image_files: Sequence[Path]
    label_files: Sequence[Path]
    vocabulary: Vocabulary

    def __len__(self) -> int:
        """Number of records."""
        return len(self.image_files)

    def __getitem__(self, index: int) -> dict:
        """Reads a record; see `Source`.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a label picture has several channels or another size than its picture.
        """
        image_file, label_file = self.image_files[index], self.label_files[index]
        with Image.open(image_file) as image:
            image_hw3 = np.asarray(image.convert("RGB"))
        with Image.open(label_file) as label:
            ids_hw = np.asarray(label)
        if ids_hw.ndim != 2 or ids_hw.shape != image_hw3.shape[:2]:
            shapes = f"{ids_hw.shape}, but {image_file.name} is {image_hw3.shape[:2]}"
            raise ValueError(f"{label_file}: expected one channel and the picture's size: {shapes}")
        table = self.vocabulary.annotation_table()
        known_hw = (ids_hw >= 0) & (ids_hw < len(table))
        label_hw = table[np.where(known_hw, ids_hw, self.vocabulary.ignore_label)]
        return {"image": image_hw3, "label": label_hw, "id": image_file.stem}


class RecordSource:
    """Records of a prepared TFDS builder whose features are image, label and id.

    Args:
      builder: with `file_format="array_record"`, so that records have random access.
      split: the split's name.
    """

    def __init__(self, builder, split: str):
        import tensorflow_datasets as tfds

        skip = tfds.decode.SkipDecoding()
        self._records = builder.as_data_source(split, decoders={"image": skip, "label": skip})
        self._records[0]  # the reader opens its files at the first read; not from several threads

    def __len__(self) -> int:
        """Number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        """Reads a record; see `Source`."""
        record = self._records[int(index)]
        return {
            "image": _decode(record["image"], "RGB"),
            "label": _decode(record["label"], None),
            "id": record["id"].decode(),
        }


def _decode(data: bytes, mode: str | None) -> np.ndarray:
    import io

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert(mode) if mode else image)


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | Path,
    vocabulary: Vocabulary,
    **builder_options: int,
) -> Source:
    """Opens a data set by name.

    Args:
      name: "openmoji_voc" (generated under `data_dir` where it is not there yet) or
        "folder", which has `{split}/images` and `{split}/annotations` with files of the same stems.
      split: "train" or "validation"; for a "folder" the name of its sub-folder.
      data_dir: the data set's folder.
      vocabulary: gives the meaning of the annotation's ids.
      **builder_options: for "openmoji_voc": train_scenes, validation_scenes, side, seed.

    Raises:
      FileNotFoundError: a folder is missing or has no pictures.
      ValueError: no such data set or split, or options for a data set that takes none.
    """
    if name == "openmoji_voc":
        from zegformer_jax.input.builders import openmoji_voc

        return RecordSource(openmoji_voc.prepare(data_dir, **builder_options), split)
    if builder_options:
        options = ", ".join(builder_options)
        raise ValueError(f"data set {name!r} takes no options, got {options}")
    if name == "folder":
        return _open_folder(Path(data_dir) / split, vocabulary)
    raise ValueError(f"no data set {name!r}; there are folder, openmoji_voc")


def _open_folder(folder: Path, vocabulary: Vocabulary) -> FileSource:
    files = _existing(folder / "images").iterdir()
    images = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise FileNotFoundError(f"{folder / 'images'}: no .jpg or .png pictures")
    labels = [_existing(folder / "annotations") / f"{image.stem}.png" for image in images]
    missing = [label for label in labels if not label.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no label picture ({len(missing)} are missing)")
    return FileSource(images, labels, vocabulary)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; see data/README.md for the layout")
    return folder
