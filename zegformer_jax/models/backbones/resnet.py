"""ResNet backbones (He et al., 2016) with frozen batch norm or group norm.

Weights with batch norm are read as detectron2, Detectron, torchvision and timm publish them.
detectron2's files have its own names (`stem.conv1.weight`), as those that it converted from
torchvision, or Caffe2's (`conv1_w`), as MSRA's R-50.pkl and R-101.pkl. Two things about MSRA's no
file tells: they were trained on BGR images of which only a mean was taken, and with the stride in
a block's first convolution, not in the second as here. The kernels are read as they are; the
published COCO experiment feeds its backbone RGB, normalised by torchvision's mean and deviation,
and a backbone is to be fed as it was trained with.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.backbones.backbone import (
    Absent,
    Backbone,
    Name,
    Published,
    Reasons,
    Tensors,
)
from zegformer_jax.models.layers import (
    NORM_EPSILON,
    NORM_GROUPS,
    Bottleneck,
    ConvNorm,
    FrozenBatchNorm,
    Norm,
    group_norm,
)
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.target import target_device

ZOO = "detectron2://ImageNetPretrained"
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # He et al., table 1

# Leaves of a norm, and their names in PyTorch.
TORCH_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
TORCHVISION_PARTS = {
    "conv1": ("conv1", "bn1"),
    "conv2": ("conv2", "bn2"),
    "conv3": ("conv3", "bn3"),
    "shortcut": ("downsample.0", "downsample.1"),
}
CAFFE2_PARTS = {
    "conv1": "branch2a",
    "conv2": "branch2b",
    "conv3": "branch2c",
    "shortcut": "branch1",
}
# With statistics, in detectron2's files, and with them folded into scale and bias, in Detectron's.
CAFFE2_NORM = {"scale": "gamma", "bias": "beta", "mean": "running_mean", "var": "running_var"}
CAFFE2_FOLDED = {"scale": "s", "bias": "b", "mean": "rm", "var": "riv"}
COUNTS = (r".*\.num_batches_tracked", "PyTorch's count of batches")
DETECTRON2_LEFT_OUT = (
    (r"(stem\.fc|fc1000|linear)\.(weight|bias)", "ImageNet's classifier"),
    (r"stem\.conv1\.bias", "the stem's bias, which detectron2 leaves out too"),
    COUNTS,
)
TORCHVISION_LEFT_OUT = ((r"fc\.(weight|bias)", "ImageNet's classifier"), COUNTS)
CAFFE2_LEFT_OUT = (
    (r"(fc1000|pred)_[wb]", "ImageNet's classifier"),
    (r"(conv1|res\d_\d+_branch(1|2[abc]))_b", "a convolution's bias; detectron2 leaves it out too"),
    (r".*_momentum", "the optimiser's state"),
)


def max_pool(x_bhwc: jax.Array) -> jax.Array:
    """Pools 3x3 windows at stride 2 with padding 1: [B, H, W, C] to [B, H/2, W/2, C], even H, W.

    Where it is not for a TPU, as maxima of slices: the gradient of `reduce_window` took 18 times as
    long on a CPU. For a TPU v5e the compiler estimates 0.9 ms for windows and 1.6 ms for slices,
    with the gradient, of [4, 256, 256, 64] in bfloat16.
    """
    if target_device().platform == "tpu":
        return nn.max_pool(x_bhwc, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    _, height, width, _ = x_bhwc.shape
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jnp.pad(x_bhwc, padding, constant_values=-jnp.inf)
    top, middle, bottom = (x[:, i : i + height - 1 : 2] for i in range(3))
    x = jnp.maximum(jnp.maximum(top, middle), bottom)
    left, centre, right = (x[:, :, i : i + width - 1 : 2] for i in range(3))
    return jnp.maximum(jnp.maximum(left, centre), right)


class ResNet(nn.Module):
    """A ResNet that returns the feature maps of its four stages.

    Attributes:
        blocks: Bottleneck blocks of each stage.
        stem_width: Channels of the 7x7 stem.
        bottleneck_width: Channels inside the first stage's blocks; doubles every stage.
        stage_width: Output channels of the first stage; doubles every stage.
        norm: `frozen_batch` (pretrained) or `group` (from scratch).
        norm_groups: Groups of the group norm, 4 or more channels each: a group of one channel is
            scaled to unit variance even where it is constant.
        dtype: Compute dtype; parameters are float32.
        remat: Computes the blocks again in the backward pass: less memory, more time.
    """

    blocks: Sequence[int] = BLOCKS[50]
    stem_width: int = 64
    bottleneck_width: int = 64
    stage_width: int = 256
    norm: str = "frozen_batch"
    norm_groups: int = NORM_GROUPS
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images_bhwc: jax.Array, deterministic: bool = True) -> dict[str, jax.Array]:
        """Computes res2..res5 (strides 4, 8, 16, 32) of normalised images [B, H, W, 3].

        H and W are multiples of 32. Nothing here is random: `deterministic` is taken so that
        every backbone is called alike.
        """
        del deterministic
        kind = {"norm": self._norm(), "dtype": self.dtype}
        stem = ConvNorm(self.stem_width, 7, 2, **kind, name="stem")
        x = nn.relu(stem(images_bhwc.astype(self.dtype)))
        x = max_pool(x)
        maps = {}
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for stage, blocks in enumerate(self.blocks):
            for index in range(blocks):
                x = block(
                    features=self.stage_width * 2**stage,
                    bottleneck=self.bottleneck_width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    **kind,
                    name=f"res{stage + 2}_{index}",
                )(x)
            maps[f"res{stage + 2}"] = x
        return maps

    def _norm(self) -> Norm:
        if self.norm == "frozen_batch":
            return FrozenBatchNorm
        if self.norm == "group":
            return functools.partial(group_norm, self.norm_groups)
        raise UserError(f"backbone norm '{self.norm}': choose 'frozen_batch' or 'group'")


LayerNames = Callable[[str], dict[str, str]]  # see `detectron2_names`


def detectron2_names(layer: str) -> dict[str, str]:
    """Names of the tensors of a layer: `kernel`, and its norm's `scale`, `bias`, `mean`, `var`.

    Args:
        layer: `stem`, `res2_0/conv1` to `conv3` or `res2_0/shortcut`.
    """
    name = "stem.conv1" if layer == "stem" else re.sub(r"(res\d)_(\d+)/", r"\1.\2.", layer)
    norm = {leaf: f"{name}.norm.{suffix}" for leaf, suffix in TORCH_NORM.items()}
    return {"kernel": f"{name}.weight"} | norm


def torchvision_names(layer: str) -> dict[str, str]:
    """Returns the names of torchvision and timm, by the keys of `detectron2_names`."""
    kernel, norm = "conv1", "bn1"
    if layer != "stem":
        block, part = layer.split("/")
        stage, index = block.removeprefix("res").split("_")
        kernel, norm = (f"layer{int(stage) - 1}.{index}.{name}" for name in TORCHVISION_PARTS[part])
    leaves = {leaf: f"{norm}.{name}" for leaf, name in TORCH_NORM.items()}
    return {"kernel": f"{kernel}.weight"} | leaves


def caffe2_names(layer: str, norm: dict[str, str]) -> dict[str, str]:
    """Returns the names of Caffe2, by the keys of `detectron2_names`.

    Args:
        layer: A layer, as `detectron2_names` takes it.
        norm: Names of the norm's leaves, `CAFFE2_NORM` or `CAFFE2_FOLDED`.
    """
    kernel, place = "conv1", "res_conv1"
    if layer != "stem":
        block, part = layer.split("/")
        kernel = place = f"{block}_{CAFFE2_PARTS[part]}"
    return {"kernel": f"{kernel}_w"} | {leaf: f"{place}_bn_{x}" for leaf, x in norm.items()}


NAMINGS = (
    (detectron2_names, DETECTRON2_LEFT_OUT),
    (torchvision_names, TORCHVISION_LEFT_OUT),
    (functools.partial(caffe2_names, norm=CAFFE2_NORM), CAFFE2_LEFT_OUT),
    (functools.partial(caffe2_names, norm=CAFFE2_FOLDED), CAFFE2_LEFT_OUT),
)


def check(module: ResNet) -> None:
    """Raises UserError where the published modules have other groups in their group norms."""
    if module.norm != "frozen_batch" and module.norm_groups != NORM_GROUPS:
        raise UserError(
            f"model.backbone.norm_groups is {module.norm_groups}: the published modules have "
            f"{NORM_GROUPS}, and would compute something else with this model's weights"
        )


def names(module: ResNet, layer_names: LayerNames = detectron2_names) -> list[Name]:
    """Names of a ResNet's arrays."""
    is_frozen = module.norm == "frozen_batch"
    collection = "constants" if is_frozen else "params"
    leaves = tuple(TORCH_NORM) if is_frozen else ("scale", "bias")
    found = []
    for layer in _layers(module):
        tensors = layer_names(layer)
        found.append(Name(f"params/{layer}/conv/kernel", tensors["kernel"], "conv"))
        found += [Name(f"{collection}/{layer}/norm/{leaf}", tensors[leaf]) for leaf in leaves]
    return found


