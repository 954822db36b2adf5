"""Weights that a training starts from: pretrained backbones and checkpoints."""

from pathlib import Path
from typing import Any, NamedTuple

from zegformer_jax.pretrained import backbones
from zegformer_jax.pretrained.formats import read_tensors
from zegformer_jax.pretrained.tables import Summary, Tensors, unflatten
from zegformer_jax.pretrained.zegformer import from_checkpoint

HEADS = "sem_seg_head."  # begins a name in a checkpoint of a whole model


class Start(NamedTuple):
    """Variables to start from.

    Attributes:
        kind: Of the model that they come from: zegformer, per_pixel or backbone.
        sizes: Of that model; a backbone's own, with its `name`.
        variables: `params` and, with frozen norms, `constants`, float32.
        summary: What became of every published tensor.
    """

    kind: str
    sizes: dict[str, Any]
    variables: dict[str, Any]
    summary: Summary


def is_checkpoint(tensors: Tensors) -> bool:
    """Returns whether tensors are a whole model in detectron2's layout."""
    return any(name.startswith(HEADS) for name in tensors)


def read_start(path: str | Path) -> Start:
    """Reads a file of published weights.

    Args:
        path: The authors' or MaskFormer's checkpoint, or a backbone: detectron2's `.pkl`,
            torchvision's or timm's ResNet, a Swin of Microsoft's or timm's.

    Raises:
        MissingFile: There is no such file.
        UserError: It is none of these, or a tensor is missing, unknown or of another shape.
    """
    tensors = read_tensors(path)
    if not is_checkpoint(tensors):
        return read_backbone(tensors, str(path))
    checkpoint = from_checkpoint(tensors, str(path))
    sizes = dict(checkpoint.sizes)
    return Start(sizes["kind"], sizes, checkpoint.variables, checkpoint.summary)


def read_backbone(tensors: Tensors, where: str) -> Start:
    """Reads a backbone from all the tensors of a file; `where` is its name, for messages.

    Raises:
        UserError: It is no known backbone, or a tensor is missing, unknown or of another shape.
    """
    backbone = backbones.read(tensors, where)
    return Start("backbone", backbone.sizes, unflatten(backbone.arrays), backbone.summary)
