"""The authors' checkpoints (detectron2 layout): their names and ours."""

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

Arrays = Mapping[str, np.ndarray]

FROZEN_BATCH_NORM = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
}
ADAPTERS = {"1": "res2", "2": "res3", "3": "res4"}
OUTPUTS = {"1": "res2", "2": "res3", "3": "res4", "4": "res5"}
ATTENTIONS = {"self_attn": "self_attention", "multihead_attn": "cross_attention"}
LEFT_OUT = {"sem_seg_head.predictor.logit_scale": "the class logits' scale is fixed at 100"}


def conv_kernel(weight: np.ndarray) -> np.ndarray:
    """[out, in, height, width] to [height, width, in, out]."""
    return weight.transpose(2, 3, 1, 0)


def _leaf(kind: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Names and lays out a `weight` or `bias` by its number of axes."""
    if kind == "bias":
        return "bias", array
    if array.ndim == 4:
        return "kernel", conv_kernel(array)
    return ("kernel", array.T) if array.ndim == 2 else ("scale", array)


def _attention(path: str, kind: str, array: np.ndarray, heads: int) -> Arrays:
    """Splits PyTorch's fused q, k, v projection, or reshapes the output projection."""
    if kind.startswith("out_proj"):
        if kind.endswith("bias"):
            return {f"{path}/out/bias": array}
        return {f"{path}/out/kernel": array.T.reshape(heads, -1, array.shape[0])}
    parts = {}
    for name, part in zip(("query", "key", "value"), np.split(array, 3), strict=True):
        if kind.endswith("bias"):
            parts[f"{path}/{name}/bias"] = part.reshape(heads, -1)
        else:
            parts[f"{path}/{name}/kernel"] = part.T.reshape(part.shape[1], heads, -1)
    return parts


def _backbone(rest: str, array: np.ndarray) -> Arrays:
    """One tensor of the ResNet."""
    block, _, tail = rest.rpartition(".norm.")
    if block:
        path = block.replace("stem.conv1", "stem")
        path = re.sub(r"(res\d)\.(\d+)\.", r"\1_\2/", path)
        return {f"constants/backbone/{path}/norm/{FROZEN_BATCH_NORM[tail]}": array}
    path = rest.removesuffix(".weight").replace("stem.conv1", "stem")
    path = re.sub(r"(res\d)\.(\d+)\.", r"\1_\2/", path)
    return {f"params/backbone/{path}/conv/kernel": conv_kernel(array)}


def _pixel_decoder(rest: str, array: np.ndarray) -> Arrays:
    """One tensor of the FPN."""
    name, _, tail = rest.partition(".")
    if name == "mask_features":
        leaf, value = _leaf(tail, array)
        return {f"params/pixel_decoder/mask_features/{leaf}": value}
    kind, _, index = name.partition("_")
    layer = f"lateral_{ADAPTERS[index]}" if kind == "adapter" else f"output_{OUTPUTS[index]}"
    part = "norm" if tail.startswith("norm.") else "conv"
    leaf, value = _leaf(tail.removeprefix("norm."), array)
    return {f"params/pixel_decoder/{layer}/{part}/{leaf}": value}


def _predictor(rest: str, array: np.ndarray, heads: int) -> Arrays:
    """One tensor of the transformer decoder or of the heads."""
    if rest == "query_embed.weight":
        return {"params/transformer/query_embedding": array}
    if rest == "bg_feature":
        return {"params/no_object": array[0]}
    name, _, kind = rest.rpartition(".")
    decoder = re.fullmatch(r"transformer\.decoder\.layers\.(\d+)\.(\w+)\.(.+)", rest)
    if decoder and decoder[2] in ATTENTIONS:
        path = f"params/transformer/layer{decoder[1]}/{ATTENTIONS[decoder[2]]}"
        return _attention(path, decoder[3], array, heads)
    leaf, value = _leaf(kind, array)
    if decoder:
        return {f"params/transformer/layer{decoder[1]}/{decoder[2]}/{leaf}": value}
    places = {
        "transformer.decoder.norm": "transformer/norm",
        "input_proj": "transformer/input_projection",
        "projection_layer": "class_projection",
    } | {f"mask_embed.layers.{i}": f"mask_embedding/layer{i}" for i in range(3)}
    return {f"params/{places[name]}/{leaf}": value}


def from_detectron2(arrays: Arrays, heads: int) -> tuple[dict, dict[str, str]]:
    """Translates a grouper's or a per-pixel model's state dict to Flax variables.

    Args:
        arrays: PyTorch-layout arrays by their names in the authors' checkpoints.
        heads: attention heads of the transformer decoder, which no tensor's shape tells.

    Returns:
        The variables `{"params": ..., "constants": ...}`, float32, and the names that were left
        out with the reason for each.

    Raises:
        KeyError: a name is not known.
    """
    flat, left_out = {}, {}
    for name, array in arrays.items():
        array = np.asarray(array, np.float32)
        rest = name.removeprefix("sem_seg_head.")
        if name in LEFT_OUT or rest == "logit_scale":
            left_out[name] = LEFT_OUT["sem_seg_head.predictor.logit_scale"]
        elif ".clip_model." in name:
            left_out[name] = "CLIP is read on its own"
        elif name.startswith("backbone."):
            flat |= _backbone(name.removeprefix("backbone."), array)
        elif rest.startswith("pixel_decoder."):
            flat |= _pixel_decoder(rest.removeprefix("pixel_decoder."), array)
        elif rest.startswith("predictor."):
            flat |= _predictor(rest.removeprefix("predictor."), array, heads)
        elif rest.startswith("projection_layer."):
            leaf, value = _leaf(rest.removeprefix("projection_layer."), array)
            flat[f"params/class_projection/{leaf}"] = value
        else:
            raise KeyError(f"{name}: not a name of the authors' checkpoints")
    return traverse_util.unflatten_dict(flat, sep="/"), left_out