def infer_sizes(tensors: Tensors, layer_names: LayerNames = detectron2_names) -> dict[str, Any]:
    """Reads a ResNet's attributes off its tensors: group norm is one without statistics.

    Raises:
        UserError: A tensor that tells a size is missing.
    """

    def width(layer: str) -> int:
        hint = ": only ResNets of bottleneck blocks are read (50 layers or more)"
        return tensors.shape(layer_names(layer)["kernel"], 4, hint)[0]

    def blocks(stage: int) -> int:
        index = 0
        while layer_names(f"res{stage}_{index}/conv1")["kernel"] in tensors:
            index += 1
        return index

    return {
        "blocks": tuple(blocks(stage) for stage in range(2, 6)),
        "stem_width": width("stem"),
        "bottleneck_width": width("res2_0/conv1"),
        "stage_width": width("res2_0/conv3"),
        "norm": "frozen_batch" if layer_names("stem")["mean"] in tensors else "group",
    }


def recognise(tensors: Tensors) -> Published:
    """Recognises a file with a ResNet with batch norm, by detectron2's to Caffe2's names.

    Where it has no means and variances (they are folded into scale and bias), mean is 0 and
    variance 1 - epsilon, so that dividing by sqrt(variance + epsilon) changes nothing.

    Raises:
        UserError: The first layer has no batch norm, or a tensor that tells a size is missing.
    """
    layer_names, left_out = _find_naming(tensors)
    sizes = infer_sizes(tensors, layer_names) | {"norm": "frozen_batch"}
    found = names(ResNet(**sizes), layer_names)
    stem = layer_names("stem")
    absent = []
    if stem["mean"] not in tensors and stem["var"] not in tensors:
        values = {"mean": 0.0, "var": 1.0 - NORM_EPSILON}
        reason = "folded into scale and bias: mean 0, variance 1"
        leaves = [(row.path, row.path.rpartition("/")[2]) for row in found]
        absent = [Absent(path, reason, values[leaf]) for path, leaf in leaves if leaf in values]
    return Published(sizes, found, left_out, absent)


