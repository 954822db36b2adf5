"""Weights of backbones from and to published tensors, by the names that each backbone carries."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from zegformer_jax.models.backbones import BACKBONES, build_backbone
from zegformer_jax.models.backbones.backbone import Name, Published, Tensors
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.tables import LAYOUTS, Entry, Shapes, Summary, entry
from zegformer_jax.runtime.errors import UserError

BACKBONE = "backbone."  # begins the names in a whole checkpoint
PREFIXES = ("", BACKBONE, "backbone.bottom_up.")  # the last is an FPN's, in detectron2


class ReadBackbone(NamedTuple):
    """A backbone from a file.

    Attributes:
        sizes: Its name and its module's attributes.
        arrays: float32, by their paths under `params/backbone` and `constants/backbone`, without
            those that the model must initialise.
        summary: What became of every tensor.
    """

    sizes: dict[str, Any]
    arrays: dict[str, np.ndarray]
    summary: Summary


def read(tensors: tables.Tensors, where: str) -> ReadBackbone:
    """Reads a backbone of any publisher.

    Args:
        tensors: All that a file holds; where the backbone's names begin with `backbone.`, there
            may be other parts of a model, which are left out.
        where: The file's name, for messages.

    Raises:
        UserError: There is no backbone, or a tensor is missing, has no place or has another
            shape; it is named.
    """
    shapes = {name: x.shape for name, x in tensors.items()}
    name, prefix = _find(shapes, where)
    published = BACKBONES[name].published(Tensors(shapes, where, prefix))
    sizes = {"name": name} | published.sizes
    left_out = [(re.escape(prefix) + pattern, reason) for pattern, reason in published.left_out]
    if prefix:
        left_out.append((f"(?!{re.escape(prefix)}).*", "not of the backbone"))
    ours = module_shapes(build_backbone(sizes))
    arrays, summary = tables.read(
        entries(published.names, prefix),
        tensors,
        ours,
        where,
        left_out=left_out,
        new=[(re.escape(_in_model(x.path)), x.reason) for x in published.absent],
    )
    return ReadBackbone(sizes, _fill(arrays, published, ours), summary)


def table(sizes: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries of a backbone in a whole checkpoint.

    Args:
        sizes: Its name and its module's attributes.
    """
    module = build_backbone(sizes)
    return entries(BACKBONES[sizes["name"]].names(module), BACKBONE)


def check(sizes: Mapping[str, Any]) -> None:
    """Raises UserError where the published modules cannot compute what a backbone does."""
    BACKBONES[sizes["name"]].check(build_backbone(sizes))


def infer_sizes(shapes: Shapes, where: str) -> dict[str, Any]:
    """Reads a backbone's name and attributes off the tensors of a whole checkpoint.

    Args:
        shapes: Of the tensors, by name.
        where: The file's name, for messages.

    Raises:
        UserError: There is no backbone, or a tensor that tells a size is missing.
    """
    name, _ = _find(shapes, where, [BACKBONE], marks=1)
    tensors = Tensors(shapes, where, BACKBONE)
    return {"name": name} | BACKBONES[name].infer_sizes(tensors)


def left_out(sizes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns patterns of a whole checkpoint's tensors that its backbone does not use."""
    reasons = BACKBONES[sizes["name"]].left_out
    return [(re.escape(BACKBONE) + pattern, reason) for pattern, reason in reasons]


def constants(sizes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns tensors of a whole checkpoint that are no weights of its backbone."""
    found = BACKBONES[sizes["name"]].constants(build_backbone(sizes))
    return {BACKBONE + name: tensor for name, tensor in found.items()}


def write(sizes: Mapping[str, Any], variables: Mapping) -> dict[str, np.ndarray]:
    """Returns a backbone's tensors in detectron2's names, as far as the variables have them."""
    arrays = tables.flatten(variables)
    rows = [row for row in table(sizes) if row.paths[0] in arrays]
    tensors = tables.write(rows, arrays)
    return {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items()}


def entries(names: Sequence[Name], prefix: str) -> list[Entry]:
    """Returns the entries of a backbone's names, with the prefix that begins the tensors'."""
    return [entry(_in_model(x.path), prefix + x.name, LAYOUTS[x.layout]) for x in names]


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a backbone's arrays by their paths in a model."""
    variables = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    return tables.shapes_of({kind: {"backbone": tree} for kind, tree in variables.items()})


def _find(
    shapes: Shapes, where: str, prefixes: Sequence[str] = PREFIXES, marks: int | None = None
) -> tuple[str, str]:
    """A backbone's name and its prefix, by the first `marks` names of its first kernel."""
    for prefix in prefixes:
        for name, backbone in BACKBONES.items():
            if any(prefix + mark in shapes for mark in backbone.marks[:marks]):
                return name, prefix
    known = [
        f"'{prefixes[0]}{mark}' ({name})"
        for name, backbone in BACKBONES.items()
        for mark in backbone.marks[:marks]
    ]
    raise UserError(f"{where}: no backbone is known: there is no tensor {' or '.join(known)}")


def _in_model(path: str) -> str:
    """The path of a backbone's array in a model: `params/backbone/stem/conv/kernel`."""
    collection, _, rest = path.partition("/")
    return f"{collection}/backbone/{rest}"


def _fill(
    arrays: dict[str, np.ndarray], published: Published, shapes: Shapes
) -> dict[str, np.ndarray]:
    filled = dict(arrays)
    for path, _, value in published.absent:
        whole = _in_model(path)
        if value is not None and whole not in arrays:
            filled[whole] = np.full(shapes[whole], value, np.float32)
    return filled
