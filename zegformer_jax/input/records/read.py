"""Sources of records: TFDS data sets in ArrayRecord files, local or in a bucket."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from zegformer_jax.input import decoding
from zegformer_jax.input.label_counts import LabelCounts
from zegformer_jax.input.records import storage
from zegformer_jax.input.records.storage import AGAIN, join
from zegformer_jax.runtime.errors import MAX_REASON, MissingFile, UserError, one_line, reading
from zegformer_jax.text.vocabulary import Vocabulary

CLASSES_FILE = "classes.json"
INFO_FILE = "prepared.json"
INFO_FIELDS = ("name", "splits", "digests", "contents", "left_out")
TFDS_FILE, FEATURES_FILE = "dataset_info.json", "features.json"
FEATURE_CLASS = ("pythonClassName", "python_class_name", "type")  # a class's name in FEATURES_FILE
TFDS_FEATURES = "tensorflow_datasets.core.features."


class RecordSource:
    """A split of a TFDS data set with image, label and id; a `zegformer_jax.input.datasets.Source`.

    Args:
        builder: TFDS builder of the data set, with ArrayRecord files.
        split: Name of the split.
    """

    def __init__(self, builder: Any, split: str) -> None:
        import tensorflow_datasets as tfds

        skip = tfds.decode.SkipDecoding()
        with reading(join(builder.data_dir, TFDS_FILE), AGAIN):
            self._records = builder.as_data_source(split, decoders={"image": skip, "label": skip})
            self._name = builder.info.full_name
            self._files = builder.info.splits[split].filepaths
            folder = os.fspath(builder.data_dir).rstrip("/")
            if any(os.path.dirname(x) != folder for x in self._files):
                raise ValueError("names files outside the directory")
            self._ends = np.cumsum(builder.info.splits[split].shard_lengths)

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        """Reads a record; see `Source`.

        Raises:
            UserError: The record's shard is missing or damaged; the message names the shard.
        """
        features = self._features(index)
        where = f"{self._shard(index)}: record '{features['id'].decode()}'"
        return {
            "image": decoding.decode_image(features["image"], where),
            "label": decoding.decode_label(features["label"], where),
            "id": features["id"].decode(),
        }

    def encoded_image(self, index: int) -> bytes:
        """Returns a record's image as it is stored, JPEG or PNG."""
        return self._features(index)["image"]

    def records_with(self, classes: Sequence[int]) -> np.ndarray:
        """Returns the indices of the records that show any of these classes: int64, rising."""
        return scan_labels(lambda i: self[i]["label"], len(self), classes)

    def count_labels(self, wanted: Sequence[int]) -> LabelCounts | None:
        """Returns None: the labels are made by this program."""
        return None

    def fingerprint(self) -> str:
        """Returns a hash of the data set's name, version and number of records."""
        return hashlib.sha256(repr((self._name, len(self))).encode()).hexdigest()

    def _features(self, index: int) -> dict[str, bytes]:
        try:
            features = self._records[int(index)]
            if not all(isinstance(features[name], bytes) for name in ("id", "image", "label")):
                raise TypeError(f"{FEATURES_FILE} names other features")
            return features
        except IndexError:
            raise
        except Exception as error:  # array_record's RuntimeError, TFDS's and protocol buffers' own
            where, reason = self._shard(index), one_line(error)[:MAX_REASON]
            raise UserError(f"{where}: cannot be read ({reason}); if damaged, {AGAIN}") from error

    def _shard(self, index: int) -> str:
        return os.fspath(self._files[np.searchsorted(self._ends, index, side="right")])


class PreparedSource(RecordSource):
    """A split of a prepared directory; a `zegformer_jax.input.datasets.Source`.

    Args:
        directory: Directory of the records, local or in a bucket (gs://...).
        split: `train` or `validation` (`val`).
        vocabulary: Expected vocabulary of the labels; None accepts the directory's own.

    Attributes:
        vocabulary: The directory's vocabulary, in whose order the labels are.
        ids: Id of each record.

    Raises:
        MissingFile: The directory or the split was not prepared.
        UserError: The vocabulary has other classes than the directory's, or a file is damaged.
    """

    def __init__(
        self, directory: str | Path, split: str, *, vocabulary: Vocabulary | None = None
    ) -> None:
        split = {"val": "validation"}.get(split, split)
        info = read_info(directory)
        if split not in info["splits"]:
            splits = ", ".join(info["splits"])
            raise MissingFile(f"{directory}: '{split}' was not prepared, only {splits}")
        self.vocabulary = read_classes(directory)
        if vocabulary is not None:
            _check_vocabulary(self.vocabulary, vocabulary, join(directory, CLASSES_FILE))
        path = join(directory, INFO_FILE)
        with reading(path, AGAIN):
            self._digest = str(info["digests"][split])
            contents = info["contents"][split]
            pixels = np.array(contents["pixels"], np.int64)
            if pixels.shape != (len(self.vocabulary),):
                raise ValueError(f"pixels of {pixels.shape} classes, not {len(self.vocabulary)}")
            self._counts = LabelCounts(pixels, int(contents["ignored"]))
        path = join(directory, index_name(split))
        index = storage.read_json(path)
        with reading(path, AGAIN):
            self.ids: Sequence[str] = index["ids"]
            self._classes: Sequence[Sequence[int]] = index["classes"]
            _check_index(self.ids, self._classes, contents["records"])
        super().__init__(_open_builder(directory), split)

    def records_with(self, classes: Sequence[int]) -> np.ndarray:
        """Returns the indices of the records that show any of these classes: int64, rising."""
        wanted = frozenset(classes)
        return np.flatnonzero([not wanted.isdisjoint(shown) for shown in self._classes])

    def count_labels(self, wanted: Sequence[int]) -> LabelCounts:
        """Returns the pixels of the classes, which were counted by the preparation."""
        return self._counts

    def fingerprint(self) -> str:
        """Returns the hash of the records' bytes from their preparation."""
        return self._digest

    def _features(self, index: int) -> dict[str, bytes]:
        features, id_ = super()._features(index), self.ids[index]
        if features["id"].decode() != id_:
            found = features["id"].decode()
            raise UserError(
                f"{self._shard(index)}: has record '{found}' in place of '{id_}': {AGAIN}"
            )
        return features


