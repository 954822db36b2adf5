"""Reads and writes the sizes of CLIPs in Hugging Face's and OpenCLIP's configs.

transformers reads and writes Hugging Face's configs; it has no reader of OpenCLIP's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zegformer_jax.models.clip.model import CLIP_MEAN, CLIP_STD, ClipConfig
from zegformer_jax.models.clip.resnet import WIDTH_FACTOR
from zegformer_jax.models.clip.vit import MLP_RATIO
from zegformer_jax.models.layers import NORM_EPSILON
from zegformer_jax.runtime import hugging_face
from zegformer_jax.runtime.errors import MissingFile, UserError

LEGACY_EOS = 2  # at this value transformers reads the feature at the largest id

# OpenCLIP's fields (open_clip model.py, CLIPVisionCfg and CLIPTextCfg) with their defaults.
OPEN_CLIP_VISION = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
}
OPEN_CLIP_TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "pool_type": "argmax",
    "eos_id": 2,
    "hf_tokenizer_name": None,
}
# Fields without effect on the model: at any value (UNUSED), or only at the given value (FIXED).
OPEN_CLIP_UNUSED = {
    "vision_cfg": ("patch_dropout", "output_tokens", "timm_model_pretrained"),
    "text_cfg": ("output_tokens", "hf_model_pretrained", "pad_id"),
    "model_cfg": ("custom_text", "init_logit_scale", "nonscalar_logit_scale"),
}
OPEN_CLIP_FIXED = {
    "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable"},
    "text_cfg": {"mlp_ratio": 4.0, "proj_type": "linear"},
    "model_cfg": {},
}


def read_fields(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: The file.

    Raises:
        MissingFile: There is no such file.
        UserError: The file has other content; one line that names the file.
    """
    if not path.is_file():
        raise MissingFile(f"{path}: no such file")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def from_hugging_face(path: Path) -> ClipConfig:
    """Reads Hugging Face's config; absent fields have the defaults of transformers' CLIPConfig.

    Args:
        path: A file `config.json`.

    Raises:
        MissingFile: There is no such file.
        UserError: The config is not a CLIP's, or the named field is not supported.
    """
    fields = read_fields(path)
    if fields.get("model_type", "clip") != "clip":
        raise UserError(f"{path}: model_type is '{fields['model_type']}', not 'clip'")
    library = hugging_face.load_transformers()
    with hugging_face.errors_in_one_line(path, "CLIP config"):
        theirs = library.CLIPConfig.from_dict(fields)
    vision, text = theirs.vision_config, theirs.text_config
    mlp_width = MLP_RATIO * text.hidden_size
    _check(path, "text_config.intermediate_size", text.intermediate_size, mlp_width)
    _check(path, "text_config.hidden_act", text.hidden_act, vision.hidden_act)
    for key, tower in (("vision_config", vision), ("text_config", text)):
        _check(path, f"{key}.layer_norm_eps", tower.layer_norm_eps, NORM_EPSILON)
    eos = text.eos_token_id
    return _config(
        path,
        image_size=_side(path, "vision_config.image_size", vision.image_size),
        patch_size=_side(path, "vision_config.patch_size", vision.patch_size),
        vision_width=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        vision_mlp_width=_unless_usual(vision.intermediate_size, vision.hidden_size),
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_heads=text.num_attention_heads,
        vocab_size=text.vocab_size,
        context_length=text.max_position_embeddings,
        embed_dim=theirs.projection_dim,
        activation=vision.hidden_act,
        eos_token_id=None if eos == LEGACY_EOS else eos,
    )


