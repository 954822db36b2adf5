"""Reads and writes files of named arrays: safetensors, npz, PyTorch's and NumPy pickles.

Reading needs no PyTorch and never executes what a file asks for. The format is recognised by the
content of a file, not by its suffix.
"""

import io
import mmap
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from zegformer_jax.pretrained import torch_files
from zegformer_jax.pretrained.pickles import short
from zegformer_jax.pretrained.torch_files import plain, read_arrays
from zegformer_jax.runtime.errors import MissingFile, UserError

WRAPPER = "module."  # DataParallel's prefix of every name
MAX_MESSAGE = 300  # characters; a damaged file can put anything into an error
ZIP_START = b"PK\x03\x04"
ZIP_END = struct.Struct("<4s6xH10x")  # last record before the comment: signature, entries
ENCRYPTED = 1  # a zip entry's flag
MANY = 0xFFFF  # replaces the number of entries if zip64 has it
MAX_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # zlib's manual
# Raised for damaged zips, in addition to ValueError, and for damaged headers of arrays, which
# Python's parser reads.
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError)
NPY_DAMAGE = (ValueError, MemoryError, RecursionError, SyntaxError, TypeError, tokenize.TokenError)
# Protocols 2 to 5; a dict, a dict with a mark, and an OrderedDict in protocols 0 and 1.
PICKLE_STARTS = (b"\x80", b"(d", b"}q", b"}(", b"ccollections\n")
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