def _check_index(ids: Any, classes: Any, count: Any) -> None:
    """Raises an error if an index is not of `count` ids, and as many lists of classes."""
    if not len(ids) == len(classes) == count:
        raise ValueError(f"{len(ids)} ids and {len(classes)} lists of classes, not {count}")
    if not all(isinstance(id_, str) for id_ in ids):
        raise TypeError("an id is no text")
    if not all(type(index) is int for shown in classes for index in shown):
        raise TypeError("a class is no number")


def _open_builder(directory: str | Path) -> Any:
    import tensorflow_datasets as tfds

    _check_features(join(directory, FEATURES_FILE))
    try:
        return tfds.builder_from_directory(os.fspath(directory))
    except Exception as error:  # JSON's, protocol buffers' and TFDS's own
        path = join(directory, TFDS_FILE)
        reason = one_line(error)[:MAX_REASON]
        raise UserError(f"{path}: missing or damaged ({reason}): {AGAIN}") from error


def _check_features(path: str) -> None:
    """Refuses other classes than TFDS's own, as it imports the module of any that a file names.

    Raises:
        UserError: The file names another class, or is damaged.
    """
    left = [storage.read_json(path)]
    while left:
        item = left.pop()
        if isinstance(item, list):
            left += item
        if not isinstance(item, dict):
            continue
        left += item.values()
        for key in FEATURE_CLASS:
            if not str(item.get(key, TFDS_FEATURES)).startswith(TFDS_FEATURES):
                raise UserError(f"{path}: names {item[key]!r}, which is no class of TFDS: {AGAIN}")


def _check_vocabulary(stored: Vocabulary, wanted: Vocabulary, where: str) -> None:
    """Compares the names in their order, which labels depend on; seen flags may differ."""
    if len(stored) != len(wanted):
        raise UserError(
            f"{where}: {len(stored)} classes, but the config's vocabulary (dataset.vocabulary) has "
            f"{len(wanted)}"
        )
    for place, (one, other) in enumerate(zip(stored.names, wanted.names, strict=True)):
        if one != other:
            raise UserError(
                f"{where}: class {place} is '{one}', but '{other}' in the config's vocabulary "
                "(dataset.vocabulary)"
            )
    if stored.ignore_label != wanted.ignore_label:
        raise UserError(
            f"{where}: the ignore label is {stored.ignore_label}, but {wanted.ignore_label} in the "
            "config's vocabulary (dataset.vocabulary)"
        )


def scan_labels(
    read_label: Callable[[int], np.ndarray], count: int, classes: Iterable[int]
) -> np.ndarray:
    """Finds the labels that show any of the classes by reading all labels.

    Args:
        read_label: Function from an index to a label map.
        count: Number of labels.
        classes: Indices of the classes.

    Returns:
        Indices of the labels: int64, rising.
    """
    wanted = np.asarray(list(classes))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shown = pool.map(lambda i: np.isin(read_label(i), wanted).any(), range(count))
        return np.flatnonzero(list(shown))


def index_name(split: str) -> str:
    """Returns the file name of a split's index."""
    return f"{split}.index.json"


def is_prepared(directory: str | Path) -> bool:
    """Returns whether a directory holds prepared records."""
    return tf.io.gfile.exists(join(directory, INFO_FILE))


def read_info(directory: str | Path) -> dict[str, Any]:
    """Reads the description of a prepared directory.

    Args:
        directory: Directory of the records, local or in a bucket (gs://...).

    Returns:
        `name` of the data set; `splits` with their numbers of records and shards; `digests` by
        split, hashes of the records; `contents` by split, see `summary.SplitCounts`; and
        `left_out`, see `shard.BadRecord`.

    Raises:
        MissingFile: Nothing was prepared there, or the preparation was not finished.
        UserError: The file is damaged.
    """
    path = join(directory, INFO_FILE)
    if not is_prepared(directory):
        raise MissingFile(f"{path}: no such file: no records were prepared here")
    info = storage.read_json(path)
    with reading(path, AGAIN):
        missing = [field for field in INFO_FIELDS if field not in info]
    if missing or not isinstance(info["splits"], dict):
        raise UserError(f"{path}: no '{missing[0] if missing else 'splits'}': {AGAIN}")
    return info


def read_classes(directory: str | Path) -> Vocabulary:
    """Reads the vocabulary that a prepared directory's labels follow."""
    path = join(directory, CLASSES_FILE)
    return Vocabulary.parse(storage.read_bytes(path), path)
