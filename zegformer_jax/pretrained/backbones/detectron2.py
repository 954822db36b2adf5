"""ResNet backbones with frozen batch norm, as detectron2, Detectron and torchvision publish them.

detectron2's files have its own names (`stem.conv1.weight`), as those that it converted from
torchvision, or Caffe2's (`conv1_w`), as MSRA's R-50.pkl and R-101.pkl. Two things about MSRA's no
file tells: they were trained on BGR images of which only a mean was taken, and with the stride in
a block's first convolution, not in the second as here. The kernels are read as they are; the
published COCO experiment feeds its backbone RGB, normalised by torchvision's mean and deviation,
and a backbone is to be fed as it was trained with.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from zegformer_jax.models.backbones.resnet import ResNet
from zegformer_jax.models.layers import NORM_EPSILON
from zegformer_jax.pretrained.backbones import torchvision
from zegformer_jax.pretrained.tables import (
    CONV,
    Entry,
    Summary,
    Tensors,
    entry,
    read,
    shapes_of,
)
from zegformer_jax.runtime.errors import UserError

STAGES = range(2, 6)
PREFIXES = ("", "backbone.", "backbone.bottom_up.")  # the last is an FPN's, in detectron2
KERNEL = re.compile(r"params/backbone/(.+)/conv/kernel")
LEFT_OUT = (
    (r"(stem\.fc|fc1000|linear)\.(weight|bias)", "ImageNet's classifier"),
    (r"stem\.conv1\.bias", "the stem's bias, which detectron2 leaves out too"),
    (r".*\.num_batches_tracked", "PyTorch's count of batches"),
)
CAFFE2_PARTS = {
    "conv1": "branch2a",
    "conv2": "branch2b",
    "conv3": "branch2c",
    "shortcut": "branch1",
}
# With statistics, in detectron2's files, and with them folded into scale and bias, in Detectron's.
CAFFE2_NORM = {"scale": "gamma", "bias": "beta", "mean": "running_mean", "var": "running_var"}
CAFFE2_FOLDED = {"scale": "s", "bias": "b", "mean": "rm", "var": "riv"}
CAFFE2_LEFT_OUT = (
    (r"(fc1000|pred)_[wb]", "ImageNet's classifier"),
    (r"(conv1|res\d_\d+_branch(1|2[abc]))_b", "a convolution's bias; detectron2 leaves it out too"),
    (r".*_momentum", "the optimiser's state"),
)
FOLDED = ((r"constants/.*/norm/(mean|var)", "folded into scale and bias: mean 0, variance 1"),)


class Naming(NamedTuple):
    """How a publisher names a ResNet's tensors.

    Attributes:
        layer_names: from a layer of ours to its tensors: kernel, scale, bias, mean, var.
        left_out: patterns of names that are not used, and the reasons.
    """

    layer_names: Callable[[str], dict[str, str]]
    left_out: Iterable[tuple[str, str]]


def layer_names(layer: str) -> dict[str, str]:
    """Gives detectron2's names of a layer's kernel and of its norm's constants.

    Args:
        layer: ours: `stem`, `res2_0/conv1` to `conv3` or `res2_0/shortcut`.
    """
    name = "stem.conv1" if layer == "stem" else re.sub(r"(res\d)_(\d+)/", r"\1.\2.", layer)
    norm = {leaf: f"{name}.norm.{suffix}" for leaf, suffix in torchvision.NORM.items()}
    return {"kernel": f"{name}.weight"} | norm


def caffe2_layer_names(layer: str, norm: dict[str, str]) -> dict[str, str]:
    """Gives Caffe2's names of a layer, `norm` being `CAFFE2_NORM` or `CAFFE2_FOLDED`."""
    kernel, place = "conv1", "res_conv1"
    if layer != "stem":
        block, part = layer.split("/")
        kernel = place = f"{block}_{CAFFE2_PARTS[part]}"
    return {"kernel": f"{kernel}_w"} | {leaf: f"{place}_bn_{x}" for leaf, x in norm.items()}