def _find_naming(tensors: Tensors) -> tuple[LayerNames, Reasons]:
    scales = []
    for layer_names, left_out in NAMINGS:
        stem = layer_names("stem")
        if stem["kernel"] in tensors and stem["scale"] in tensors:
            return layer_names, left_out
        scales.append(f"'{tensors.prefix}{stem['scale']}'")
    raise UserError(
        f"{tensors.where}: a ResNet without batch norm: there is none of {', '.join(scales)}"
    )


def _layers(module: ResNet) -> list[str]:
    layers = ["stem"]
    for stage, count in enumerate(module.blocks, 2):
        for index in range(count):
            widens = index == 0 and (stage > 2 or module.stem_width != module.stage_width)
            parts = ("shortcut",) * widens + ("conv1", "conv2", "conv3")
            layers += [f"res{stage}_{index}/{part}" for part in parts]
    return layers


BACKBONE = Backbone(
    module=ResNet,
    variants={f"r{depth}": {"blocks": blocks} for depth, blocks in BLOCKS.items()},
    marks=tuple(dict.fromkeys(layer_names("stem")["kernel"] for layer_names, _ in NAMINGS)),
    names=names,
    infer_sizes=infer_sizes,
    recognise=recognise,
    check=check,
    left_out=(COUNTS,),
    starts={"r50": f"{ZOO}/torchvision/R-50.pkl", "r101": f"{ZOO}/MSRA/R-101.pkl"},
)
