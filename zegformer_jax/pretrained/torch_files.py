"""Reads files of torch.save and torch.jit.save and pickles of NumPy arrays, without PyTorch.

Since 1.6 torch writes a zip: a pickle of the objects, and one entry per storage. Earlier versions
write five pickles followed by the storages. TorchScript's zip also holds code, which is never
read: modules are read as trees of attributes.
"""

import functools
import io
import math
import mmap
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from zegformer_jax.pretrained import pickles
from zegformer_jax.pretrained.pickles import Call, Module, Named, short

MAX_AXES = 32  # NumPy's limit, before its version 2
MAX_SIZE = 2**48  # of one axis; beyond any real array, but products stay small
MAX_KEY = 1_000  # characters
MAX_COPIES = 8  # times the file's size: float8 as float32 takes 4, with a second name 8
MAX_ATTRIBUTES = 100_000  # of a TorchScript file; CLIP's have a few thousand
NUMBERS = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")  # NumPy's dtypes that are allowed
# Keys that may hold the state dict of a checkpoint, by priority; else it is the object itself.
STATE_DICTS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # its pickle
LEGACY_PROTOCOL = 1001


class Storage(NamedTuple):
    """A range of `size` numbers, from number `start` of a file's storage `key`."""

    key: str
    dtype: np.dtype
    size: int
    start: int  # not 0 in a view of another storage (before 1.0)


class Contents(NamedTuple):
    """Contents of a file.

    Attributes:
        root: The saved object.
        size: Size of the file in bytes.
        order: Byte order of the storages, "little" or "big".
        stored: Returns a storage's bytes by its key while the file is open; raises ValueError.
    """

    root: Any
    size: int
    order: str = "little"
    stored: Callable[[str], bytes] = lambda _: b""


def read_pickle(mapped: mmap.mmap) -> Contents:
    """Reads a pickle of NumPy arrays; raises ValueError like `pickles.load`."""
    return Contents(pickles.load(mapped), len(mapped))


