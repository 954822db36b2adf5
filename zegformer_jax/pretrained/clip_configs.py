"""CLIP's sizes: from OpenAI's shapes, from and to transformers' and OpenCLIP's configs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zegformer_jax.models.clip.model import CLIP_MEAN, CLIP_STD, ClipConfig
from zegformer_jax.models.clip.resnet import STRIDE, WIDTH_FACTOR
from zegformer_jax.models.clip.vit import LAYER_NORM_EPSILON, MLP_RATIO
from zegformer_jax.pretrained.clip_tensors import OPENAI

HEAD_WIDTH = 64  # openai/CLIP model.py, build_model: heads = width // 64
LEGACY_EOS = 2  # transformers reads the feature at the largest id where a config says 2

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
# Fields that change nothing here, at any value or at the one that stands here.
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


def from_shapes(arrays: Mapping[str, np.ndarray], where: str) -> ClipConfig:
    """Infers the sizes of OpenAI's CLIP from its tensors, as their build_model does.

    Raises ValueError that names a tensor which is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays:
            raise ValueError(f"{where}: no tensor '{name}': not a CLIP in OpenAI's naming")
        return arrays[name].shape

    vocab_size, text_width = shape("token_embedding.weight")
    context_length, _ = shape("positional_embedding")
    _, embed_dim = shape("text_projection")
    if "visual.attnpool.positional_embedding" in arrays:
        vision = _resnet_shapes(arrays, shape)
    else:
        vision_width, _ = shape("visual.proj")
        patch_size = shape("visual.conv1.weight")[-1]
        side = round((shape("visual.positional_embedding")[0] - 1) ** 0.5)
        vision = {
            "image_size": side * patch_size,
            "patch_size": patch_size,
            "vision_width": vision_width,
            "vision_layers": _count(arrays, OPENAI.visual_blocks),
            "vision_heads": max(1, vision_width // HEAD_WIDTH),
        }
    return ClipConfig(
        **vision,
        text_width=text_width,
        text_layers=_count(arrays, OPENAI.text_blocks),
        text_heads=max(1, text_width // HEAD_WIDTH),
        vocab_size=vocab_size,
        context_length=context_length,
        embed_dim=embed_dim,
    )


def from_hugging_face(path: Path) -> ClipConfig:
    """Reads transformers' CLIPConfig; its defaults (ViT-B/32) stand where a field is absent.

    Raises FileNotFoundError, and ValueError that names a field which is not supported.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a CLIP is a Hugging Face directory")
    fields = json.loads(path.read_text())
    if fields.get("model_type", "clip") != "clip":
        raise ValueError(f"{path}: model_type is '{fields['model_type']}', not 'clip'")
    # In old files these hold what differs from the defaults, and win (transformers' CLIPConfig).
    vision = (fields.get("vision_config") or {}) | (fields.get("vision_config_dict") or {})
    text = (fields.get("text_config") or {}) | (fields.get("text_config_dict") or {})
    vision_width = vision.get("hidden_size", 768)
    text_width = text.get("hidden_size", 512)
    mlp = {"intermediate_size": 2048} | text  # transformers' default, at any width
    _check(path, "text_config.intermediate_size", mlp, MLP_RATIO * text_width)
    for key, tower in (("vision_config", vision), ("text_config", text)):
        _check(path, f"{key}.layer_norm_eps", tower, LAYER_NORM_EPSILON)
    activation = vision.get("hidden_act", "quick_gelu")
    _check(path, "text_config.hidden_act", {"hidden_act": "quick_gelu"} | text, activation)
    eos = text.get("eos_token_id", 49407)
    return ClipConfig(
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 32),
        vision_width=vision_width,
        vision_layers=vision.get("num_hidden_layers", 12),
        vision_heads=vision.get("num_attention_heads", 12),
        vision_mlp_width=_unless_usual(vision.get("intermediate_size", 3072), vision_width),
        text_width=text_width,
        text_layers=text.get("num_hidden_layers", 12),
        text_heads=text.get("num_attention_heads", 8),
        vocab_size=text.get("vocab_size", 49408),
        context_length=text.get("max_position_embeddings", 77),
        embed_dim=fields.get("projection_dim", 512),
        activation=activation,
        eos_token_id=None if eos == LEGACY_EOS else eos,
    )


def from_open_clip(path: Path) -> ClipConfig:
    """Reads ``open_clip_config.json``.

    Raises FileNotFoundError, and ValueError that names a field which is not supported.
    """
    fields = json.loads(path.read_text())
    if "model_cfg" not in fields:
        raise ValueError(f"{path}: no model_cfg: not OpenCLIP's config")
    model = dict(fields["model_cfg"])
    model_only = {
        key: model.pop(key, default) for key, default in (("embed_dim", 512), ("quick_gelu", False))
    }
    vision = _open_clip_fields(path, "vision_cfg", model.pop("vision_cfg", {}), OPEN_CLIP_VISION)
    text = _open_clip_fields(path, "text_cfg", model.pop("text_cfg", {}), OPEN_CLIP_TEXT)
    _open_clip_fields(path, "model_cfg", model, {})
    if text["hf_tokenizer_name"] and not (path.parent / "tokenizer.json").is_file():
        raise ValueError(
            f"{path}: text_cfg.hf_tokenizer_name is {text['hf_tokenizer_name']}, but no "
            "tokenizer.json lies beside it; only CLIP's own vocabulary needs no file"
        )
    if text["pool_type"] not in ("argmax", "eos"):
        raise ValueError(f"{path}: text_cfg.pool_type is {text['pool_type']}: not supported")
    is_resnet = not isinstance(vision["layers"], int)
    width = vision["width"]
    features = width * WIDTH_FACTOR if is_resnet else width
    return ClipConfig(
        image_size=_side(path, vision["image_size"]),
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


def hugging_face_config(
    config: ClipConfig, start_id: int, end_id: int
) -> dict[str, dict[str, Any]]:
    """Gives ``config.json`` and ``preprocessor_config.json`` of a ViT CLIP, by their names.

    ``start_id`` and ``end_id`` are the tokenizer's.
    """
    shared = {
        "projection_dim": config.embed_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "attention_dropout": 0.0,
    }
    text = {
        "model_type": "clip_text_model",
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
        "model_type": "clip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_mlp_width or MLP_RATIO * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    model = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": shared | text,
        "vision_config": shared | vision,
    }
    return {
        "config.json": model,
        "preprocessor_config.json": _preprocessor_config(config.image_size),
    }


def open_clip_config(config: ClipConfig) -> dict[str, Any]:
    """Gives ``open_clip_config.json`` of a CLIP with a ResNet."""
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


def _resnet_shapes(arrays: Mapping[str, np.ndarray], shape: Any) -> dict[str, Any]:
    width = shape("visual.layer1.0.conv1.weight")[0]
    side = round((shape("visual.attnpool.positional_embedding")[0] - 1) ** 0.5)
    return {
        "image_size": side * STRIDE,
        "patch_size": None,
        "vision_width": width,
        "vision_layers": tuple(_count(arrays, f"visual.layer{i}") for i in (1, 2, 3, 4)),
        "vision_heads": max(1, width * WIDTH_FACTOR // HEAD_WIDTH),
    }


def _count(arrays: Mapping[str, np.ndarray], prefix: str) -> int:
    """Counts the blocks whose tensors' names go on with a number after ``prefix.``."""
    start = len(prefix) + 1
    return len({name[start:].split(".")[0] for name in arrays if name.startswith(f"{prefix}.")})


def _unless_usual(mlp_width: int, width: int) -> int | None:
    return None if mlp_width == MLP_RATIO * width else mlp_width


def _side(path: Path, image_size: int | list[int]) -> int:
    sides = {image_size} if isinstance(image_size, int) else set(image_size)
    if len(sides) > 1:
        raise ValueError(f"{path}: vision_cfg.image_size is {image_size}; images are square here")
    return sides.pop()


def _check(path: Path, key: str, fields: Mapping[str, Any], expected: Any) -> None:
    value = fields.get(key.split(".")[1], expected)
    if value != expected:
        raise ValueError(f"{path}: {key} is {value}; only {expected} is supported")


def _open_clip_fields(
    path: Path, section: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Gives the fields that ``defaults`` has; any other must be off, unused or as expected."""
    for key, value in fields.items():
        fixed = OPEN_CLIP_FIXED[section]
        if key in fixed:
            _check(path, f"{section}.{key}", fields, fixed[key])
        elif value and key not in defaults and key not in OPEN_CLIP_UNUSED[section]:
            raise ValueError(f"{path}: {section}.{key} is {value}: not supported")
    return {key: fields.get(key, default) for key, default in defaults.items()}


def _preprocessor_config(image_size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # Pillow's bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _unit(CLIP_MEAN),
        "image_std": _unit(CLIP_STD),
    }


def _unit(values: tuple[float, ...]) -> list[float]:
    return [x / 255 for x in values]
