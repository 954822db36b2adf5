"""Tables of names, which convert published tensors to our arrays and back.

A table is a list of entries for one model of known sizes. Reading is strict: every published tensor
is used or left out for a given reason, every array is filled or listed as new, and every shape is
checked. The name of an array is its path, such as `params/backbone/stem/conv/kernel`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from zegformer_jax.runtime.errors import UserError

Tensors = Mapping[str, np.ndarray]  # published, by their names
Arrays = Mapping[str, np.ndarray]  # ours, by their paths
Shapes = Mapping[str, tuple[int, ...]]


class Layout(NamedTuple):
    """The order of an array's axes, ours and PyTorch's.

    Attributes:
        to_ours: Converts a published array to our array of the given shape.
        to_published: Converts our array to the published one.
    """

    to_ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    to_published: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x, shape: x, lambda x: x)
FLAT = Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
ROW = Layout(lambda x, shape: x.reshape(shape), lambda x: x[None])  # one row, [1, n], of a vector
CONV = Layout(lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# [out, in], where ours is [in, out...]: all axes but the first are outputs.
LINEAR = Layout(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(len(x), -1).T)
# [out, in], where ours is [in..., out]: all axes but the last are inputs.
LINEAR_HEADS_IN = Layout(
    lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T
)

LAYOUTS = {"same": SAME, "flat": FLAT, "row": ROW, "conv": CONV, "linear": LINEAR}


class Entry(NamedTuple):
    """Our arrays and the published tensors that hold them.

    Several tensors are joined along their first axis to make one array; one tensor is cut along
    its first axis, in equal parts, to make several arrays.

    Attributes:
        paths: Paths of our arrays; one, if there are several names.
        names: Names of the published tensors; one, if there are several paths.
        layout: Layout of each array.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    layout: Layout = SAME


class Summary(NamedTuple):
    """Use of every published tensor and source of every array.

    Attributes:
        used: The paths that a tensor fills, by its published name.
        left_out: The reason why a tensor is not used, by its published name.
        new: The reason why no tensor fills an array, by its path.
    """

    used: Mapping[str, tuple[str, ...]]
    left_out: Mapping[str, str]
    new: Mapping[str, str]


def entry(path: str, name: str, layout: Layout = SAME) -> Entry:
    """Returns the entry of one array that is in one published tensor."""
    return Entry((path,), (name,), layout)


def shapes_of(variables: Mapping) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays (or `jax.ShapeDtypeStruct`) of Flax variables by path."""
    return {path: tuple(x.shape) for path, x in flatten(variables).items()}


def flatten(variables: Mapping) -> dict[str, jax.Array]:
    """Returns the arrays of nested Flax variables by their paths."""
    return traverse_util.flatten_dict(dict(variables), sep="/")


def unflatten(arrays: Arrays) -> dict:
    """Nests arrays by their paths; the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(arrays), sep="/")


def read(
    table: Sequence[Entry],
    tensors: Tensors,
    shapes: Shapes,
    where: str,
    *,
    left_out: Iterable[tuple[str, str]] = (),
    new: Iterable[tuple[str, str]] = (),
) -> tuple[dict[str, np.ndarray], Summary]:
    """Converts published tensors to our arrays.

    Args:
        table: Entries of all arrays that the model and the source share.
        tensors: All tensors of the source.
        shapes: Shapes of all our arrays.
        where: The source's name, for messages.
        left_out: (regular expression of a whole published name, reason) of unused tensors.
        new: (regular expression of a whole path, reason) of arrays that the source may lack.

    Returns:
        Our arrays, float32, by their paths; and a summary.

    Raises:
        UserError: A tensor is missing, has no place or has another shape; it is named.
    """
    left, created = {}, {}
    for name in tensors:
        if reason := _reason(name, left_out):
            left[name] = reason
    for path in shapes:
        if reason := _reason(path, new):
            created[path] = reason
    arrays, used, missing = {}, {}, []
    for row in table:
        absent = [name for name in row.names if name not in tensors or name in left]
        if not absent:
            arrays |= _to_ours(row, tensors, shapes, where)
            used |= {name: row.paths for name in row.names}
        elif not all(path in created for path in row.paths):
            missing += [(name, row.paths[0]) for name in absent]
    if missing:
        name, path = missing[0]
        raise UserError(
            f"{where}: no tensor '{name}', which {path} needs ({len(missing)} missing in all)"
        )
    if surplus := sorted(set(tensors) - set(used) - set(left)):
        raise UserError(
            f"{where}: tensor '{surplus[0]}' {list(tensors[surplus[0]].shape)} has no place in "
            f"this model ({len(surplus)} such in all)"
        )
    unfilled = sorted(set(shapes) - set(arrays) - set(created))
    if unfilled:
        raise UserError(f"{where}: nothing fills {unfilled[0]} ({len(unfilled)} such in all)")
    created = {path: reason for path, reason in created.items() if path not in arrays}
    return arrays, Summary(used, left, created)


