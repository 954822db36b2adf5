"""One shard of prepared records, written in a process of its own: no jax, no TensorFlow here."""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zegformer_jax.input import decoding, tfrecords
from zegformer_jax.input.benchmarks.benchmark import Benchmark, Example
from zegformer_jax.vocabulary import Vocabulary


class BadRecord(NamedTuple):
    """A record that cannot be used.

    Attributes:
      split: of the record.
      id: of the record.
      reason: what is wrong; begins with the path of the file.
    """

    split: str
    id: str
    reason: str

    def __str__(self) -> str:
        """The line of a list."""
        return f"{self.split} {self.id}: {self.reason}"


class Job(NamedTuple):
    """What a shard is made from.

    Attributes:
      benchmark: reads the examples.
      vocabulary: of the labels.
      split: of the examples.
      examples: of this shard.
      name: of the shard's file.
      partial: the local file to write.
    """

    benchmark: Benchmark
    vocabulary: Vocabulary
    split: str
    examples: Sequence[Example]
    name: str
    partial: str


class Note(NamedTuple):
    """What is known of a shard besides its records.

    Attributes:
      offset: as in `prepared.Index`.
      length: likewise.
      checksum: likewise.
      classes: likewise.
      pixels: int64 [C], pixels of each class.
      ignored: pixels without a label.
      bad: records that are not among them.
      fingerprint: of `fingerprint_of`, when the shard was made.
    """

    offset: np.ndarray
    length: np.ndarray
    checksum: np.ndarray
    classes: np.ndarray
    pixels: np.ndarray
    ignored: int
    bad: tuple[BadRecord, ...]
    fingerprint: str

    @property
    def size(self) -> int:
        """Bytes of the shard."""
        return int(self.length.sum())

    def pack(self) -> bytes:
        """Gives what `unpack` takes."""
        file = io.BytesIO()
        np.savez(file, **self._asdict() | {"bad": json.dumps(self.bad)})
        return file.getvalue()

    @classmethod
    def unpack(cls, data: bytes) -> "Note":
        """Takes what `pack` gave; raises errors of many kinds on anything else."""
        with np.load(io.BytesIO(data)) as arrays:
            fields = {name: arrays[name] for name in cls._fields}
        fields["ignored"] = int(fields["ignored"])
        fields["bad"] = tuple(BadRecord(*record) for record in json.loads(str(fields["bad"])))
        fields["fingerprint"] = str(fields["fingerprint"])
        return cls(**fields)


def write_shard(job: Job) -> Note:
    """Writes what can be read of a job's examples.

    Raises:
      OSError: the shard cannot be written; the message starts with its path.
    """
    try:
        return _write(job)
    except OSError as error:  # of a full disk Python does not say where
        raise OSError(f"{job.partial}: cannot be written: {error.strerror}") from error


def _write(job: Job) -> Note:
    fingerprint = fingerprint_of(job)
    lengths, checksums, counts, bad = [], [], [], []
    with open(job.partial, "wb") as file:
        for example in job.examples:
            try:
                record, pixels = _read(job, example)
            except Exception as error:  # whatever a reader meets in damaged files
                bad.append(BadRecord(job.split, example.id, _reason(error, example)))
                continue
            file.write(record)
            lengths.append(len(record))
            checksums.append(zlib.crc32(record))
            counts.append(pixels)
    length = np.array(lengths, np.int64)
    pixels_nc = np.array(counts, np.int64).reshape(len(counts), len(job.vocabulary) + 1)
    return Note(
        offset=np.cumsum(length) - length,
        length=length,
        checksum=np.array(checksums, np.uint32),
        classes=np.packbits(pixels_nc[:, :-1] > 0, axis=1),
        pixels=pixels_nc[:, :-1].sum(0),
        ignored=int(pixels_nc[:, -1].sum()),
        bad=tuple(bad),
        fingerprint=fingerprint,
    )


def fingerprint_of(job: Job) -> str:
    """Stands for what a shard is made from: the files' names, sizes and times, the labels' ids."""
    classes = job.vocabulary
    digest = hashlib.sha256(repr((classes.ids, classes.ignore_label, classes.ignored_ids)).encode())
    for example in job.examples:
        digest.update(os.fsencode(f"{example.id}\n"))
        for path in (example.image, example.label):
            try:
                status = os.stat(path)
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(b"missing\n")
    return digest.hexdigest()


def _reason(error: Exception, example: Example) -> str:
    """One line that begins with a path."""
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith((str(example.image), str(example.label))):
        return text
    return f"{example.image}, {example.label}: {text}"


def _read(job: Job, example: Example) -> tuple[bytes, np.ndarray]:
    """Reads and checks a record.

    Returns:
      It, as it stands in a TFRecord file; and int64 [C + 1], the pixels of each class and those
      without a label.
    """
    image_hw3, label_hw = job.benchmark.read(example)
    if image_hw3.dtype != np.uint8 or image_hw3.shape != (*label_hw.shape, 3):
        shapes = f"{label_hw.shape}, but {example.image.name} is {image_hw3.shape[:2]}"
        raise ValueError(f"{example.label}: expected the picture's size: {shapes}")
    pixels = _count_pixels(label_hw, job.vocabulary, example)
    features = {
        "image": job.benchmark.encoded_image(example) or decoding.encode_png(image_hw3),
        "label": decoding.encode_png(label_hw.astype(job.vocabulary.label_dtype)),
        "id": example.id.encode(),
    }
    return tfrecords.frame(tfrecords.encode_example(features)), pixels


def _count_pixels(label_hw: np.ndarray, vocabulary: Vocabulary, example: Example) -> np.ndarray:
    counts = np.bincount(label_hw.ravel(), minlength=vocabulary.ignore_label + 1)
    places = [*range(len(vocabulary)), vocabulary.ignore_label]
    pixels = counts[places]
    counts[places] = 0
    if counts.any():
        raise ValueError(
            f"{example.label}: label {np.flatnonzero(counts)[0]} is not a class of the vocabulary "
            f"(0..{len(vocabulary) - 1}) nor the ignore label {vocabulary.ignore_label}"
        )
    return pixels
