"""What an evaluation has counted so far, kept on disk so that an interrupted one goes on."""

import io
import json
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from zegformer_jax.evaluation_files import write_bytes
from zegformer_jax.results import Evaluation

SECONDS_BETWEEN_NOTES = 60.0


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
            identity: of model and settings; what others counted is not taken up.
            records: of the data set.
        """
        name = f"partial_{jax.process_index()}_of_{jax.process_count()}.npz"
        self._path = None if folder is None else epath.Path(folder) / name
        self._identity = identity
        self._time = time.monotonic()
        self._counted = _Counted({}, np.zeros(records, bool))

    @property
    def done(self) -> np.ndarray:
        """Which records were counted, bool [records]."""
        return self._counted.done

    def load(self, result: Evaluation) -> None:
        """Takes up what an interrupted evaluation counted."""
        if self._path is None or not self._path.exists():
            return
        with np.load(io.BytesIO(self._path.read_bytes())) as arrays:
            content = dict(arrays)
        if str(content.pop("identity")) != self._identity:
            return
        done = content.pop("done")
        counts = {tuple(json.loads(key)): counts for key, counts in content.items()}
        self._counted = _Counted(counts, done)
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
        """Removes the file: the evaluation is complete."""
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
