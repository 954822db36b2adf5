"""Files of named arrays: safetensors, npz, and what PyTorch, detectron2 and CLIP publish.

No PyTorch, and nothing that a file asks for is ever executed. The format is told by a file's
content; its suffix is not looked at.
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

WRAPPER = "module."  # what DataParallel puts before every name
MAX_MESSAGE = 300  # characters; a damaged file can put anything into an error
ZIP_START = b"PK\x03\x04"
ZIP_END = struct.Struct("<4s6xH10x")  # of its directory, before a comment: signature, entries
ENCRYPTED = 1  # a zip entry's flag
MANY = 0xFFFF  # entries, which only zip64 counts
MAX_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # zlib's manual
# What damaged zips raise besides ValueError, and headers of arrays, which Python's parser reads.
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError)
NPY_DAMAGE = (ValueError, MemoryError, RecursionError, SyntaxError, TypeError, tokenize.TokenError)
# Protocols 2 to 5; a dict, a dict with a mark, and an OrderedDict in protocols 0 and 1.
PICKLE_STARTS = (b"\x80", b"(d", b"}q", b"}(", b"ccollections\n")
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


class Archive(NamedTuple):
    """Arrays of a file.

    Attributes:
        tensors: arrays by their names, read-only; bfloat16 and float8 as float32.
        chosen: the key under which the arrays are, "" where the file itself holds them.
        ignored: how many entries beside them are no arrays.
    """

    tensors: dict[str, np.ndarray]
    chosen: str = ""
    ignored: int = 0


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the named arrays of a file, see `read_archive`."""
    return read_archive(path).tensors


def read_archive(path: str | Path) -> Archive:
    """Reads a file of named arrays, without PyTorch and without executing anything.

    Formats: safetensors, npz, torch.save's (the zips since 1.6 and the older files),
    torch.jit.save's (as OpenAI publishes CLIP), pickles of NumPy arrays (as detectron2 and
    Detectron publish backbones). The state dict is what is under the first of
    `torch_files.STATE_DICTS` that holds arrays, else the object itself; of a TorchScript module
    all attributes that are tensors, their names joined by dots. A "module." before every name is
    taken off.

    Raises:
        MissingFile: there is no such file.
        ValueError: it has no known format, is cut short or damaged, wants anything that is not
            a tensor or a plain container, or holds no arrays; one line that names the file.
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

    The file is there as a whole or not at all: it is written beside its place and then renamed.

    Args:
        path: the file; its directory exists.
        tensors: arrays of numbers by their names; bfloat16 not in `.npz`.
        metadata: strings that go with them. In `.pth`, which PyTorch writes,
            `{"model": tensors} | metadata`; not in `.npz`.

    Raises:
        ValueError: the suffix is not known, an array is not of numbers that the format has,
            metadata has no place there, or PyTorch is not installed.
        MissingFile: there is no such directory.
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
    except (ValueError, TypeError) as error:  # PyTorch's for a dtype that it has not
        raise UserError(f"{path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> Archive:
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(ZIP_START):
            return _read_zip(path)
        if start[4:9] == b"\0\0\0\0{":  # a header of less than 4 GiB
            return Archive(_read_safetensors(path))
        if start.startswith(PICKLE_STARTS):
            is_legacy = start.startswith(torch_files.LEGACY_START)
            read = torch_files.read_legacy if is_legacy else torch_files.read_pickle
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return Archive(*read_arrays(read(mapped)))
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
        # Of these the library makes no NumPy arrays (0.8.0), but it gives their bytes.
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
            # Each entry is read in whole, so that its checksum is compared.
            arrays = {name: _read_npy(name, archive.read(x)) for name, x in infos.items()}
            return Archive({name.removesuffix(".npy"): x for name, x in arrays.items()})
    except ZIP_DAMAGE as error:
        raise ValueError(f"a zip that is cut short or damaged ({error})") from error


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Lists a zip's entries by their names, if what its directory says of them is possible."""
    archive.fp.seek(-ZIP_END.size - len(archive.comment), io.SEEK_END)
    signature, count = ZIP_END.unpack(archive.fp.read(ZIP_END.size))
    listed = archive.infolist()
    # zipfile does not compare them: a damaged length of the directory or comment hides entries.
    if signature != b"PK\5\6" or count not in (len(listed), MANY):
        raise ValueError(f"a zip of {len(listed)} entries, where another number is announced")
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in listed:
        name = short(info.filename)
        if info.filename in infos:
            raise ValueError(f"entry {name} stands twice in the zip")
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
    try:  # as np.load does, which does not notice what is left over
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
        raise ValueError("'__metadata__' has no place in safetensors")
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    try:
        safetensors.numpy.save_file(tensors, path, metadata or None)
        path.chmod(mode)  # The library makes a file that nobody else can read (0.8.0).
    except safetensors.SafetensorError as error:
        raise ValueError(f"safetensors cannot hold the arrays: {error}") from error


def _write_npz(path: Path, tensors: dict[str, np.ndarray], metadata: dict) -> None:
    if metadata:
        raise ValueError("npz has no place for metadata")
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for name, array in tensors.items():  # numpy.savez takes no array of the name "file"
            if array.dtype == ml_dtypes.bfloat16:
                raise ValueError(f"'{name}' has dtype {array.dtype}, which npz cannot hold")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _write_pth(path: Path, tensors: dict[str, np.ndarray], metadata: dict) -> None:
    if "model" in metadata:
        raise ValueError("metadata has a key 'model', which is the tensors' own")
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
    with path.open("xb") as file:  # of a path torch.save would write the name into the file
        torch.save({"model": saved} | metadata, file)


_WRITERS = {".safetensors": _write_safetensors, ".npz": _write_npz, ".pth": _write_pth}