def read_zip(archive: zipfile.ZipFile, infos: Mapping[str, zipfile.ZipInfo], size: int) -> Contents:
    """Reads a file of torch.save since 1.6, or of torch.jit.save.

    Args:
        archive: The zip.
        infos: Its entries by their names.
        size: Size of the file in bytes.

    Raises:
        ValueError: Torch did not write the zip, or its pickle asks for something not allowed.
    """
    names = [name for name in infos if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise ValueError(f"a zip with {len(names)} files data.pkl instead of one")
    prefix = names[0].removesuffix("data.pkl")

    @functools.cache
    def entry(name: str) -> bytes:
        if prefix + name not in infos:
            raise ValueError(f"the zip has no entry {short(prefix + name)}")
        info = infos[prefix + name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"entry {short(info.filename)} is compressed, which torch never does")
        info.CRC = info.CRC or None  # 0: no checksum; torch.serialization.set_crc32_options
        return archive.read(info)

    order = entry("byteorder").decode() if f"{prefix}byteorder" in infos else "little"
    if order not in ("little", "big"):
        raise ValueError("its byte order is neither little nor big")
    root = pickles.load(io.BytesIO(entry("data.pkl")), _storage)
    return Contents(root, size, order, lambda key: entry(f"data/{key}"))


def read_legacy(mapped: mmap.mmap) -> Contents:
    """Reads a file of torch.save before 1.6.

    Raises:
        ValueError: The file is damaged, or asks for something not allowed.
    """
    itemsizes: dict[str, int] = {}
    storages: dict[str, bytes] = {}

    def persistent(identity: Any) -> Storage:
        storage = _storage(identity)
        itemsizes[storage.key] = storage.dtype.itemsize
        return storage

    def stored(key: str) -> bytes:
        if key not in storages:
            raise ValueError(f"there is no storage {short(key)}")
        return storages[key]

    magic, protocol, system = (pickles.load(mapped) for _ in range(3))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or type(system) is not dict:
        raise ValueError("not a file of torch.save, or of an unknown version")
    order = "little" if system.get("little_endian", True) is True else "big"
    root = pickles.load(mapped, persistent)
    keys = pickles.load(mapped)
    for key in keys if type(keys) is list else [None]:
        if type(key) is not str or key not in itemsizes or key in storages:
            raise ValueError("damaged: a storage is named twice or nowhere")
        size = int.from_bytes(mapped.read(8), order, signed=True) * itemsizes[key]
        if not 0 <= size <= len(mapped) - mapped.tell():
            raise ValueError(f"storage {short(key)} is cut short")
        storages[key] = mapped.read(size)
    return Contents(root, len(mapped), order, stored)


def read_arrays(contents: Contents) -> tuple[dict[str, np.ndarray], str, int]:
    """Finds the state dict in a file's contents and makes its arrays.

    Views of a storage take no memory. Copies are counted, since a small file could ask for the same
    numbers under any number of names.

    Returns:
        The arrays by their names, read-only; the key of the state dict, "" for the object itself;
        the number of its entries that are not arrays.

    Raises:
        ValueError: There are no arrays, or the shape of one does not fit its data.
    """
    chosen, entries = _state_dict(contents.root)
    arrays: dict[str, np.ndarray] = {}
    left = MAX_COPIES * contents.size
    for name, value in entries.items():
        if len(name) > MAX_KEY:
            raise ValueError(f"a key of {len(name):,} characters")
        if _is_array(value):
            is_tensor = value.name.startswith("torch")
            made = _tensor(value, contents) if is_tensor else _array(value)
            arrays[name] = plain(made)
            left -= 0 if is_tensor and arrays[name] is made else arrays[name].nbytes
        if left < 0:
            raise ValueError(f"its arrays take more than {MAX_COPIES} times the file's size")
    return arrays, chosen, len(entries) - len(arrays)


def plain(array: np.ndarray) -> np.ndarray:
    """Converts dtypes that NumPy lacks to float32, and to native byte order; read-only."""
    if array.dtype.type.__module__ != "numpy":  # ml_dtypes
        array = array.astype(np.float32)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def _state_dict(root: Any) -> tuple[str, dict[str, Any]]:
    is_module = type(root) is Module
    root = _attributes(root) if is_module else root
    if not isinstance(root, dict):
        raise ValueError("holds neither a dict nor a module")
    for key in ("",) if is_module else (*STATE_DICTS, ""):
        found = root.get(key) if key else root
        if isinstance(found, dict) and any(map(_is_array, found.values())):
            return key, {name: value for name, value in found.items() if type(name) is str}
    keys = ", ".join(short(key) for key in list(root)[:8])
    raise ValueError(f"holds no arrays: none of its keys ({keys or 'none'}) is a state dict")


def _is_array(value: Any) -> bool:
    return type(value) is Call and value.name in pickles.ARRAYS


def _attributes(root: Module) -> dict[str, Any]:
    """Returns the attributes of a tree of modules, except modules, by their dotted names."""
    found: dict[str, Any] = {}
    left, count = [("", root)], 0
    while left:
        prefix, module = left.pop()
        for name, value in module.attributes.items():
            count += 1
            if type(name) is not str or count > MAX_ATTRIBUTES or len(prefix + name) > MAX_KEY:
                raise ValueError("modules or names nested without end")
            if type(value) is Module:
                left.append((f"{prefix}{name}.", value))
            else:
                found[f"{prefix}{name}"] = value
    return found


def _storage(identity: Any) -> Storage:
    """Reads a persistent id: `("storage", class, key, device, size[, (key, start, size)])`."""
    match identity:
        case ("storage", dtype, key, _, size) | ("storage", dtype, key, _, size, None):
            start = 0
        case ("storage", dtype, key, _, _, (_, start, size)):
            pass
        case _:
            raise ValueError("refuses a persistent id that is not a storage")
    if type(key) is not str or len(key) > MAX_KEY or not _are_sizes((start, size)):
        raise ValueError("damaged pickle: a storage without name or size")
    return Storage(key, _dtype(dtype), size, start)


def _are_sizes(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) <= MAX_AXES
        and all(type(n) is int and 0 <= n <= MAX_SIZE for n in value)
    )


