"""Prepared records: TFRecord shards in TFDS's layout, and an index that gives access by place.

A prepared directory is local or remote (gs://...) and holds, for a data set "name":
  name-train.tfrecord-00000-of-00042, ...   the records: features image, label, id
  train.index.npz, ...                      where each record lies, and which classes it shows
  classes.json                              the vocabulary that the labels follow
  dataset_info.json, features.json          TFDS's, for `tfds.builder_from_directory`
  prepared.json                             what was prepared; written last
  sheet.png                                 twelve records with their labels
"""

import io
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from zegformer_jax.input import decoding, tfrecords
from zegformer_jax.vocabulary import Vocabulary

CLASSES_FILE = "classes.json"
INFO_FILE = "prepared.json"
ANEW = "remove the directory and prepare the data set anew"


class Index(NamedTuple):
    """Where a split's n records lie.

    Attributes:
      shard: int32 [n], the number of its shard.
      offset: int64 [n], bytes before it in the shard.
      length: int64 [n], bytes, with TFRecord's own.
      checksum: uint32 [n], CRC-32 of these bytes.
      classes: uint8 [n, ceil(C / 8)], a bit a class (`np.packbits`): whether a pixel shows it.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    checksum: np.ndarray
    classes: np.ndarray


class PreparedSource:
    """A split of a prepared directory; a `zegformer_jax.input.datasets.Source`.

    A record is read from its place each time; nothing but the index is held in memory, no file
    stays open, and any number of threads may read.

    Args:
      directory: local, or remote as gs://...
      split: "train" or "validation" ("val").
      vocabulary: what the labels are expected to follow; None takes the directory's own.

    Attributes:
      vocabulary: the directory's, in whose order the labels are.

    Raises:
      FileNotFoundError: nothing is prepared there, or not this split.
      ValueError: the vocabulary has other classes than the directory's, or a file is damaged.
    """

    def __init__(
        self, directory: str | Path, split: str, *, vocabulary: Vocabulary | None = None
    ) -> None:
        self._directory, self._split = str(directory), {"val": "validation"}.get(split, split)
        info = read_info(directory)
        if self._split not in info["splits"]:
            splits = ", ".join(info["splits"])
            raise FileNotFoundError(f"{directory}: '{split}' was not prepared, only {splits}")
        self._name = info["name"]
        self._num_shards = info["splits"][self._split]["shards"]
        self.vocabulary = read_classes(directory)
        if vocabulary is not None:
            _check_vocabulary(self.vocabulary, vocabulary, join(directory, CLASSES_FILE))
        self._index = read_index(join(directory, index_name(self._split)))

    def __len__(self) -> int:
        """Number of records."""
        return len(self._index.shard)

    def __getitem__(self, index: int) -> dict:
        """Reads a record; see `Source`.

        Raises:
          FileNotFoundError: its shard is missing.
          ValueError: its bytes are not those that were written; the message names the shard.
        """
        features = self._features(index)
        where = f"{self._shard(index)}: record '{features['id'].decode()}'"
        return {
            "image": decoding.decode_image(features["image"], where),
            "label": decoding.decode_label(features["label"], where),
            "id": features["id"].decode(),
        }

    def encoded_image(self, index: int) -> bytes:
        """A record's picture as it is stored, JPEG or PNG."""
        return self._features(index)["image"]

    def records_with(self, classes: Sequence[int]) -> np.ndarray:
        """Places of the records that show any of these classes: int64, rising."""
        wanted = np.zeros(len(self.vocabulary), bool)
        wanted[list(classes)] = True
        return np.flatnonzero((self._index.classes & np.packbits(wanted)[None]).any(1))

    def _shard(self, index: int) -> str:
        number = int(self._index.shard[index])
        name = shard_name(self._name, self._split, number, self._num_shards)
        return join(self._directory, name)

    def _features(self, index: int) -> dict[str, bytes]:
        path = self._shard(index)
        offset, length = int(self._index.offset[index]), int(self._index.length[index])
        record = read_bytes(path, offset, length)
        if zlib.crc32(record) != self._index.checksum[index]:
            raise ValueError(f"{path}: the record at byte {offset} is damaged: {ANEW}")
        data = record[tfrecords.HEADER_BYTES : -tfrecords.FOOTER_BYTES]
        example = tf.train.Example.FromString(data)
        return {key: value.bytes_list.value[0] for key, value in example.features.feature.items()}


