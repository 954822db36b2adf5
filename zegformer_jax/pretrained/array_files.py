"""Safetensors and npz: files of arrays and nothing else."""

import io
import json
import math
import tokenize
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from zegformer_jax.pretrained import pickles, zips

DTYPES = {  # safetensors' names
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
# An npz's header is read by Python's parser, which raises these beside ValueError.
HEADER_DAMAGE = (SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file: read-only views of it, bfloat16 and float8 as float32.

    Raises ValueError where the file is cut short or damaged.
    """
    mapped = zips.map_file(path)
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    if length > min(MAX_HEADER, len(mapped) - 8):
        raise ValueError("a safetensors file that is cut short, or no such file")
    data = mapped[8 + length :]
    try:
        header = json.loads(mapped[8 : 8 + length].tobytes(), object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("a safetensors file with a damaged header") from error
    header.pop("__metadata__", None)
    tensors, left = {}, len(data)
    for name, entry in header.items():
        raw = _raw(name, entry, data)
        left -= raw.nbytes
        if left < 0:
            raise ValueError("a safetensors file whose tensors lie over one another")
        tensors[name] = plain(raw)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a safetensors file in which a name stands twice")
    return made


def _raw(name: str, entry: Any, data: np.ndarray) -> np.ndarray:
    """Gives a tensor of safetensors as a view of the file's bytes."""
    fields = entry if type(entry) is dict else {}
    dtype, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    shape = tuple(shape) if type(shape) is list else shape
    if type(dtype) is not str or type(place) is not list or len(place) != 2:
        raise ValueError(f"tensor {pickles.short(name)} has no dtype or no place")
    if dtype not in DTYPES:
        raise ValueError(f"tensor {pickles.short(name)} has dtype {dtype}: not supported")
    if not pickles.is_shape(shape) or not pickles.is_shape(tuple(place)):
        raise ValueError(f"tensor {pickles.short(name)}: its shape or place is no list of sizes")
    kind = np.dtype(DTYPES[dtype])
    begin, end = place
    if end > len(data) or end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"tensor {pickles.short(name)} is cut short, or its place is wrong")
    return data[begin:end].view(kind).reshape(shape)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads an npz of arrays of numbers, compressed or not, read-only.

    Raises ValueError where the file is cut short or damaged, or holds anything else.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, data in zips.read_entries(path):
        if not name.endswith(".npy"):
            raise ValueError(f"a zip with {pickles.short(name)}: neither npz nor PyTorch's")
        if name.removesuffix(".npy") in tensors:
            raise ValueError(f"entry {pickles.short(name)} stands twice in the zip")
        tensors[name.removesuffix(".npy")] = _npy(name, data)
    return tensors


def _npy(name: str, data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"version {version} is not supported")
        shape, fortran, dtype = read(file)
    except (ValueError, *HEADER_DAMAGE) as error:
        raise ValueError(f"entry {pickles.short(name)} has a damaged header: {error}") from error
    if dtype.kind not in "biufc":
        raise ValueError(f"entry {pickles.short(name)} has dtype {dtype}: not supported")
    if not pickles.is_shape(shape) or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"entry {pickles.short(name)}: its shape does not fit its bytes")
    array = np.frombuffer(data, dtype, offset=file.tell())
    return plain(array.reshape(shape, order="F" if fortran else "C"))


def plain(array: np.ndarray) -> np.ndarray:
    """Makes float32 of the dtypes that NumPy has not, and the byte order native; read-only."""
    if array.dtype.type.__module__ != "numpy":  # ml_dtypes
        array = array.astype(np.float32)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file of arrays in native byte order, the widest numbers first.

    Raises ValueError where the format has no dtype for an array.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, array in ordered:
        if array.dtype not in names or name == "__metadata__":
            raise ValueError(f"'{name}' of dtype {array.dtype} has no place in safetensors")
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers are aligned
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, array in ordered:
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            file.write(little.reshape(-1).view(np.uint8).data)


def write_npz(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes an npz without compression; raises ValueError for metadata and for bfloat16."""
    if metadata:
        raise ValueError("npz has no place for metadata")
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for name, array in tensors.items():
            if array.dtype.type.__module__ != "numpy":
                raise ValueError(f"'{name}' has dtype {array.dtype}, which npz cannot hold")
            info = zipfile.ZipInfo(f"{name}.npy")  # its date is that of no file: 1980
            with archive.open(info, "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