def _dtype(value: Any) -> np.dtype:
    """Reads a numeric dtype, never one of objects, or a storage class."""
    match value:
        case Named(name) if name in pickles.TORCH_DTYPES:
            name = pickles.TORCH_DTYPES[name]
            return np.dtype(getattr(ml_dtypes, name, name))
        case Call("numpy.dtype", (str(code), *_), None) if NUMBERS.fullmatch(code):
            return np.dtype(code)
        case Call("numpy.dtype", (str(code), *_), (_, order, None, None, None, *_)):  # no structure
            if NUMBERS.fullmatch(code) and order in ("<", ">", "|", "="):
                return np.dtype(code).newbyteorder(order)
    raise ValueError("refuses an array of a dtype that is damaged or not numeric")


def _array(call: Call) -> np.ndarray:
    """Makes a NumPy array, without a copy if the pickle holds bytes."""
    match call:
        case Call("numpy.core.multiarray._reconstruct", _, (_, shape, dtype, fortran, data)):
            order = "F" if fortran else "C"
        case Call("numpy.core.multiarray.scalar", (dtype, data)):
            shape, order = (), "C"
        case Call("numpy.core.numeric._frombuffer", (data, dtype, shape, "C" | "F" as order, *_)):
            pass
        case _:
            raise ValueError("damaged pickle: an array without data, or with its axes permuted")
    match data:
        case str():  # Python 2, and Python 3's protocol 2, write bytes as text
            data = data.encode("latin-1")
        case Call("builtins.bytes", ()):  # protocol 2's empty bytes
            data = b""
    dtype = _dtype(dtype)
    if not isinstance(data, bytes | bytearray) or not _are_sizes(shape):
        raise ValueError("damaged pickle: an array without data, or its shape is no tuple of sizes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(
            f"damaged pickle: an array of shape {list(shape)} and dtype {dtype} has "
            f"{len(data)} bytes"
        )
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _tensor(call: Call, contents: Contents) -> np.ndarray:
    """Makes a view of a storage, of at most the file's bytes, as strides can be 0."""
    nothing = [None] * 7
    storage, offset, shape, strides, _gradient, _hooks, last, *_ = (*call.arguments, *nothing)
    if type(storage) is not Storage or not _are_sizes((offset,)):
        raise ValueError("damaged pickle: a tensor without storage or offset")
    if not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise ValueError("damaged pickle: a tensor's shape or strides are no tuple of sizes")
    dtype, key, shape = storage.dtype, short(storage.key), list(shape)
    if call.name.endswith("_v3"):  # its storage has bytes
        dtype = _dtype(last)
    elif last:
        raise ValueError("a tensor with a pending conjugation or negation: not supported")
    data = contents.stored(storage.key)
    begin = storage.start * storage.dtype.itemsize
    end = begin + storage.size * storage.dtype.itemsize
    if end > len(data):
        raise ValueError(f"storage {key} is cut short: it has {len(data)} bytes")
    if 0 in shape:
        return np.zeros(shape, dtype)
    reach = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if (reach + 1) * dtype.itemsize > end - begin:
        raise ValueError(f"a tensor of shape {shape} reaches beyond storage {key}")
    if math.prod(shape) * dtype.itemsize > contents.size:
        raise ValueError(f"a tensor of shape {shape} is larger than the file")
    steps = [step * dtype.itemsize for step in strides]
    dtype = dtype.newbyteorder(contents.order)
    return np.ndarray(shape, dtype, data, begin + offset * dtype.itemsize, steps)
