"""The parts of a backbone: its module, its published sizes, and the names of its weights.

Names are plain data here; `pretrained.backbones` reads and writes files by them.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from zegformer_jax.runtime.errors import UserError

Reasons = Sequence[tuple[str, str]]  # patterns of whole names, and why these tensors are not used


class Name(NamedTuple):
    """An array of a backbone and the published tensor that holds it.

    Attributes:
        path: The array's path in the module's variables, `params/stem/conv/kernel`.
        name: The tensor's name.
        layout: The order of the tensor's axes, a key of `pretrained.tables.LAYOUTS`.
    """

    path: str
    name: str
    layout: str = "same"


class Absent(NamedTuple):
    """An array that a file need not hold.

    Attributes:
        path: The array's path in the module's variables.
        reason: Why the file does not hold it.
        value: Of all its numbers; None leaves it to the model's initialisation.
    """

    path: str
    reason: str
    value: float | None = None


class Published(NamedTuple):
    """The content of a file with a backbone.

    Attributes:
        sizes: The module's attributes.
        names: Of all arrays.
        left_out: Of the tensors that are not used.
        absent: The arrays that the file need not hold.
    """

    sizes: dict[str, Any]
    names: Sequence[Name]
    left_out: Reasons = ()
    absent: Sequence[Absent] = ()


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Shapes of published tensors whose names begin with one prefix.

    Attributes:
        shapes: The shapes of all tensors by their whole names.
        where: The file's name, for messages.
        prefix: Begins the names of these tensors; the methods take names without it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    where: str
    prefix: str = ""

    def __contains__(self, name: str) -> bool:
        """True if there is such a tensor."""
        return self.prefix + name in self.shapes

    def names(self) -> list[str]:
        """All names, without the prefix."""
        return [x.removeprefix(self.prefix) for x in self.shapes if x.startswith(self.prefix)]

    def shape(self, name: str, axes: int, hint: str = "") -> tuple[int, ...]:
        """Returns a tensor's shape.

        Args:
            name: The tensor's name.
            axes: Number of axes that it must have.
            hint: Ends the message where there is no such tensor.

        Raises:
            UserError: There is no such tensor, or it has other axes.
        """
        whole = self.prefix + name
        if whole not in self.shapes:
            raise UserError(f"{self.where}: no tensor '{whole}'{hint}")
        shape = tuple(self.shapes[whole])
        if len(shape) != axes:
            raise UserError(
                f"{self.where}: tensor '{whole}' is {list(shape)}, it should have {axes} axes"
            )
        return shape

    def count(self, start: str) -> int:
        """Number of numbered modules after the start of a name: 2 for `x.0.bias`, `x.1.bias`."""
        pattern = re.compile(re.escape(self.prefix + start) + r"(\d+)\.")
        return len({match[1] for match in map(pattern.match, self.shapes) if match})


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone's module, and what configs and published weights need to know about it.

    Attributes:
        module: Maps images [B, H, W, 3] to `{"res2": ..., ..., "res5": ...}`, strides 4 to 32. Its
            attributes are the fields of `config.model.backbone`; all have defaults.
        variants: Attributes of the published models, by the names that follow a config's colon.
        marks: Names of the first layer's kernel; a file holds this backbone if it has one of
            them. The first one is the name in a whole checkpoint.
        names: Of a module's arrays in a whole checkpoint, in detectron2's layout, without the
            `backbone.` that begins them.
        infer_sizes: From a whole checkpoint's tensors to the module's attributes.
        recognise: From the tensors of a file with this backbone to its names in there; None: as
            in a whole checkpoint. Raises UserError where a tensor is missing.
        check: Raises UserError where the published module cannot compute what a module does.
        constants: Tensors of the published module that are no weights, by name.
        left_out: Tensors of a whole checkpoint that are not used, `constants` among them.
        optimiser_groups: Rules of `config.optimiser.groups` for its parameters.
        starts: Addresses of ImageNet weights that a training starts from, by variant.
    """

    module: type[nn.Module]
    variants: Mapping[str, Mapping[str, Any]]
    marks: Sequence[str]
    names: Callable[[Any], list[Name]]
    infer_sizes: Callable[[Tensors], dict[str, Any]]
    recognise: Callable[[Tensors], Published] | None = None
    check: Callable[[Any], None] = lambda module: None
    constants: Callable[[Any], dict[str, np.ndarray]] = lambda module: {}
    left_out: Reasons = ()
    optimiser_groups: Sequence[tuple[str, Mapping[str, float]]] = ()
    starts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def published(self, tensors: Tensors) -> Published:
        """Recognises the tensors of a file with this backbone.

        Raises:
            UserError: A tensor that tells the sizes is missing.
        """
        if self.recognise is not None:
            return self.recognise(tensors)
        sizes = self.infer_sizes(tensors)
        return Published(sizes, self.names(self.module(**sizes)), self.left_out)
