"""Files of the published archives: folders, lists, label maps, and tables of their ids."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zegformer_jax.input import decoding
from zegformer_jax.input.unknown import UnknownValues
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.runtime.files import read_text

UNKNOWN = -1  # in a label table: the id is neither a class nor one that is known to be ignored


class Archive(NamedTuple):
    """A published file.

    Attributes:
        file: Name of the file.
        address: Web address of the file or its page.
        gives: Paths of its content, relative to the folder in which it is unpacked.
    """

    file: str
    address: str
    gives: tuple[str, ...]


def find(source: Path, paths: Sequence[str], archive: Archive) -> Path:
    """Finds a folder or file of an archive.

    Args:
        source: Folder in which the archives were unpacked.
        paths: Possible paths under `source`, the usual one first.
        archive: The archive that holds it.

    Returns:
        The first of the paths that exists.

    Raises:
        MissingFile: None exists; the message names the first, and the archive.
    """
    for path in paths:
        if (source / path).exists():
            return source / path
    raise missing(source / paths[0], archive)


def missing(path: Path, archive: Archive) -> MissingFile:
    """Returns the error that names a missing path and the archive that holds it."""
    return MissingFile(f"{path}: missing; it is in {archive.file}, see {archive.address}")


def names(folder: Path) -> set[str]:
    """Returns the names of a folder's files; none if there is no such folder."""
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


def stems(folder: Path, suffix: str, archive: Archive) -> list[str]:
    """Returns the names, without suffix, of a folder's files that have this suffix.

    Raises:
        MissingFile: There is no such file; the message names the archive.
    """
    found = [name.removesuffix(suffix) for name in names(folder) if name.endswith(suffix)]
    if not found:
        raise missing(folder / f"*{suffix}", archive)
    return found


def read_lines(path: Path) -> list[str]:
    """Reads a list's lines, without spaces around them and without empty ones.

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UserError: The file is in another encoding; the message starts with the path.
    """
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_ids(path: Path) -> np.ndarray:
    """Reads a label image's ids: uint8 or uint16 [h, w]; see `decoding.decode_label`.

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UserError: The file is no label image; the message starts with the path.
    """
    return decoding.decode_label(decoding.read_file(path), path)


def read_matlab(path: Path, *keys: str) -> np.ndarray:
    """Reads a label map of a MATLAB file.

    Args:
        path: Path of the file, of version 4 to 7.2 like both published data sets.
        *keys: Name of the variable, then of fields of the structures inside it.

    Returns:
        Integers [h, w].

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UserError: The file is no MATLAB file or has no such map; the message starts with the path.
    """
    import scipy.io

    data = decoding.read_file(path)
    try:
        value = scipy.io.loadmat(io.BytesIO(data), variable_names=keys[:1])
        for key in keys:
            value = value[key]
            while value.dtype == object and value.size == 1:
                value = value.item()
    # SciPy raises half a dozen types for damaged files, zlib's and struct's among them.
    except Exception as error:
        name = ".".join(keys)
        raise UserError(f"{path}: no MATLAB file with a label map {name}: {error!r}") from error
    if value.ndim != 2 or not np.issubdtype(value.dtype, np.integer):
        shape = f"{value.dtype} {value.shape}"
        raise UserError(f"{path}: a label map has integers in two dimensions, not {shape}")
    return value


def label_table(ids: Sequence[int], ignored: Iterable[int], ignore_label: int) -> np.ndarray:
    """Makes the table from an annotation's ids to labels.

    Args:
        ids: Ids of the classes, in the vocabulary's order.
        ignored: Ids without a label that an annotation may have, if they are no class's.
        ignore_label: Label of the ignored ids.

    Returns:
        Table, int32, up to the largest id; `UNKNOWN` at all other ids.
    """
    ignored = list(ignored)
    table = np.full(max(*ids, *ignored) + 1, UNKNOWN, np.int32)
    table[ignored] = ignore_label
    table[list(ids)] = np.arange(len(ids))
    return table


def map_ids(ids_hw: np.ndarray, table: np.ndarray, path: Path, dtype: np.dtype) -> np.ndarray:
    """Maps an annotation's ids to labels.

    Args:
        ids_hw: Integers [h, w].
        table: Table from `label_table`.
        path: The annotation file, for error messages.
        dtype: Type of the labels, uint8 or uint16.

    Raises:
        UnknownValues: Ids are not in the table; the message starts with the path.
    """
    known_hw = (ids_hw >= 0) & (ids_hw < len(table))
    labels_hw = np.where(known_hw, table[np.where(known_hw, ids_hw, 0)], UNKNOWN)
    unknown = np.argwhere(labels_hw == UNKNOWN)
    if len(unknown):
        row, column = unknown[0]
        raise UnknownValues(
            f"{path}: id {ids_hw[row, column]} at row {row}, column {column} is neither a class "
            f"nor an ignored value ({len(unknown)} such pixels)",
            np.unique(ids_hw[labels_hw == UNKNOWN]).tolist(),
        )
    return labels_hw.astype(dtype)