NAMINGS = (
    Naming(layer_names, LEFT_OUT),
    Naming(torchvision.layer_names, torchvision.LEFT_OUT),
    Naming(lambda layer: caffe2_layer_names(layer, CAFFE2_NORM), CAFFE2_LEFT_OUT),
    Naming(lambda layer: caffe2_layer_names(layer, CAFFE2_FOLDED), CAFFE2_LEFT_OUT),
)


def read_resnet(
    tensors: Tensors, where: str
) -> tuple[dict[str, Any], dict[str, np.ndarray], Summary]:
    """Reads a ResNet of bottleneck blocks with batch norm, whoever published it.

    Args:
        tensors: all that a file holds, by detectron2's, torchvision's, timm's or Caffe2's names;
            after `backbone.` there may be other parts of a model, which are left out.
        where: the file's name, for messages.

    Returns:
        the sizes, as `ResNet(**sizes)` takes them: blocks, stem_width, bottleneck_width,
        stage_width; the arrays, float32, by their paths under `params/backbone` and
        `constants/backbone`; and what became of every tensor. Where a file has no means and
        variances (they are folded into scale and bias), mean is 0 and variance 1 - epsilon, so
        that dividing by sqrt(variance + epsilon) changes nothing.

    Raises:
        UserError: there is no such ResNet, or a tensor is missing, has no place or has another
            shape; it is named.
    """
    naming, prefix = _find_naming(tensors, where)

    def names(layer: str) -> dict[str, str]:
        return {leaf: prefix + name for leaf, name in naming.layer_names(layer).items()}

    sizes = _infer_sizes(tensors, names, where)
    model = ResNet(**sizes)
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    shapes = shapes_of({kind: {"backbone": tree} for kind, tree in variables.items()})
    layers = [match[1] for match in map(KERNEL.fullmatch, shapes) if match]
    folded = not {names("stem")["mean"], names("stem")["var"]} & set(tensors)
    left_out = [(re.escape(prefix) + pattern, reason) for pattern, reason in naming.left_out]
    if prefix:
        left_out.append((f"(?!{re.escape(prefix)}).*", "not of the backbone"))
    arrays, summary = read(
        [row for layer in layers for row in _rows(layer, names(layer))],
        tensors,
        shapes,
        where,
        left_out=left_out,
        new=FOLDED if folded else (),
    )
    for path in summary.new:
        value = 0.0 if path.endswith("/mean") else 1.0 - NORM_EPSILON
        arrays[path] = np.full(shapes[path], value, np.float32)
    return sizes, arrays, summary


def _find_naming(tensors: Tensors, where: str) -> tuple[Naming, str]:
    for prefix in PREFIXES:
        for naming in NAMINGS:
            stem = naming.layer_names("stem")
            if prefix + stem["kernel"] in tensors and prefix + stem["scale"] in tensors:
                return naming, prefix
    known = ", ".join(f"'{naming.layer_names('stem')['kernel']}'" for naming in NAMINGS[:3])
    raise UserError(f"{where}: no ResNet: there is none of {known} with its batch norm")


def _infer_sizes(
    tensors: Tensors, names: Callable[[str], dict[str, str]], where: str
) -> dict[str, Any]:
    def width(layer: str) -> int:
        name = names(layer)["kernel"]
        if name not in tensors:
            raise UserError(
                f"{where}: no tensor '{name}': only ResNets of bottleneck blocks are read "
                "(50 layers or more)"
            )
        return tensors[name].shape[0] if tensors[name].ndim else 0

    def blocks(stage: int) -> int:
        index = 0
        while names(f"res{stage}_{index}/conv1")["kernel"] in tensors:
            index += 1
        return index

    return {
        "blocks": tuple(blocks(stage) for stage in STAGES),
        "stem_width": width("stem"),
        "bottleneck_width": width("res2_0/conv1"),
        "stage_width": width("res2_0/conv3"),
    }


def _rows(layer: str, names: dict[str, str]) -> list[Entry]:
    rows = [entry(f"params/backbone/{layer}/conv/kernel", names["kernel"], CONV)]
    constants = [(leaf, name) for leaf, name in names.items() if leaf != "kernel"]
    return rows + [entry(f"constants/backbone/{layer}/norm/{leaf}", x) for leaf, x in constants]
