"""The file that an interrupted evaluation resumes from: what was counted, and of which records."""

import io
import logging
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from zegformer_jax.evaluation.metric import States
from zegformer_jax.runtime.errors import MAX_REASON, one_line
from zegformer_jax.runtime.files import write_bytes
from zegformer_jax.runtime.processes import is_first


class Counted(NamedTuple):
    """States of the metrics and bool [records]; replaced together, so that they always match."""

    states: States
    done: np.ndarray


class ResumeFile:
    """A context that removes its file if it ends without an error: when the results are written.

    Attributes:
        folder: Folder of the file.
        note: Names what is written beside the counts: an evaluation with another note starts from
            the beginning, as its other files would lack the images that were counted before.
    """

    def __init__(self, folder: epath.PathLike, note: str = ""):
        self.folder, self.note = epath.Path(folder), note
        self._path, self._key = None, ""

    def __enter__(self) -> "ResumeFile":
        return self

    def __exit__(self, error: Any, *_: object) -> None:
        if error is None and self._path is not None:
            self._path.unlink(missing_ok=True)
            if is_first():
                self.parts.rmtree(missing_ok=True)

    @property
    def parts(self) -> epath.Path:
        """Folder for files of the images that are counted, of all processes; removed at the end."""
        return self.folder / f"partial_{self._key[:12]}"

    def open(self, key: str, nothing: Counted) -> Counted:
        """Returns what was counted under a key, or `nothing`; ignores a damaged file."""
        name = f"partial_{key[:12]}_{jax.process_index()}_of_{jax.process_count()}.npz"
        self._path, self._key = self.folder / name, key
        if not self._path.exists():
            return nothing
        try:
            return self._parse(self._path.read_bytes(), nothing)
        except Exception as error:  # zipfile, zlib and NumPy each have their own
            message = "%s: no partial evaluation (%s), starting from the beginning"
            logging.getLogger(__name__).warning(message, self._path, one_line(error)[:MAX_REASON])
            return nothing

    def save(self, counted: Counted) -> None:
        """Writes what was counted."""
        file = io.BytesIO()
        np.savez(file, *jax.tree.leaves(counted), key=self._key)
        write_bytes(self._path, file.getvalue())

    def _parse(self, data: bytes, nothing: Counted) -> Counted:
        leaves, structure = jax.tree.flatten(nothing)
        with np.load(io.BytesIO(data)) as arrays:
            found = [arrays[name] for name in (f"arr_{i}" for i in range(len(leaves)))]
            if str(arrays["key"]) != self._key or len(arrays.files) != len(leaves) + 1:
                raise ValueError("it is of another evaluation")
        if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in leaves]:
            raise ValueError("it has other shapes")
        return jax.tree.unflatten(structure, found)
