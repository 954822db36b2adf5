"""Files of named arrays: safetensors, npz, and what PyTorch, detectron2 and CLIP publish.

No PyTorch, and nothing that a file asks for is ever executed. The format is told by a file's
content; its suffix is not looked at.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from zegformer_jax.pretrained import (
    array_files,
    pickled_arrays,
    pickles,
    torch_files,
    torch_writer,
    zips,
)

# Where a checkpoint may hold its state dict, the first that does; else it is one itself.
STATE_DICTS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
WRAPPER = "module."  # what DataParallel puts before every name
MAX_ATTRIBUTES = 1_000_000  # of a TorchScript file; CLIP's have some thousand
MAX_DEPTH = 100
MAX_COPIES = 8  # times the file's size; float8 as float32 takes 4, a second name twice as much
MAX_MESSAGE = 300  # characters; a damaged file can put anything into an error
ZIP_START = b"PK\x03\x04"
# Protocols 2 to 5; a dict, a dict with a mark, and an OrderedDict in protocols 0 and 1.
PICKLE_STARTS = (b"\x80", b"(d", b"}q", b"}(", b"ccollections\n")
PICKLED_NAMES = {**pickles.CONTAINERS, **pickled_arrays.ARRAYS}


class Archive(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: arrays by their names, read-only; bfloat16 and float8 as float32.
        chosen: the key under which the arrays stood, "" where the file itself holds them.
        ignored: how many entries beside them were no arrays.
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
    Detectron publish backbones). The state dict is what stands under the first of
    `STATE_DICTS` that holds arrays, else the object itself; of a TorchScript module all
    attributes that are tensors, their names joined by dots. A "module." before every name is
    taken off.

    The arrays of safetensors and of PyTorch's files are views of the file, mapped into memory:
    replace such a file as a whole, never write into it, while they are in use.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no known format, is cut short or damaged, wants anything that is not
            a tensor or a plain container, or holds no arrays; one line that names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return _unwrap(_reader(path)(path))
    except ValueError as error:
        message = " ".join(str(error).split())[:MAX_MESSAGE]
        raise ValueError(f"{path}: {message}") from error


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
        metadata: strings that go with them. In `.pth`, `{"model": tensors} | metadata`, which
            torch.load reads with weights_only=True; not in `.npz`.

    Raises:
        ValueError: the suffix is not known, an array is not of numbers that the format has, or
            metadata has no place there.
        FileNotFoundError: there is no such directory.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: choose one of {', '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    arrays = {name: _contiguous(path, name, array) for name, array in tensors.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _WRITERS[path.suffix](part, arrays, dict(metadata or {}))
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


_WRITERS = {
    ".safetensors": array_files.write_safetensors,
    ".npz": array_files.write_npz,
    ".pth": torch_writer.write,
}


def _contiguous(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, order="C")
    if array.dtype.kind not in "biufc" and array.dtype != ml_dtypes.bfloat16:
        raise ValueError(f"{path}: '{name}' has dtype {array.dtype}: only numbers are written")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _reader(path: Path) -> Callable[[Path], Archive]:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(ZIP_START):
        names = [info.filename for info in zips.directory(path)]
        if any(name.endswith("/data.pkl") for name in names):
            return _read_torch_zip
        return lambda path: Archive(array_files.read_npz(path))
    if start[4:9] == b"\0\0\0\0{":  # a header of less than 4 GiB
        return lambda path: Archive(array_files.read_safetensors(path))
    if start.startswith(torch_files.LEGACY_START):
        return _read_torch_legacy
    if start.startswith(PICKLE_STARTS):
        return _read_pickle
    raise ValueError(
        f"neither safetensors, npz, PyTorch's nor a pickle (it begins with {start[:16]!r})"
        if start
        else "the file is empty"
    )


def _unwrap(archive: Archive) -> Archive:
    if not all(name.startswith(WRAPPER) for name in archive.tensors):
        return archive
    tensors = {name.removeprefix(WRAPPER): x for name, x in archive.tensors.items()}
    return archive._replace(tensors=tensors)


def _admitted(module: str, name: str) -> Any:
    if (module, name) not in PICKLED_NAMES:
        pickles.refuse(module, name)
    return PICKLED_NAMES[module, name]


def _read_pickle(path: Path) -> Archive:
    with path.open("rb") as file:
        root = pickles.load(pickles.Reader(file), _admitted)
    return _from_object(root, path.stat().st_size, None)


def _read_torch_zip(path: Path) -> Archive:
    opened = torch_files.read_zip(path)
    return _from_object(opened.root, path.stat().st_size, opened.read)


def _read_torch_legacy(path: Path) -> Archive:
    opened = torch_files.read_legacy(path)
    return _from_object(opened.root, path.stat().st_size, opened.read)


def _from_object(root: Any, size: int, read: Callable | None) -> Archive:
    """Finds the state dict in an object and makes its arrays.

    Views of a mapped file take no memory. What is copied is counted, since a small file could
    ask for the same numbers under any number of names.
    """
    chosen, entries = _state_dict(root)
    tensors: dict[str, np.ndarray] = {}
    left = MAX_COPIES * size
    for name, value in entries.items():
        if type(value) is torch_files.Tensor and read:
            tensors[name] = read(value)
            left -= tensors[name].nbytes if tensors[name].flags.owndata else 0
        elif type(value) is pickled_arrays.Array:
            tensors[name] = array_files.plain(value.read())
            left -= tensors[name].nbytes
        if left < 0:
            raise ValueError(f"its arrays take more than {MAX_COPIES} times the file's size")
    return Archive(tensors, chosen, len(entries) - len(tensors))


def _state_dict(root: Any) -> tuple[str, dict[str, Any]]:
    if type(root) is pickles.Module:
        return "", _attributes(root)
    if type(root) is not dict:
        raise ValueError("holds neither a dict nor a module")
    for key in STATE_DICTS:
        if type(root.get(key)) is dict and any(map(_is_array, root[key].values())):
            return key, root[key]
    if any(map(_is_array, root.values())):
        return "", root
    keys = ", ".join(pickles.short(key) for key in list(root)[:8])
    raise ValueError(f"holds no arrays: under its keys ({keys or 'none'}) there is no state dict")


def _is_array(value: Any) -> bool:
    return type(value) in (torch_files.Tensor, pickled_arrays.Array)


def _attributes(root: pickles.Module) -> dict[str, Any]:
    """Gives the attributes of a tree of modules that are no modules, by their dotted names."""
    found: dict[str, Any] = {}
    left, count = [("", 0, root)], 1
    while left:
        prefix, depth, module = left.pop()
        count += len(module.attributes)
        if count > MAX_ATTRIBUTES or depth > MAX_DEPTH:
            raise ValueError("modules within modules without end")
        for name, value in module.attributes.items():
            if type(value) is pickles.Module:
                left.append((f"{prefix}{name}.", depth + 1, value))
            elif f"{prefix}{name}" in found:
                raise ValueError(f"{pickles.short(prefix + name)} stands twice")
            else:
                found[f"{prefix}{name}"] = value
    return found
