"""Models of the golden cases, built from their `case.json`."""

import json

import numpy as np
from conftest import GOLDEN

from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.per_pixel import PerPixel
from zegformer_jax.models.pixel_decoder import PixelDecoder
from zegformer_jax.models.resnet import BLOCKS, ResNet
from zegformer_jax.models.transformer import TransformerDecoder
from zegformer_jax.pretrained.zegformer import from_detectron2

CASE = json.loads((GOLDEN / "case.json").read_text())["case"]


def parts() -> dict:
    """The backbone and the pixel decoder of the case."""
    sizes = CASE["model"]
    return {
        "backbone": ResNet(BLOCKS[sizes["depth"]], sizes["stem"], sizes["width"], sizes["res2"]),
        "pixel_decoder": PixelDecoder(sizes["conv"], sizes["mask"]),
    }


def grouper() -> Grouper:
    """The grouper of the case."""
    sizes = CASE["model"]
    transformer = TransformerDecoder(
        sizes["queries"], sizes["hidden"], sizes["dec"], sizes["heads"], sizes["ff"], dropout=0.0
    )
    return Grouper(**parts(), transformer=transformer)


def per_pixel() -> PerPixel:
    """The per-pixel baseline of the case."""
    return PerPixel(**parts())


def variables(name: str) -> dict:
    """The Flax variables in a golden file of weights."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return from_detectron2(arrays, CASE["model"]["heads"])[0]
