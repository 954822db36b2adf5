"""What an evaluation has counted so far, kept on disk so that an interrupted one goes on."""

import hashlib
import io
import json
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from zegformer_jax.evaluation.counts import OVERLAP, Evaluation
from zegformer_jax.runtime.files import write_bytes

SECONDS_BETWEEN_NOTES = 60.0
IDENTITY_DIGITS = 12  # of it in a file's name: evaluations in one folder keep apart


class Interrupted(KeyboardInterrupt):
    """An evaluation was interrupted; what it has counted is written, and it can go on from there.

    Attributes:
        result: what was counted so far; None where that is nothing, or where other processes count
            other pictures.
    """

    def __init__(self, result: Evaluation | None):
        """Holds what was counted."""
        super().__init__()
        self.result = result


class _Counted(NamedTuple):
    """Counts, and the pictures that they are of; never changed, so that they belong together."""

    counts: dict[Any, np.ndarray]
    done: np.ndarray


class Progress:
    """What this process has counted so far, in a file from time to time."""

    def __init__(self, folder: epath.PathLike | None, identity: str, records: int):
        """Begins with nothing; without a folder nothing is written.

        Args:
            folder: for the file.
            identity: of model, settings, records and what is written of them, in hexadecimal; what
                another evaluation counted is not taken up.
            records: of the data set.
        """
        part = f"{jax.process_index()}_of_{jax.process_count()}"
        name = f"partial_{identity[:IDENTITY_DIGITS]}_{part}.npz"
        self._path = None if folder is None else epath.Path(folder) / name
        self._identity = identity
        self._time = time.monotonic()
        self._counted = _Counted({}, np.zeros(records, bool))

    @property
    def done(self) -> np.ndarray:
        """Which records were counted, bool [records]."""
        return self._counted.done

    def load(self, result: Evaluation) -> None:
        """Takes up what an interrupted evaluation counted; a damaged file is as none."""
        if self._path is None or not self._path.exists():
            return
        try:
            self._counted = self._parse(self._path.read_bytes(), result)
        except Exception as error:  # zipfile, zlib, NumPy and JSON each have their own
            logging.getLogger(__name__).warning(
                "%s: not what an evaluation leaves (%s), it begins anew", self._path, error
            )
            return
        self._give(result)

    def note(self, result: Evaluation, places: np.ndarray) -> None:
        """Notes which records were counted, and writes everything if it is time."""
        done = self.done.copy()
        done[places] = True
        self._counted = _Counted(result.counts(), done)  # at once, whenever an interrupt comes
        if time.monotonic() - self._time >= SECONDS_BETWEEN_NOTES:
            self._write()

    def interrupt(self, result: Evaluation) -> Interrupted:
        """Writes everything, and gives what to raise. Of a batch that is half counted nothing."""
        if not self.done.any():
            return Interrupted(None)
        self._write()
        self._give(result)
        return Interrupted(result if jax.process_count() == 1 else None)

    def remove(self) -> None:
        """Removes the file: the results of the whole evaluation are written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _give(self, result: Evaluation) -> None:
        """Makes a result of what was counted."""
        result.pictures = int(self.done.sum())
        result.confusion, result.overlap = {}, None
        result.add(self._counted.counts)

    def _write(self) -> None:
        if self._path is None:
            return
        counts = {json.dumps(key): array for key, array in self._counted.counts.items()}
        file = io.BytesIO()
        np.savez(file, **counts, done=self.done, identity=self._identity)
        write_bytes(self._path, file.getvalue())
        self._time = time.monotonic()

    def _parse(self, data: bytes, result: Evaluation) -> _Counted:
        """Reads what `_write` wrote of such a result, or raises anything."""
        with np.load(io.BytesIO(data)) as arrays:
            content = dict(arrays)
        if str(content.pop("identity")) != self._identity:
            raise ValueError("it is of another evaluation")
        done = content.pop("done")
        counts = {tuple(json.loads(key)): array for key, array in content.items()}
        forms = {name: (array.shape, array.dtype.kind) for name, array in counts.items()}
        if (done.shape, done.dtype) != (self.done.shape, bool) or forms != _forms(counts, result):
            raise ValueError("it has other shapes")
        return _Counted(counts, done)


def _forms(counts: dict[Any, np.ndarray], result: Evaluation) -> dict[Any, Any]:
    """Shapes and kinds of dtypes that a result's counts have."""
    sizes = {subset.name: len(subset.indices) for subset in result.subsets}
    return {
        key: ((3, len(result.vocabulary)), "f") if key == OVERLAP else ((sizes[key[1]],) * 2, "i")
        for key in counts
    }


def identify_records(source: Any, directory: str | Path) -> str:
    """Stands for a source's records, in hexadecimal, without decoding a picture.

    For their number, and for what else is known: ids, files' sizes and times, or the hash of
    prepared records.

    Args:
        source: the validation pictures, a `zegformer_jax.input.datasets.Source`.
        directory: of the data set.
    """
    from zegformer_jax.input.records import read

    parts = [repr((len(source), list(getattr(source, "ids", ())))).encode()]
    for path in (*getattr(source, "image_files", ()), *getattr(source, "label_files", ())):
        status = path.stat()
        parts.append(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    if read.is_prepared(directory):
        parts.append(read.read_info(directory)["digests"]["validation"].encode())
    return hashlib.sha256(b"\n".join(parts)).hexdigest()