def write(table: Sequence[Entry], arrays: Arrays) -> dict[str, np.ndarray]:
    """Converts our arrays to published tensors, float32: the inverse of `read`.

    Args:
        table: Entries of all arrays.
        arrays: Our arrays by their paths.

    Raises:
        UserError: An array is missing or has no place in the table; it is named.
    """
    wanted = {path for row in table for path in row.paths}
    if odd := sorted(wanted ^ set(arrays)):
        state = "is missing" if odd[0] in wanted else "has no published name"
        raise UserError(f"{odd[0]} {state} ({len(odd)} such in all)")
    tensors = {}
    for row in table:
        parts = [
            row.layout.to_published(np.asarray(arrays[path], np.float32)) for path in row.paths
        ]
        joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
        cut = np.split(joined, len(row.names)) if len(row.names) > 1 else [joined]
        for name, tensor in zip(row.names, cut, strict=True):
            tensors[name] = np.ascontiguousarray(tensor).reshape(tensor.shape)
    return tensors


def describe(summary: Summary, tensors: Tensors) -> str:
    """Returns a table in plain text of the groups of tensors: used, left out and new."""
    rows = {}
    for name, paths in summary.used.items():
        group = "/".join(paths[0].split("/")[:2])
        count, size = rows.get(("used", group), (0, 0))
        rows["used", group] = (count + 1, size + tensors[name].size)
    for name, reason in summary.left_out.items():
        count, size = rows.get(("left out", reason), (0, 0))
        rows["left out", reason] = (count + 1, size + tensors[name].size)
    for reason in summary.new.values():
        count, _ = rows.get(("new", reason), (0, 0))
        rows["new", reason] = (count + 1, None)
    lines = [f"{'':8}  {'tensors':>7}  {'numbers':>11}"]
    for (kind, group), (count, size) in rows.items():
        numbers = "" if size is None else f"{size:,}"
        lines.append(f"{kind:8}  {count:7,}  {numbers:>11}  {group}")
    return "\n".join(lines)


def _reason(name: str, reasons: Iterable[tuple[str, str]]) -> str:
    return next((reason for pattern, reason in reasons if re.fullmatch(pattern, name)), "")


def _to_ours(row: Entry, tensors: Tensors, shapes: Shapes, where: str) -> dict[str, np.ndarray]:
    for path in row.paths:
        if path not in shapes:
            raise ValueError(f"{where}: the table has {path}, the model has not")
    expected = _published_shapes(row, shapes)
    for name, shape in zip(row.names, expected, strict=True):
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{where}: tensor '{name}' is {list(tensors[name].shape)}, "
                f"{row.paths[0]} needs {list(shape)}"
            )
    parts = [np.asarray(tensors[name], np.float32) for name in row.names]
    joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
    cut = np.split(joined, len(row.paths)) if len(row.paths) > 1 else [joined]
    arrays = {}
    for path, part in zip(row.paths, cut, strict=True):
        array = row.layout.to_ours(part, shapes[path]).reshape(shapes[path])
        arrays[path] = np.array(array, np.float32, order="C")
    return arrays


def _published_shapes(row: Entry, shapes: Shapes) -> list[tuple[int, ...]]:
    """Returns the shapes that the published tensors of an entry must have."""
    parts = [row.layout.to_published(np.empty(shapes[path], np.bool_)).shape for path in row.paths]
    if len(parts) > 1:
        return [(sum(part[0] for part in parts), *parts[0][1:])]
    if len(row.names) > 1:
        return [(parts[0][0] // len(row.names), *parts[0][1:])] * len(row.names)
    return parts