def _check_vocabulary(stored: Vocabulary, wanted: Vocabulary, where: str) -> None:
    """Labels are places: names and their order must agree; which are seen is free."""
    if len(stored) != len(wanted):
        raise ValueError(
            f"{where}: {len(stored)} classes, but the config's vocabulary (dataset.vocabulary) has "
            f"{len(wanted)}"
        )
    for place, (one, other) in enumerate(zip(stored.names, wanted.names, strict=True)):
        if one != other:
            raise ValueError(
                f"{where}: class {place} is '{one}', but '{other}' in the config's vocabulary "
                "(dataset.vocabulary)"
            )
    if stored.ignore_label != wanted.ignore_label:
        raise ValueError(
            f"{where}: the ignore label is {stored.ignore_label}, but {wanted.ignore_label} in the "
            "config's vocabulary (dataset.vocabulary)"
        )


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """File name of a shard, as TFDS has it."""
    return f"{name}-{split}.tfrecord-{number:05d}-of-{count:05d}"


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.npz"


def join(directory: str | Path, name: str) -> str:
    """The path of a file in a local or remote directory."""
    return os.path.join(str(directory), name)


def is_remote(directory: str | Path) -> bool:
    """Whether a directory is one that only TensorFlow's files reach, as gs://..."""
    return "://" in str(directory)


def is_prepared(directory: str | Path) -> bool:
    """Whether a directory holds prepared records."""
    return tf.io.gfile.exists(join(directory, INFO_FILE))


def read_info(directory: str | Path) -> dict[str, Any]:
    """Reads what was prepared: `name`, and `splits` with their numbers of records and shards.

    Raises:
      FileNotFoundError: nothing was prepared there, or not to the end.
      ValueError: the file is damaged.
    """
    path = join(directory, INFO_FILE)
    if not is_prepared(directory):
        raise FileNotFoundError(f"{path}: no such file: no records were prepared here")
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def read_classes(directory: str | Path) -> Vocabulary:
    """Reads the vocabulary that a prepared directory's labels follow."""
    path = join(directory, CLASSES_FILE)
    return Vocabulary.parse(read_bytes(path), path)


def read_index(path: str) -> Index:
    """Reads an index.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is damaged.
    """
    data = read_bytes(path)
    try:
        with np.load(io.BytesIO(data)) as arrays:
            return Index(**{name: arrays[name] for name in Index._fields})
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise ValueError(f"{path}: damaged ({error}): {ANEW}") from error


def read_bytes(path: str, offset: int = 0, length: int | None = None) -> bytes:
    """Reads a local or remote file, or a part of it, less where the file ends before.

    Raises:
      FileNotFoundError: it is missing.
      OSError: it cannot be read.
    """
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            if offset:
                file.seek(offset)
            return file.read(-1 if length is None else length)
    except tf.errors.NotFoundError:
        raise FileNotFoundError(f"{path}: no such file: {ANEW}") from None
    except tf.errors.OutOfRangeError:  # it ends before the offset
        return b""
    except tf.errors.OpError as error:
        raise OSError(f"{path}: cannot be read: {error.message}") from error


def write_bytes(path: str, data: bytes) -> None:
    """Writes a local or remote file: all of it, or nothing.

    Raises:
      OSError: it cannot be written.
    """
    partial = f"{path}.partial"
    try:
        with tf.io.gfile.GFile(partial, "wb") as file:
            file.write(data)
        tf.io.gfile.rename(partial, path, overwrite=True)
    except tf.errors.OpError as error:
        raise OSError(f"{path}: cannot be written: {error.message}") from error
