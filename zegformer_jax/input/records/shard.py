"""One shard of records, written in its own process: no jax and no TensorFlow here."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from zegformer_jax.input import decoding
from zegformer_jax.input.benchmarks.benchmark import Benchmark, Example
from zegformer_jax.input.unknown import UnknownValues, Value
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import Vocabulary

# Groups of one record, as TFDS writes them, for random access; JPEG and PNG are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"


class BadRecord(NamedTuple):
    """A record that cannot be used.

    Attributes:
        split: Split of the record.
        id: Id of the record.
        reason: Description of the error; begins with the path of the file.
        unknown: Values of the label that are neither a class's nor ignored, if that is the error.
    """

    split: str
    id: str
    reason: str
    unknown: tuple[Value, ...] = ()

    def __str__(self) -> str:
        """Returns a line of a list."""
        return f"{self.split} {self.id}: {self.reason}"


class Shard(NamedTuple):
    """Input of a shard.

    Attributes:
        benchmark: Data set that reads the examples.
        vocabulary: Vocabulary of the labels.
        split: Split of the examples.
        examples: Examples of this shard.
        name: Name of the shard's file.
        partial: Path of the local file to write.
    """

    benchmark: Benchmark
    vocabulary: Vocabulary
    split: str
    examples: Sequence[Example]
    name: str
    partial: str


class Contents(NamedTuple):
    """Summary of a written shard.

    Attributes:
        ids: Id of each record.
        classes: Classes in each record's label.
        pixels: Number of pixels of each class.
        ignored: Number of pixels without a label.
        bad: Records that were left out.
        size: Size of the shard's file in bytes.
        digest: Hash of the records' bytes.
        fingerprint: Hash of the shard's input; see `fingerprint_of`.
    """

    ids: list[str]
    classes: list[list[int]]
    pixels: list[int]
    ignored: int
    bad: list[BadRecord]
    size: int
    digest: str
    fingerprint: str

    def to_json(self) -> str:
        """Returns the JSON text that `from_json` reads."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str | bytes) -> "Contents":
        """Reads the text of `to_json`; raises ValueError or TypeError for other texts."""
        fields = json.loads(text)
        return cls(**fields | {"bad": [BadRecord(*record) for record in fields["bad"]]})


def write_shard(shard: Shard) -> Contents:
    """Writes a shard of the examples that can be read.

    Args:
        shard: Examples and the file to write.

    Returns:
        Summary of the written and the bad records.

    Raises:
        OSError: The shard cannot be written; the message starts with its path.
    """
    fingerprint, digest = fingerprint_of(shard), hashlib.sha256()
    ids, counts, bad = [], [], []
    try:
        writer = array_record_module.ArrayRecordWriter(shard.partial, WRITER_OPTIONS)
        for example in shard.examples:
            try:
                record, pixels = _read(shard, example)
            except Exception as error:  # damaged files make libraries raise nearly anything
                unknown = error.values if isinstance(error, UnknownValues) else ()
                bad.append(BadRecord(shard.split, example.id, _reason(error, example), unknown))
                continue
            writer.write(record)
            digest.update(record)
            ids.append(example.id)
            counts.append(pixels)
        writer.close()
    except RuntimeError as error:  # array_record raises nothing else
        raise OSError(f"{shard.partial}: cannot be written: {error}") from error
    pixels_nc = np.array(counts, np.int64).reshape(len(counts), len(shard.vocabulary) + 1)
    return Contents(
        ids=ids,
        classes=[np.flatnonzero(pixels[:-1]).tolist() for pixels in pixels_nc],
        pixels=pixels_nc[:, :-1].sum(0).tolist(),
        ignored=int(pixels_nc[:, -1].sum()),
        bad=bad,
        size=os.path.getsize(shard.partial),
        digest=digest.hexdigest(),
        fingerprint=fingerprint,
    )


def fingerprint_of(shard: Shard) -> str:
    """Hash of a shard's input: ids, sizes and times of the files, and the classes."""
    classes = shard.vocabulary
    values = (classes.ids, classes.ignore_label, classes.ignored_ids)
    values += (classes.colours, classes.ignored_colours)
    values += (classes.names, classes.ignored_names)
    digest = hashlib.sha256(repr(values).encode())
    for example in shard.examples:
        digest.update(os.fsencode(f"{example.id}\n"))
        for path in (example.image, example.label):
            try:
                status = os.stat(path)
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(b"missing\n")
    return digest.hexdigest()


def _reason(error: Exception, example: Example) -> str:
    """Returns one line that begins with a path."""
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith((str(example.image), str(example.label))):
        return text
    return f"{example.image}, {example.label}: {text}"


def _read(shard: Shard, example: Example) -> tuple[bytes, np.ndarray]:
    """Reads and checks a record.

    Returns:
        A serialized tf.train.Example; and int64 [C + 1], the pixels of each class and those
        without a label.
    """
    image_hw3, label_hw = shard.benchmark.read(example)
    if image_hw3.dtype != np.uint8 or image_hw3.shape != (*label_hw.shape, 3):
        shapes = f"{label_hw.shape}, but {example.image.name} is {image_hw3.shape[:2]}"
        raise UserError(f"{example.label}: expected the image's size: {shapes}")
    pixels = _count_pixels(label_hw, shard.vocabulary, example)
    features = {
        "image": shard.benchmark.encoded_image(example) or decoding.encode_png(image_hw3),
        "label": decoding.encode_png(label_hw.astype(shard.vocabulary.label_dtype)),
        "id": example.id.encode(),
    }
    record = tf_example_pb2.Example()
    for name, value in features.items():
        record.features.feature[name].bytes_list.value.append(value)
    return record.SerializeToString(deterministic=True), pixels


def _count_pixels(label_hw: np.ndarray, vocabulary: Vocabulary, example: Example) -> np.ndarray:
    counts = np.bincount(label_hw.ravel(), minlength=vocabulary.ignore_label + 1)
    places = [*range(len(vocabulary)), vocabulary.ignore_label]
    pixels = counts[places]
    counts[places] = 0
    if counts.any():
        raise UserError(
            f"{example.label}: label {np.flatnonzero(counts)[0]} is not a class of the vocabulary "
            f"(0..{len(vocabulary) - 1}) nor the ignore label {vocabulary.ignore_label}"
        )
    return pixels
