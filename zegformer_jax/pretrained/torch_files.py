"""Files of torch.save and torch.jit.save, read without PyTorch and without executing anything.

Since 1.6 torch writes a zip that holds a pickle of the objects and each storage as a file of its
own; before, five pickles and the storages one after the other. TorchScript's zip holds code too,
which is never looked at: the modules are read as trees of attributes.
"""

import io
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from zegformer_jax.pretrained import array_files, pickled_arrays, pickles, zips

STORAGES = {  # torch's names of the classes
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}
DTYPES = {  # torch's names
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # its pickle
LEGACY_PROTOCOL = 1001


class Storage(NamedTuple):
    """A run of numbers in a file.

    Attributes:
        key: its name in the file.
        dtype: of the numbers.
        size: how many there are.
        start: the first one's place, where this is a view of a longer storage (before 1.0).
    """

    key: str
    dtype: np.dtype
    size: int
    start: int = 0


class Tensor(NamedTuple):
    """A tensor as a file describes it: nothing of it is checked before `view`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


class TorchFile(NamedTuple):
    """What a file of torch's holds.

    Attributes:
        root: what was saved, with `Tensor` for tensors and `pickles.Module` for modules.
        read: makes an array of a tensor, read-only; raises ValueError.
    """

    root: Any
    read: Callable[[Tensor], np.ndarray]


def read_zip(path: Path) -> TorchFile:
    """Reads what torch.save has written since 1.6, or torch.jit.save.

    The arrays are views of the file, which is mapped into memory, not copied.

    Raises:
        ValueError: the zip, its pickle or a storage is damaged, or wants what is not admitted.
    """
    entries = zips.Entries(path)
    prefix = entries.pickle_name.removesuffix("data.pkl")
    order = entries.read(f"{prefix}byteorder").tobytes() if f"{prefix}byteorder" in entries else b""
    if order not in (b"", b"little", b"big"):
        raise ValueError("its byte order is neither little nor big")
    data = entries.read(entries.pickle_name).tobytes()
    root = pickles.load(pickles.Reader(io.BytesIO(data)), admitted, storage_of)

    def read(tensor: Tensor) -> np.ndarray:
        raw = entries.read(f"{prefix}data/{tensor.storage.key}")
        return view(tensor, raw, ">" if order == b"big" else "<", entries.size)

    return TorchFile(root, read)


def read_legacy(path: Path) -> TorchFile:
    """Reads what torch.save wrote before 1.6: five pickles, then the storages.

    Raises:
        ValueError: the file is damaged or wants what is not admitted.
    """
    dtypes: dict[str, np.dtype] = {}

    def persistent(value: Any) -> Storage:
        storage = storage_of(value)
        if dtypes.setdefault(storage.key, storage.dtype) != storage.dtype:
            raise ValueError(f"storage {pickles.short(storage.key)} has two dtypes")
        return storage

    with path.open("rb") as file:
        reader = pickles.Reader(file)
        magic, protocol, system = (pickles.load(reader, admitted) for _ in range(3))
        if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or type(system) is not dict:
            raise ValueError("not a file of torch.save, or of a version that is not known")
        root = pickles.load(reader, admitted, persistent)
        keys = pickles.load(reader, admitted)
        start = file.tell()
    order = "<" if system.get("little_endian", True) is True else ">"
    mapped = zips.map_file(path)
    places = _legacy_places(mapped, start, keys, dtypes, order)

    def read(tensor: Tensor) -> np.ndarray:
        if tensor.storage.key not in places:
            raise ValueError(f"no storage {pickles.short(tensor.storage.key)}")
        return view(tensor, mapped[places[tensor.storage.key]], order, len(mapped))

    return TorchFile(root, read)


def _legacy_places(
    mapped: np.ndarray, start: int, keys: Any, dtypes: dict[str, np.dtype], order: str
) -> dict[str, slice]:
    """Finds the storages: each is its count, int64, and its numbers, in the order of the keys."""
    places: dict[str, slice] = {}
    if type(keys) is not list:
        raise ValueError("damaged: the storages' names are no list")
    for key in keys:
        if type(key) is not str or key not in dtypes or key in places:
            raise ValueError("damaged: a storage is named twice or nowhere")
        if start + 8 > len(mapped):
            raise ValueError(f"cut short: there is no storage {pickles.short(key)}")
        (count,) = struct.unpack(f"{order}q", mapped[start : start + 8].tobytes())
        stop = start + 8 + count * dtypes[key].itemsize
        if count < 0 or stop > len(mapped):
            raise ValueError(f"storage {pickles.short(key)} is cut short")
        places[key] = slice(start + 8, stop)
        start = stop
    return places


def view(tensor: Tensor, raw: np.ndarray, order: str, limit: int) -> np.ndarray:
    """Lays a tensor over the bytes of its storage.

    Args:
        tensor: as the file describes it.
        raw: bytes of the storage, [n] uint8.
        order: of the bytes, "<" or ">".
        limit: the most bytes that the array may have; strides of 0 make any number of few.

    Returns:
        The array, read-only: a view where NumPy has the dtype; bfloat16 and float8 as float32.

    Raises:
        ValueError: the storage is too short, or the tensor reaches beyond it.
    """
    storage, itemsize = tensor.storage, tensor.dtype.itemsize
    key = pickles.short(storage.key)
    begin = storage.start * storage.dtype.itemsize
    end = begin + storage.size * storage.dtype.itemsize
    if end > len(raw):
        raise ValueError(f"storage {key} is cut short: it has {len(raw)} bytes")
    if 0 in tensor.shape:
        return array_files.plain(np.zeros(tensor.shape, tensor.dtype))
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if (tensor.offset + reach + 1) * itemsize > end - begin:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} reaches beyond storage {key}")
    if math.prod(tensor.shape) * itemsize > limit:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is larger than the file")
    dtype = tensor.dtype.newbyteorder(order) if itemsize > 1 else tensor.dtype
    strides = [step * itemsize for step in tensor.strides]
    start = tensor.offset * itemsize
    return array_files.plain(np.ndarray(tensor.shape, dtype, raw[begin:end], start, strides))


def storage_of(value: Any) -> Storage:
    """Reads a persistent id: `("storage", class, key, device, count[, view])`."""
    if type(value) is not tuple or len(value) not in (5, 6) or value[0] != "storage":
        raise ValueError("refuses a persistent id that names no storage")
    _, dtype, key, _, size, *views = value
    start = 0
    if views and views[0] is not None:
        _, start, size = views[0]
    if (
        type(key) is not str
        or len(key) > pickles.MAX_KEY
        or not isinstance(dtype, np.dtype)
        or not _is_size(start, size)
    ):
        raise ValueError("damaged pickle: a storage without class, name or size")
    return Storage(key, dtype, size, start)


def _is_size(*values: Any) -> bool:
    return all(type(x) is int and 0 <= x <= pickles.MAX_SIZE for x in values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """Stands for torch._utils._rebuild_tensor and _rebuild_tensor_v2.

    The rest: whether it takes gradients, its hooks, and flags such as a conjugation to be done.
    """
    if type(storage) is not Storage or not _is_size(offset):
        raise ValueError("damaged pickle: a tensor without storage or place")
    if not pickles.is_shape(shape) or not pickles.is_shape(strides) or len(shape) != len(strides):
        raise ValueError("damaged pickle: a tensor's shape or strides are no tuple of sizes")
    if rest[2:] and rest[2] is not None and rest[2] != {}:
        raise ValueError("a tensor with a conjugation or negation to be done: not supported")
    return Tensor(storage, offset, shape, strides, storage.dtype)


def _tensor_of_dtype(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    """Stands for torch._utils._rebuild_tensor_v3: the storage is bytes, the dtype stands here."""
    if not isinstance(dtype, np.dtype):
        raise ValueError("damaged pickle: a tensor without a dtype")
    return _tensor(storage, offset, shape, strides)._replace(dtype=dtype)


def _first(value: Any, *_: Any) -> Any:
    return value


def _torch_names() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor"): pickles.Constructor(_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): pickles.Constructor(_tensor),
        ("torch._utils", "_rebuild_tensor_v3"): pickles.Constructor(_tensor_of_dtype),
        ("torch._utils", "_rebuild_parameter"): pickles.Constructor(_first),
        ("torch._utils", "_rebuild_parameter_with_state"): pickles.Constructor(_first),
        ("torch.jit._pickle", "restore_type_tag"): pickles.Constructor(_first),
        ("torch.storage", "UntypedStorage"): np.dtype(np.uint8),
    }
    names |= {("torch", name): np.dtype(dtype) for name, dtype in (STORAGES | DTYPES).items()}
    for module, name in (
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("torch.jit._pickle", "build_intlist"),
        ("torch.jit._pickle", "build_doublelist"),
        ("torch.jit._pickle", "build_boollist"),
        ("torch.jit._pickle", "build_tensorlist"),
    ):
        names[module, name] = pickles.Constructor(lambda *_: pickles.Opaque())
    return names


NAMES = {**pickles.CONTAINERS, **pickled_arrays.ARRAYS, **_torch_names()}


def admitted(module: str, name: str) -> Any:
    """Gives what stands for a name in a file of torch's; refuses all else with a ValueError."""
    if module == "__torch__" or module.startswith("__torch__."):  # TorchScript's own classes
        return pickles.Constructor(pickles.Module)
    if (module, name) not in NAMES:
        pickles.refuse(module, name)
    return NAMES[module, name]
