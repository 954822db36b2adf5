"""NumPy's arrays in pickles: what stands for the functions by which they are pickled."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from zegformer_jax.pretrained.pickles import Constructor, Opaque, Stateful, is_shape, short

ARRAY_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")


class Dtype(Stateful):
    """A dtype under construction: of numbers only, never of objects.

    Attributes:
        dtype: NumPy's.
    """

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_: Any):
        if type(code) is not str or not ARRAY_DTYPE.fullmatch(code):
            raise ValueError(f"refuses an array of dtype {short(code)}: only numbers are admitted")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        """Takes the byte order from `(version, order, subarray, names, fields, ...)`."""
        _version, order, subarray, names, fields, *_ = state
        if subarray is not None or names is not None or fields is not None:
            raise ValueError("refuses an array of a structured dtype: only numbers are admitted")
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"damaged pickle: byte order {short(order)}")
        self.dtype = self.dtype.newbyteorder(order)


class Array(Stateful):
    """An array under construction; its numbers stay where they are until `read`."""

    __slots__ = ("_data", "_dtype", "_order", "_shape")

    def __init__(self, *_: Any):
        self._data = None

    def set_state(self, state: Any) -> None:
        """Takes `(version, shape, dtype, in Fortran's order, data)`."""
        _version, shape, dtype, fortran, data = state
        if type(dtype) is not Dtype or type(data) not in (bytes, str):
            raise ValueError("damaged pickle: an array without dtype or data")
        if not is_shape(shape):
            raise ValueError("damaged pickle: an array's shape is no tuple of sizes")
        self._data, self._dtype, self._shape = data, dtype, shape
        self._order = "F" if fortran else "C"

    def read(self) -> np.ndarray:
        """Gives the array, read-only, without a copy where the pickle holds bytes.

        Python 2 wrote bytes as strings, and protocol 2 of Python 3 as Latin-1 text.
        """
        if self._data is None:
            raise ValueError("damaged pickle: an array without data")
        data = self._data.encode("latin-1") if type(self._data) is str else self._data
        dtype = self._dtype.dtype
        if math.prod(self._shape) * dtype.itemsize != len(data):
            raise ValueError(
                f"damaged pickle: an array of shape {list(self._shape)} and dtype {dtype} has "
                f"{len(data)} bytes"
            )
        return np.frombuffer(data, dtype).reshape(self._shape, order=self._order)


def _numpy_scalar(dtype: Any, data: Any) -> Array:
    scalar = Array()
    scalar.set_state((1, (), dtype, False, data))
    return scalar


def _numpy_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Array:
    """Protocol 5's form of an array that is contiguous."""
    if order not in ("C", "F") and axes is not None:
        raise ValueError("an array with its axes permuted: save it with another pickle protocol")
    array = Array()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


def _numpy_names() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("numpy", "dtype"): Constructor(Dtype),
        ("numpy", "ndarray"): Opaque(),
        # Latin-1 text stands for bytes, see `Array.read`.
        ("_codecs", "encode"): Constructor(lambda text, encoding: text),
    }
    for package in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        names[f"{package}.multiarray", "_reconstruct"] = Constructor(Array)
        names[f"{package}.multiarray", "scalar"] = Constructor(_numpy_scalar)
        names[f"{package}.numeric", "_frombuffer"] = Constructor(_numpy_buffer)
    return names


ARRAYS: Mapping[tuple[str, str], Any] = _numpy_names()