class Archive(NamedTuple):
    """Arrays of a file.

    Attributes:
        tensors: Arrays by their names, read-only; bfloat16 and float8 as float32.
        chosen: Key of the dict of arrays in the file, "" if there is no such key.
        ignored: Number of entries of this dict that are not arrays.
    """

    tensors: dict[str, np.ndarray]
    chosen: str = ""
    ignored: int = 0


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the named arrays of a file, by `read_archive`."""
    return read_archive(path).tensors


def read_archive(path: str | Path) -> Archive:
    """Reads a file of named arrays, without PyTorch and without executing anything.

    The formats are safetensors, npz, torch.save's (zips since 1.6, and older files),
    torch.jit.save's (in which OpenAI publishes CLIP) and pickles of NumPy arrays (in which
    detectron2 and Detectron publish backbones). The state dict is the entry of the first of
    `torch_files.STATE_DICTS` that holds arrays, else the object itself. Of a TorchScript module it
    has all attributes that are tensors, with names joined by dots. A "module." before every name
    is removed.

    Args:
        path: The file.

    Raises:
        MissingFile: There is no such file.
        UserError: The format is unknown, the file is cut short or damaged, asks for anything but
            tensors and plain containers, or holds no arrays; one line that names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path}: no such file")
    try:
        archive = _read(path)
    except ValueError as error:
        message = " ".join(str(error).split())[:MAX_MESSAGE]
        raise UserError(f"{path}: {message}") from error
    if all(name.startswith(WRAPPER) for name in archive.tensors):
        unwrapped = {name.removeprefix(WRAPPER): x for name, x in archive.tensors.items()}
        return archive._replace(tensors=unwrapped)
    return archive


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named arrays as `.safetensors`, `.npz` or `.pth`, by the suffix.

    The write is atomic: the data goes to a temporary file, which is then renamed.

    Args:
        path: The file, in an existing directory.
        tensors: Numeric arrays by their names; `.npz` cannot hold bfloat16.
        metadata: Strings to store with the arrays; `.npz` cannot hold them. A `.pth`, which PyTorch
            writes, holds `{"model": tensors} | metadata`.

    Raises:
        UserError: The suffix is unknown, the format cannot hold an array or the metadata, or
            PyTorch is needed and not installed.
        MissingFile: There is no such directory.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise UserError(f"{path}: choose one of {', '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise MissingFile(f"{path}: no such directory")
    arrays = {name: _contiguous(path, name, array) for name, array in tensors.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _WRITERS[path.suffix](part, arrays, dict(metadata or {}))
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (ValueError, TypeError) as error:  # PyTorch raises TypeError for unknown dtypes
        raise UserError(f"{path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> Archive:
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(ZIP_START):
            return _read_zip(path)
        if start[4:9] == b"\0\0\0\0{":  # a header shorter than 4 GiB
            return Archive(_read_safetensors(path))
        if start.startswith(PICKLE_STARTS):
            is_legacy = start.startswith(torch_files.LEGACY_START)
            read = torch_files.read_legacy if is_legacy else torch_files.read_pickle
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return Archive(*read_arrays(read(mapped)))
    if start.lstrip().startswith(b"<"):
        raise ValueError("a web page, not weights: download the file that the page links to")
    raise ValueError(
        f"neither safetensors, npz, PyTorch's nor a pickle (it begins with {start[:16]!r})"
        if start
        else "the file is empty"
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            small = {name for name, dtype in dtypes.items() if dtype.startswith(("F8", "F4"))}
            tensors = {x: plain(file.get_tensor(x)) for x in dtypes if x not in small}
        # The library (0.8.0) returns types of fewer than 16 bits only as bytes.
        for name, entry in safetensors.deserialize(path.read_bytes()) if small else ():
            if name in small:
                tensors[name] = plain(_float8(name, **entry))
    except safetensors.SafetensorError as error:
        raise ValueError(f"a safetensors file that is cut short or damaged: {error}") from error
    return tensors


def _float8(name: str, dtype: str, shape: list[int], data: bytearray) -> np.ndarray:
    if dtype not in FLOAT8:
        raise ValueError(f"tensor {short(name)} has dtype {dtype}: not supported")
    return np.frombuffer(data, FLOAT8[dtype]).reshape(shape)


def _read_zip(path: Path) -> Archive:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = _entries(archive, size)
            if any(name.endswith("/data.pkl") for name in infos):
                return Archive(*read_arrays(torch_files.read_zip(archive, infos, size)))
            # Each entry is read completely, so that zipfile compares its checksum.
            arrays = {name: _read_npy(name, archive.read(x)) for name, x in infos.items()}
            return Archive({name.removesuffix(".npy"): x for name, x in arrays.items()})
    except ZIP_DAMAGE as error:
        raise ValueError(f"a zip that is cut short or damaged ({error})") from error


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Lists a zip's entries by name, and refuses impossible sizes."""
    archive.fp.seek(-ZIP_END.size - len(archive.comment), io.SEEK_END)
    signature, count = ZIP_END.unpack(archive.fp.read(ZIP_END.size))
    listed = archive.infolist()
    # zipfile does not compare these numbers: damaged lengths of the directory or the comment can
    # hide entries.
    if signature != b"PK\5\6" or count not in (len(listed), MANY):
        raise ValueError(f"a zip of {len(listed)} entries whose directory claims another number")
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in listed:
        name = short(info.filename)
        if info.filename in infos:
            raise ValueError(f"entry {name} is in the zip twice")
        if info.flag_bits & ENCRYPTED or info.compress_type not in MAX_RATIO:
            raise ValueError(f"entry {name} is encrypted, or compressed by an unknown method")
        size -= info.compress_size
        if info.file_size > MAX_RATIO[info.compress_type] * info.compress_size or size < 0:
            raise ValueError(f"entry {name} claims too many bytes")
        infos[info.filename] = info
    return infos


def _read_npy(name: str, data: bytes) -> np.ndarray:
    if not name.endswith(".npy"):
        raise ValueError(f"a zip with {short(name)}: neither npz nor PyTorch's")
    file = io.BytesIO(data)
    try:  # np.load does not detect surplus bytes
        with np.errstate(all="ignore"):  # a shape of too many bytes overflows
            array = np.lib.format.read_array(file, allow_pickle=False)
    except NPY_DAMAGE as error:
        raise ValueError(f"entry {short(name)} is damaged: {error}") from error
    if array.dtype.kind not in "biufc":
        raise ValueError(f"entry {short(name)} has dtype {array.dtype}: not supported")
    if file.tell() < len(data):
        raise ValueError(f"entry {short(name)}: its shape does not fit its bytes")
    return plain(array)


def _contiguous(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, order="C")
    if array.dtype.kind not in "biufc" and array.dtype != ml_dtypes.bfloat16:
        raise UserError(f"{path}: '{name}' has dtype {array.dtype}: only numbers are written")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict) -> None:
    if "__metadata__" in tensors:
        raise ValueError("safetensors cannot hold a tensor named '__metadata__'")
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    try:
        safetensors.numpy.save_file(tensors, path, metadata or None)
        path.chmod(mode)  # The library makes a file that nobody else can read (0.8.0).
    except safetensors.SafetensorError as error:
        raise ValueError(f"safetensors cannot hold the arrays: {error}") from error


def _write_npz(path: Path, tensors: dict[str, np.ndarray], metadata: dict) -> None:
    if metadata:
        raise ValueError("npz cannot hold metadata")
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for name, array in tensors.items():  # numpy.savez takes no array named "file"
            if array.dtype == ml_dtypes.bfloat16:
                raise ValueError(f"'{name}' has dtype {array.dtype}, which npz cannot hold")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _write_pth(path: Path, tensors: dict[str, np.ndarray], metadata: dict) -> None:
    if "model" in metadata:
        raise ValueError("metadata has a key 'model', which is the key of the tensors")
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "only PyTorch writes .pth, and it is not installed (pip install torch): write "
            ".safetensors instead"
        ) from error
    saved = {}
    for name, array in tensors.items():
        if array.dtype == ml_dtypes.bfloat16:
            saved[name] = torch.tensor(array.view(np.int16)).view(torch.bfloat16)
        else:
            saved[name] = torch.tensor(array)
    with path.open("xb") as file:  # given a path, torch.save writes its name into the file
        torch.save({"model": saved} | metadata, file)


_WRITERS = {".safetensors": _write_safetensors, ".npz": _write_npz, ".pth": _write_pth}
