"""Writes files that torch.load reads, with weights_only=True, without PyTorch."""

import math
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

ALIGNMENT = 64  # of the storages in the file, as torch.save does
PADDING_ID = b"FB"  # of the extra field by which torch.save aligns
LOCAL_HEADER_SIZE = 30
ZIP64_SIZE = 20  # of the extra field that zipfile adds to an entry of more than 2 GiB
VERSION = b"3\n"  # of torch's format, since 1.6
PROTOCOL = b"\x80\x02"
TUPLES = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}
STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
    np.dtype(np.complex64): "ComplexFloatStorage",
    np.dtype(np.complex128): "ComplexDoubleStorage",
}


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes `{"model": tensors} | metadata` as torch.save would.

    Args:
        path: the file, which must not exist.
        tensors: contiguous arrays of numbers, in native byte order, by their names.
        metadata: strings by their names.

    Raises:
        ValueError: torch has no storage for an array's dtype; metadata has a "model" too.
    """
    if "model" in metadata:
        raise ValueError("metadata has a key 'model', which is the tensors' own")
    pickled = {name: _tensor(str(i), name, x) for i, (name, x) in enumerate(tensors.items())}
    entries = {"model": _ordered_dict(pickled)} | {
        key: _text(value) for key, value in metadata.items()
    }
    with path.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, file, "data.pkl", PROTOCOL + b"}" + _items(entries) + b".")
        _add(archive, file, "byteorder", sys.byteorder.encode())
        for index, array in enumerate(tensors.values()):
            _add(archive, file, f"data/{index}", array.reshape(-1).view(np.uint8).data)
        _add(archive, file, "version", VERSION)


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: bytes | memoryview) -> None:
    """Adds an entry whose data starts at a multiple of 64 bytes."""
    info = zipfile.ZipInfo(f"archive/{name}")  # its date is that of no file: 1980
    info.file_size = len(data)
    long = ZIP64_SIZE if info.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile's own rule
    start = file.tell() + LOCAL_HEADER_SIZE + len(info.filename) + 4 + long
    padding = -start % ALIGNMENT
    info.extra = PADDING_ID + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w") as entry:
        entry.write(data)


def _tensor(key: str, name: str, array: np.ndarray) -> bytes:
    """Pickles a tensor that fills a storage of its own."""
    if array.dtype not in STORAGES:
        raise ValueError(f"'{name}' has dtype {array.dtype}, for which PyTorch has no storage")
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    storage = _tuple(
        _text("storage"),
        _global("torch", STORAGES[array.dtype]),
        _text(key),
        _text("cpu"),
        _integer(array.size),
    )
    arguments = (
        storage + b"Q",
        _integer(0),
        _tuple(*map(_integer, array.shape)),
        _tuple(*map(_integer, strides)),
        b"\x89",  # takes no gradient
        _ordered_dict({}),  # has no hooks
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(*arguments) + b"R"


def _ordered_dict(items: Mapping[str, bytes]) -> bytes:
    return _global("collections", "OrderedDict") + b")R" + _items(items)


def _items(items: Mapping[str, bytes]) -> bytes:
    if not items:
        return b""
    return b"(" + b"".join(_text(key) + value for key, value in items.items()) + b"u"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(*items: bytes) -> bytes:
    if len(items) in TUPLES:
        return b"".join(items) + TUPLES[len(items)]
    return b"(" + b"".join(items) + b"t"
