"""The authors' checkpoints (detectron2's names), both ways: groupers and per-pixel models.

MaskFormer's checkpoints for semantic segmentation are read too, to start from: all but their
classes, for which a vocabulary's text embeddings stand here.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from zegformer_jax import models
from zegformer_jax.models.clip.model import CLIP_MEAN, CLIP_STD
from zegformer_jax.models.grouper import CLASS_LOGIT_SCALE
from zegformer_jax.models.layers import NORM_GROUPS
from zegformer_jax.models.normalise import PIXEL_MEAN, PIXEL_STD
from zegformer_jax.pretrained import backbones
from zegformer_jax.pretrained.tables import (
    Shapes,
    Summary,
    Tensors,
    flatten,
    read,
    shapes_of,
    unflatten,
    write,
)
from zegformer_jax.pretrained.zegformer_names import (
    LOGIT_SCALES,
    PIXEL_DECODER,
    PREDICTOR,
    PROJECTIONS,
    Sizes,
    table,
)
from zegformer_jax.runtime.errors import UserError

HEAD_CHANNELS = 32  # of an attention head, in every published model: 256 channels, 8 heads
EMBED_DIM = 512  # of ViT-B/16's text embeddings; where no tensor tells

CLIP_PREFIX = f"{PREDICTOR}.clip_model."
MASKFORMER_CLASSES = f"{PREDICTOR}.class_embed.weight"
LEFT_OUT = (
    (r"sem_seg_head\.(predictor\.)?logit_scale", "the class logits' scale, fixed at 100"),
    (re.escape(CLIP_PREFIX) + ".*", "CLIP, which is read on its own"),
    (r"sem_seg_head\.predictor\.class_embed\..*", "MaskFormer's classes"),
    (r"sem_seg_head\.(predictor\.)?\w*text_features\w*", "text embeddings, which are an argument"),
    (r"criterion\.empty_weight", "the loss's class weights, which a config sets"),
    (r"(clip_)?pixel_(mean|std)", "the images' normalisation, which is fixed"),
    (r".*\.num_batches_tracked", "PyTorch's count of batches"),
)
NEW_CLASSES = (
    (r"params/(class_projection/.*|no_object)", "MaskFormer does not compare with text embeddings"),
)


class Checkpoint(NamedTuple):
    """Content of a checkpoint.

    Attributes:
        sizes: Of the model, `kind` and `embed_dim` among them; see `models.build`.
        variables: `params` and, with frozen norms, `constants`; float32. What `summary.new`
            names is missing.
        clip_tensors: CLIP's, by OpenAI's names, as they were stored; empty where there is none.
        summary: What became of every tensor.
    """

    sizes: Sizes
    variables: dict[str, Any]
    clip_tensors: dict[str, np.ndarray]
    summary: Summary


def from_checkpoint(
    tensors: Tensors, where: str, heads: int | None = None, embed_dim: int = EMBED_DIM
) -> Checkpoint:
    """Reads a model's state dict, with or without CLIP inside.

    Args:
        tensors: All that the state dict holds, by name, in PyTorch's layouts.
        where: The file's name, for messages.
        heads: See `infer_sizes`.
        embed_dim: See `infer_sizes`.

    Raises:
        UserError: A tensor is missing, has no place or has another shape, or a constant is not
            what it is here; the tensor is named.
    """
    sizes = infer_sizes(tensors, where, heads, embed_dim)
    _check_constants(tensors, where)
    arrays, summary = read(
        table(sizes),
        tensors,
        shapes(sizes),
        where,
        left_out=[*LEFT_OUT, *backbones.left_out(sizes["backbone"])],
        new=NEW_CLASSES if MASKFORMER_CLASSES in tensors else (),
    )
    clip = {
        name.removeprefix(CLIP_PREFIX): x
        for name, x in tensors.items()
        if name.startswith(CLIP_PREFIX)
    }
    return Checkpoint(sizes, unflatten(arrays), clip, summary)


def read_model(tensors: Tensors, where: str, heads: int | None = None) -> Checkpoint:
    """Reads a checkpoint in the authors' layout whose model is complete.

    Args:
        tensors: All that the file holds.
        where: Its name, for messages.
        heads: Attention heads, which nothing in it tells; None: one every 32 channels.

    Raises:
        UserError: A tensor is missing or unknown, or it is MaskFormer's.
    """
    checkpoint = from_checkpoint(tensors, where, heads=heads)
    if checkpoint.summary.new:
        raise UserError(
            f"{where}: MaskFormer's, which cannot name classes it was not trained on: train "
            f"from it with --config.model.start_from={where}"
        )
    return checkpoint


def to_checkpoint(variables: Mapping[str, Any], sizes: Sizes) -> dict[str, np.ndarray]:
    """Returns a model's state dict, float32: the inverse of `from_checkpoint`, CLIP left out.

    It also has the constants that PyTorch's modules hold, so that they load it strictly:
    the logit scale, and a Swin's indices of offsets (int64).

    Args:
        variables: `params` and, with frozen norms, `constants`.
        sizes: Of the model; a config's `model` will do.

    Raises:
        UserError: The published modules cannot compute what this model does, or the variables
            are not those of the sizes.
    """
    _check_published(sizes)
    tensors = write(table(sizes), flatten(variables))
    tensors[LOGIT_SCALES[sizes["kind"]]] = np.array([math.log(CLASS_LOGIT_SCALE)], np.float32)
    return tensors | backbones.constants(sizes["backbone"])


def infer_sizes(
    tensors: Tensors, where: str, heads: int | None = None, embed_dim: int = EMBED_DIM
) -> Sizes:
    """Reads a model's sizes off its tensors' names and shapes.

    Args:
        tensors: All that the state dict holds, by name.
        where: The file's name, for messages.
        heads: Attention heads, which no tensor tells; None for one every 32 channels.
        embed_dim: Size of the text embeddings where no tensor tells: MaskFormer's checkpoints.

    Raises:
        UserError: A tensor that tells a size is missing, or the heads do not divide the width.
    """
    tell = _Tell(tensors, where)
    kind = "per_pixel" if f"{PROJECTIONS['per_pixel']}.weight" in tensors else "zegformer"
    projection = f"{PROJECTIONS[kind]}.weight"
    if MASKFORMER_CLASSES not in tensors or projection in tensors:
        embed_dim = tell.size(projection)
    sizes = {
        "kind": kind,
        "embed_dim": embed_dim,
        "backbone": backbones.infer_sizes({name: x.shape for name, x in tensors.items()}, where),
        "pixel_decoder": _infer_pixel_decoder(tell, heads),
    }
    if kind == "zegformer":
        decoder = f"{PREDICTOR}.transformer.decoder"
        width = tell.size(f"{decoder}.norm.weight")
        sizes["transformer"] = {
            "queries": tell.size(f"{PREDICTOR}.query_embed.weight"),
            "width": width,
            "layers": tell.count(f"{decoder}.layers."),
            "heads": tell.heads(width, heads),
            "mlp_width": tell.size(f"{decoder}.layers.0.linear1.weight"),
            "project_input": f"{PREDICTOR}.input_proj.weight" in tensors,
        }
        sizes["memory"] = "res5"
    return sizes


def shapes(sizes: Sizes) -> Shapes:
    """Returns the shape of every array of a model by its path."""
    model = models.build(sizes["kind"], sizes, sizes["embed_dim"])
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    text = jax.ShapeDtypeStruct((1, sizes["embed_dim"]), np.float32)
    return shapes_of(jax.eval_shape(model.init, jax.random.key(0), images, text))


class _Tell(NamedTuple):
    """Reads sizes off a file's tensors."""

    tensors: Tensors
    where: str

    def size(self, name: str) -> int:
        """The length of a tensor's first axis."""
        if name not in self.tensors:
            raise UserError(
                f"{self.where}: no tensor '{name}': is this the state dict of a grouper or a "
                "per-pixel model, with detectron2's names?"
            )
        if not self.tensors[name].shape:
            raise UserError(f"{self.where}: tensor '{name}' is one number, not an array")
        return self.tensors[name].shape[0]

    def count(self, prefix: str) -> int:
        """Number of numbered modules after a prefix."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return len({m[1] for m in map(pattern.match, self.tensors) if m})

    def heads(self, width: int, heads: int | None) -> int:
        """The attention heads of a transformer, which must divide its width."""
        heads = max(1, width // HEAD_CHANNELS) if heads is None else heads
        if width % heads:
            raise UserError(
                f"{self.where}: {width} channels cannot be split among {heads} attention heads: "
                "give the number of heads"
            )
        return heads


def _infer_pixel_decoder(tell: _Tell, heads: int | None) -> dict[str, Any]:
    sizes = {
        "width": tell.size(f"{PIXEL_DECODER}.layer_4.weight"),
        "mask_width": tell.size(f"{PIXEL_DECODER}.mask_features.weight"),
    }
    layers = f"{PIXEL_DECODER}.transformer.encoder.layers."
    if encoder_layers := tell.count(layers):
        sizes |= {
            "encoder_layers": encoder_layers,
            "encoder_heads": tell.heads(sizes["width"], heads),
            "encoder_mlp_width": tell.size(f"{layers}0.linear1.weight"),
        }
    return sizes


def _check_constants(tensors: Tensors, where: str) -> None:
    """Compares the stored constants that are left out with those of this project."""
    expected = dict.fromkeys(LOGIT_SCALES.values(), [math.log(CLASS_LOGIT_SCALE)])
    expected |= {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
    expected |= {"clip_pixel_mean": CLIP_MEAN, "clip_pixel_std": CLIP_STD}
    for name, values in expected.items():
        found = np.ravel(tensors.get(name, values))
        if len(found) != len(values) or not np.allclose(found, values, rtol=1e-5, atol=0):
            raise UserError(
                f"{where}: tensor '{name}' is {found.tolist()}; only {list(values)} is supported"
            )


def _check_published(sizes: Sizes) -> None:
    """Refuses a model that the published modules cannot compute."""
    if sizes["kind"] not in PROJECTIONS:
        raise UserError(f"model.kind '{sizes['kind']}' has no published form")
    backbones.check(sizes["backbone"])
    fixed = {"model.memory": (sizes.get("memory", "res5"), "res5")}
    groups = sizes["pixel_decoder"].get("norm_groups", NORM_GROUPS)
    fixed["model.pixel_decoder.norm_groups"] = (groups, NORM_GROUPS)
    for name, (value, published) in fixed.items():
        if value != published:
            raise UserError(
                f"{name} is {value}: the published modules have {published}, and would compute "
                "something else with this model's weights"
            )