def from_open_clip(path: Path) -> ClipConfig:
    """Reads OpenCLIP's config.

    Args:
        path: A file `open_clip_config.json`.

    Raises:
        MissingFile: There is no such file.
        UserError: The named field is not supported.
    """
    fields = read_fields(path)
    if "model_cfg" not in fields:
        raise UserError(f"{path}: no model_cfg: not OpenCLIP's config")
    model = dict(fields["model_cfg"])
    model_only = {
        key: model.pop(key, default) for key, default in (("embed_dim", 512), ("quick_gelu", False))
    }
    vision = _open_clip_fields(path, "vision_cfg", model.pop("vision_cfg", {}), OPEN_CLIP_VISION)
    text = _open_clip_fields(path, "text_cfg", model.pop("text_cfg", {}), OPEN_CLIP_TEXT)
    _open_clip_fields(path, "model_cfg", model, {})
    if text["hf_tokenizer_name"] and not (path.parent / "tokenizer.json").is_file():
        raise UserError(
            f"{path}: text_cfg.hf_tokenizer_name is {text['hf_tokenizer_name']}, but no "
            "tokenizer.json is beside it; only CLIP's own vocabulary needs no file"
        )
    if text["pool_type"] not in ("argmax", "eos"):
        raise UserError(f"{path}: text_cfg.pool_type is {text['pool_type']}: not supported")
    is_resnet = not isinstance(vision["layers"], int)
    width = vision["width"]
    features = width * WIDTH_FACTOR if is_resnet else width
    return _config(
        path,
        image_size=_side(path, "vision_cfg.image_size", vision["image_size"]),
        patch_size=None if is_resnet else vision["patch_size"],
        vision_width=width,
        vision_layers=tuple(vision["layers"]) if is_resnet else vision["layers"],
        vision_heads=features // vision["head_width"],
        vision_mlp_width=(
            None if is_resnet else _unless_usual(int(width * vision["mlp_ratio"]), width)
        ),
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        vocab_size=text["vocab_size"],
        context_length=text["context_length"],
        embed_dim=model_only["embed_dim"],
        activation="quick_gelu" if model_only["quick_gelu"] else "gelu",
        eos_token_id=text["eos_id"] if text["pool_type"] == "eos" else None,
    )


def save_hugging_face(directory: Path, config: ClipConfig, start_id: int, end_id: int) -> None:
    """Writes `config.json` and `preprocessor_config.json` of a ViT CLIP.

    Args:
        directory: An existing directory, which receives the files.
        config: The CLIP's sizes.
        start_id: The id of the tokenizer's start token.
        end_id: The id of the tokenizer's end token.
    """
    library = hugging_face.load_transformers()
    shared = {"projection_dim": config.embed_dim, "hidden_act": config.activation}
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "intermediate_size": MLP_RATIO * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        "bos_token_id": start_id,
        "eos_token_id": LEGACY_EOS if config.eos_token_id is None else config.eos_token_id,
        "pad_token_id": end_id,
    }
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_mlp_width or MLP_RATIO * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    library.CLIPConfig(
        architectures=["CLIPModel"],
        projection_dim=config.embed_dim,
        text_config=shared | text,
        vision_config=shared | vision,
    ).save_pretrained(directory)
    side = config.image_size
    library.CLIPImageProcessorPil(  # its default mean and standard deviation are OpenAI's
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(directory)


def open_clip_config(config: ClipConfig) -> dict[str, Any]:
    """Returns the fields of `open_clip_config.json` for a CLIP with a ResNet."""
    vision = {
        "image_size": config.image_size,
        "layers": list(config.vision_layers),
        "width": config.vision_width,
        "head_width": config.vision_width * WIDTH_FACTOR // config.vision_heads,
        "patch_size": None,
    }
    text = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
    }
    if config.eos_token_id is not None:
        text |= {"pool_type": "eos", "eos_id": config.eos_token_id}
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": text,
    }
    return {
        "model_cfg": model,
        "preprocess_cfg": {"mean": _unit(CLIP_MEAN), "std": _unit(CLIP_STD)},
    }


def _config(path: Path, **sizes: Any) -> ClipConfig:
    try:
        return ClipConfig(**sizes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _unless_usual(mlp_width: int, width: int) -> int | None:
    return None if mlp_width == MLP_RATIO * width else mlp_width


def _side(path: Path, key: str, value: Any) -> int:
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or None in sides:
        raise UserError(f"{path}: {key} is {value}; only square images and patches are supported")
    return sides.pop()


def _check(path: Path, key: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise UserError(f"{path}: {key} is {value}; only {expected} is supported")


def _open_clip_fields(
    path: Path, section: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields in `defaults`; all others must be off, unused or have a fixed value."""
    for key, value in fields.items():
        fixed = OPEN_CLIP_FIXED[section]
        if key in fixed:
            _check(path, f"{section}.{key}", value, fixed[key])
        elif value and key not in defaults and key not in OPEN_CLIP_UNUSED[section]:
            raise UserError(f"{path}: {section}.{key} is {value}: not supported")
    return {key: fields.get(key, default) for key, default in defaults.items()}


def _unit(values: tuple[float, ...]) -> list[float]:
    return [x / 255 for x in values]
