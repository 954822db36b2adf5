"""Data sets by name, as sources of records."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from zegformer_jax.input import benchmarks, folder
from zegformer_jax.input.benchmarks import FOLDER, GENERATED
from zegformer_jax.input.label_counts import LabelCounts, count_labels
from zegformer_jax.input.records import read
from zegformer_jax.input.shapes.labels import has_shapes
from zegformer_jax.input.unknown import UnknownValues
from zegformer_jax.runtime.environment import PROGRAM
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.vocabulary import Vocabulary


class Source(Protocol):
    """Records with random access, which several threads may read at once.

    `source[i]` is a dict: `image` uint8 RGB [h, w, 3]; `label` uint8 or uint16 [h, w] in the
    vocabulary's order 0..C-1 or the ignore label; `id`, a text that names the record.
    """

    def __len__(self) -> int:
        """Returns the number of records."""

    def __getitem__(self, index: int) -> dict:
        """Reads a record."""

    def records_with(self, classes: Sequence[int]) -> np.ndarray:
        """Returns the indices of the records that show any of these classes: int64, rising.

        Reads all labels unless the classes of each record are stored.
        """

    def count_labels(self, wanted: Sequence[int]) -> LabelCounts | None:
        """Counts the pixels of the classes.

        Args:
            wanted: Indices of classes; if all of them have pixels, not all labels may be counted.

        Returns:
            The counts; None if the labels are made by this program.
        """

    def fingerprint(self) -> str:
        """Returns a hash of the records that needs no decoding."""


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Images and label images in folders.

    Attributes:
        image_files: Image of each record.
        label_files: Label image of each record; pixel values are ids of the annotation.
        vocabulary: Classes and ignored ids of the pixel values; other values are errors.
        ids: Id of each record; empty: the stems of `image_files`.
    """

    image_files: Sequence[Path]
    label_files: Sequence[Path]
    vocabulary: Vocabulary
    ids: Sequence[str] = ()

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self.image_files)

    def __getitem__(self, index: int) -> dict:
        """Reads a record; see `Source`.

        Raises:
            MissingFile: A file is missing.
            UserError: A file is damaged, or the label image has several channels, another size
                than its image or an unknown id; the message names the file.
        """
        image_file, label_file = self.image_files[index], self.label_files[index]
        image_hw3, label_hw = folder.read_files(image_file, label_file, self.vocabulary)
        id_ = self.ids[index] if self.ids else image_file.stem
        return {"image": image_hw3, "label": label_hw, "id": id_}

    def records_with(self, classes: Sequence[int]) -> np.ndarray:
        """Returns the indices of the records that show any of these classes; see `Source`."""
        return read.scan_labels(self._read_label, len(self), classes)

    def count_labels(self, wanted: Sequence[int]) -> LabelCounts:
        """Counts the pixels of the classes by reading labels; see `label_counts.count_labels`.

        Raises:
            UserError: A label cannot be used; the message names the file, or the folder of several.
        """
        try:
            return count_labels(self._read_label, len(self), self.vocabulary, wanted)
        except UnknownValues as error:
            place = os.path.commonpath([path.parent for path in self.label_files])
            is_named = str(error).startswith(place)
            raise UserError(str(error) if is_named else f"{place}: {error}") from None

    def _read_label(self, index: int) -> np.ndarray:
        return folder.read_label(self.label_files[index], self.vocabulary)

    def fingerprint(self) -> str:
        """Returns a hash of the ids and of the files' names, sizes and times."""
        files = [(path.name, path.stat()) for path in (*self.image_files, *self.label_files)]
        known = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
        return hashlib.sha256(repr((self.ids, known)).encode()).hexdigest()


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
        name: A benchmark, whose records are prepared in `data_dir`; `folder`, a user's folder,
            prepared or as it is, see `folder.GUIDE`; or `openmoji_voc`, generated under `data_dir`
            if it does not exist.
        split: `train` or `validation`; for `folder` the name of a sub-folder or list.
        data_dir: The data set's directory; prepared records may be in a bucket (gs://...).
        vocabulary: Meaning of the annotation's ids and of prepared labels.
        **builder_options: For `openmoji_voc`: train_scenes, validation_scenes, side, seed.

    Raises:
        MissingFile: A folder is missing or has no images, or nothing is prepared there.
        UserError: There is no such data set or split, the prepared records have other classes, or
            the data set takes no options.
    """
    if name == GENERATED:
        from zegformer_jax.input.openmoji.builder import prepare

        return read.RecordSource(prepare(data_dir, **builder_options), split)
    names = benchmarks.names()
    if name not in names:
        raise UserError(f"no data set {name!r}; there are {', '.join(names)}")
    if builder_options:
        options = ", ".join(builder_options)
        other = "folder.py:tiny" if name == FOLDER else "pascal_voc.py:r50"
        raise UserError(
            f"data set {name!r} takes no options, got {options}, as a config of the built-in "
            f"benchmark has; take one without dataset.options, such as configs/{other}: "
            "docs/datasets.md has the command"
        )
    if read.is_prepared(data_dir):
        found = read.read_info(data_dir)["name"]
        if found != name:
            raise UserError(f"{data_dir}: holds the data set '{found}', not '{name}'")
        return read.PreparedSource(data_dir, split, vocabulary=vocabulary)
    if name == FOLDER:
        return _open_folder(Path(data_dir), split, vocabulary)
    raise MissingFile(
        f"{data_dir}: no records of '{name}' are prepared here (dataset.directory): "
        f"{PROGRAM} prepare {name} --source=DIR --destination={data_dir}"
    )


def _open_folder(root: Path, split: str, vocabulary: Vocabulary) -> FileSource:
    examples = folder.list_examples(root, split)
    shapes = [label for _, _, label in examples if has_shapes(label)]
    if shapes:
        raise UserError(
            f"{shapes[0]}: polygons are not read as they are; prepare records and name them as "
            f"dataset.directory: {PROGRAM} prepare folder --source={root} --destination=DIR"
        )
    paths = list(itertools.chain.from_iterable((image, label) for _, image, label in examples))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise MissingFile(
            f"{missing[0]}: no such file ({len(missing)} of {len(paths)} images and annotations "
            f"are missing); add what is missing, or take its image out of {split}"
        )
    ids, images, labels = zip(*examples, strict=True)
    return FileSource(images, labels, vocabulary, ids)
