"""Names in the authors' checkpoints, after detectron2, and ours: the table of a whole model."""

from collections.abc import Mapping
from typing import Any

from zegformer_jax.pretrained import backbones
from zegformer_jax.pretrained.tables import (
    CONV,
    FLAT,
    LINEAR,
    LINEAR_HEADS_IN,
    ROW,
    Entry,
    Layout,
    entry,
)

Sizes = Mapping[str, Any]  # what `models.build` takes: the modules' attributes; `kind`, `embed_dim`

PIXEL_DECODER = "sem_seg_head.pixel_decoder"
PREDICTOR = "sem_seg_head.predictor"
PROJECTIONS = {
    "zegformer": f"{PREDICTOR}.projection_layer",
    "per_pixel": "sem_seg_head.projection_layer",
}
LOGIT_SCALES = {"zegformer": f"{PREDICTOR}.logit_scale", "per_pixel": "sem_seg_head.logit_scale"}


def table(sizes: Sizes) -> list[Entry]:
    """Returns an entry for every array of a model, and for every tensor but constants."""
    rows = backbones.table(sizes["backbone"])
    rows += _pixel_decoder(sizes["pixel_decoder"].get("encoder_layers", 0))
    if sizes["kind"] == "per_pixel":
        return rows + _weight_and_bias("params/class_projection", PROJECTIONS["per_pixel"], CONV)
    return rows + _predictor(sizes["transformer"])


def _pixel_decoder(encoder_layers: int) -> list[Entry]:
    ours = "params/pixel_decoder"
    convolutions = [(f"lateral_res{i + 1}", f"adapter_{i}") for i in range(1, 4)]
    convolutions += [(f"output_res{i + 1}", f"layer_{i}") for i in range(1, 5)]
    rows = _weight_and_bias(f"{ours}/mask_features", f"{PIXEL_DECODER}.mask_features", CONV)
    for path, name in convolutions:
        rows.append(entry(f"{ours}/{path}/conv/kernel", f"{PIXEL_DECODER}.{name}.weight", CONV))
        rows += _norm(f"{ours}/{path}/norm", f"{PIXEL_DECODER}.{name}.norm")
    if encoder_layers:
        rows += _weight_and_bias(f"{ours}/input_projection", f"{PIXEL_DECODER}.input_proj", CONV)
    for i in range(encoder_layers):
        path = f"{ours}/encoder/layer{i}"
        rows += _transformer_layer(path, f"{PIXEL_DECODER}.transformer.encoder.layers.{i}")
    return rows


def _predictor(transformer: Mapping[str, Any]) -> list[Entry]:
    ours, decoder = "params/transformer", f"{PREDICTOR}.transformer.decoder"
    rows = [
        entry(f"{ours}/query_embedding", f"{PREDICTOR}.query_embed.weight"),
        entry("params/no_object", f"{PREDICTOR}.bg_feature", ROW),
        *_weight_and_bias("params/class_projection", PROJECTIONS["zegformer"]),
        *_norm(f"{ours}/norm", f"{decoder}.norm"),
    ]
    if transformer.get("project_input", True):
        rows += _weight_and_bias(f"{ours}/input_projection", f"{PREDICTOR}.input_proj", CONV)
    for i in range(transformer["layers"]):
        rows += _transformer_layer(f"{ours}/layer{i}", f"{decoder}.layers.{i}", is_decoder=True)
    for i in range(3):
        rows += _weight_and_bias(
            f"params/mask_embedding/layer{i}", f"{PREDICTOR}.mask_embed.layers.{i}"
        )
    return rows


def _transformer_layer(path: str, name: str, is_decoder: bool = False) -> list[Entry]:
    rows = _attention(f"{path}/self_attention", f"{name}.self_attn")
    if is_decoder:
        rows += _attention(f"{path}/cross_attention", f"{name}.multihead_attn")
    for i in (1, 2):
        rows += _weight_and_bias(f"{path}/linear{i}", f"{name}.linear{i}")
    for i in (1, 2, 3) if is_decoder else (1, 2):
        rows += _norm(f"{path}/norm{i}", f"{name}.norm{i}")
    return rows


def _attention(path: str, name: str) -> list[Entry]:
    kernels = tuple(f"{path}/{part}/kernel" for part in ("query", "key", "value"))
    biases = tuple(f"{path}/{part}/bias" for part in ("query", "key", "value"))
    return [
        Entry(kernels, (f"{name}.in_proj_weight",), LINEAR),
        Entry(biases, (f"{name}.in_proj_bias",), FLAT),
        *_weight_and_bias(f"{path}/out", f"{name}.out_proj", LINEAR_HEADS_IN),
    ]


def _weight_and_bias(path: str, name: str, layout: Layout = LINEAR) -> list[Entry]:
    return [
        entry(f"{path}/kernel", f"{name}.weight", layout),
        entry(f"{path}/bias", f"{name}.bias"),
    ]


def _norm(path: str, name: str) -> list[Entry]:
    return [entry(f"{path}/scale", f"{name}.weight"), entry(f"{path}/bias", f"{name}.bias")]
