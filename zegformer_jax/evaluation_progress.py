"""What an evaluation has counted so far, kept on disk so that an interrupted one goes on."""

import io
import json
import time

import jax
import numpy as np
from etils import epath

from zegformer_jax.evaluation_files import write_bytes
from zegformer_jax.results import Evaluation

SECONDS_BETWEEN_NOTES = 60.0


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
        self.done = np.zeros(records, bool)

    def load(self, result: Evaluation) -> None:
        """Takes up what an interrupted evaluation counted."""
        if self._path is None or not self._path.exists():
            return
        with np.load(io.BytesIO(self._path.read_bytes())) as arrays:
            content = dict(arrays)
        if str(content.pop("identity")) != self._identity:
            return
        self.done = content.pop("done")
        result.pictures = int(self.done.sum())
        result.add({tuple(json.loads(key)): counts for key, counts in content.items()})

    def note(self, result: Evaluation, places: np.ndarray) -> None:
        """Notes which records were counted, and writes everything if it is time."""
        self.done[places] = True
        if self._path is None or time.monotonic() - self._time < SECONDS_BETWEEN_NOTES:
            return
        counts = {json.dumps(key): array for key, array in result.counts().items()}
        file = io.BytesIO()
        np.savez(file, **counts, done=self.done, identity=self._identity)
        write_bytes(self._path, file.getvalue())
        self._time = time.monotonic()

    def remove(self) -> None:
        """Removes the file: the evaluation is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
