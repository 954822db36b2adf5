"""CLIP's weights from and to Hugging Face directories, and from OpenAI's state dicts.

No PyTorch: weights are read by safetensors, or from transformers 4's Flax file.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from zegformer_jax.models.clip import (
    CLIP_MEAN,
    CLIP_STD,
    LAYER_NORM_EPSILON,
    MLP_RATIO,
    ClipConfig,
)
from zegformer_jax.pretrained.clip_tensors import (
    HUGGING_FACE,
    OPENAI,
    published_tensors,
    read_parameters,
)
from zegformer_jax.text import Tokenizer

HUB_NAME = re.compile(r"[^./~][^/]*/[^/]+")  # owner/model
OPENAI_VOCAB_SIZE = 49408
OPENAI_HEAD_WIDTH = 64  # openai/CLIP model.py, build_model: heads = width // 64
FLAX_WEIGHTS = "flax_model.msgpack"  # what some of OpenAI's repositories on the Hub have
LEGACY_EOS = 2  # transformers reads the feature at the largest id where a config says 2


def from_openai_state_dict(arrays: Mapping[str, np.ndarray]) -> tuple[ClipConfig, dict]:
    """Reads OpenAI's ViT CLIP: its sizes and its parameters, as float32.

    Args:
      arrays: name to array, names and layouts as in OpenAI's state dicts. Instead of
        ``token_embedding.weight`` there may be ``token_embedding.rows`` and
        ``token_embedding.values``: the rows that are not zero, of 49408.

    Raises ValueError that names the tensor where one is missing, not used or of another shape.
    """
    arrays = dict(arrays)
    if "token_embedding.rows" in arrays:
        values = np.asarray(arrays.pop("token_embedding.values"), np.float32)
        table = np.zeros((OPENAI_VOCAB_SIZE, values.shape[1]), np.float32)
        table[arrays.pop("token_embedding.rows")] = values
        arrays["token_embedding.weight"] = table
    config = _openai_config(arrays)
    return config, read_parameters(arrays, config, OPENAI, "OpenAI's state dict")


def load_clip(source: str | Path) -> tuple[ClipConfig, dict, Tokenizer]:
    """Reads a CLIP from a Hugging Face directory, or from the Hub by its name.

    Args:
      source: a directory with ``config.json``, ``model.safetensors`` and the tokenizer's files,
        or a name such as ``openai/clip-vit-base-patch16``, which is downloaded once.

    Returns sizes, parameters (float32, NumPy) and the tokenizer. Raises FileNotFoundError where
    a file is missing, ValueError where a tensor is missing, not used or of another shape.
    """
    directory = _locate(source)
    config = _read_config(directory / "config.json")
    tensors, where = _read_tensors(directory)
    params = read_parameters(tensors, config, HUGGING_FACE, where)
    tokenizer = Tokenizer.from_directory(directory, context_length=config.context_length)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the token embedding "
            f"{config.vocab_size}: they are of different models"
        )
    return config, params, tokenizer


def save_clip(
    directory: str | Path, config: ClipConfig, params: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    """Writes a Hugging Face directory that ``load_clip`` and transformers' CLIPModel read.

    Writes ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and the
    tokenizer's files; makes the directory. Raises ValueError where params do not fit config.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(params, config, HUGGING_FACE)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", _hugging_face_config(config, tokenizer))
    _write_json(directory / "preprocessor_config.json", _preprocessor_config(config.image_size))
    tokenizer.save(directory)


def _openai_config(arrays: Mapping[str, np.ndarray]) -> ClipConfig:
    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays:
            hint = " (a ModifiedResNet CLIP is not supported)" if name == "visual.proj" else ""
            raise ValueError(f"OpenAI's state dict: no tensor '{name}'{hint}")
        return arrays[name].shape

    def depth(prefix: str) -> int:
        names = [name for name in arrays if name.startswith(prefix)]
        return len({name[len(prefix) :].split(".")[1] for name in names})

    vision_width, embed_dim = shape("visual.proj")
    patch_size = shape("visual.conv1.weight")[-1]
    side = round((shape("visual.positional_embedding")[0] - 1) ** 0.5)
    vocab_size, text_width = shape("token_embedding.weight")
    return ClipConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=depth(OPENAI.visual),
        vision_heads=vision_width // OPENAI_HEAD_WIDTH,
        text_width=text_width,
        text_layers=depth(OPENAI.text),
        text_heads=text_width // OPENAI_HEAD_WIDTH,
        vocab_size=vocab_size,
        context_length=shape("positional_embedding")[0],
        embed_dim=embed_dim,
    )


def _locate(source: str | Path) -> Path:
    """Gives the local directory of a model: itself, or the Hub's snapshot of that name."""
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if not isinstance(source, str) or not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            f"{source}: no CLIP here: give a Hugging Face directory or a name on the Hub, or "
            "train a small one (./run.sh train --config=configs/openmoji.py:clip)"
        )
    from huggingface_hub import snapshot_download

    small = ["*.json", "merges.txt"]
    try:
        directory = Path(snapshot_download(source, allow_patterns=[*small, "*.safetensors"]))
        if not any(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(source, allow_patterns=[*small, FLAX_WEIGHTS]))
        return directory
    except Exception as error:  # the Hub's errors have many types and span many lines
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise FileNotFoundError(
            f"{source}: neither a directory here nor to be had from the Hugging Face Hub "
            f"({reason}); download it elsewhere and give the directory"
        ) from error


def _read_tensors(directory: Path) -> tuple[dict[str, np.ndarray], str]:
    """Reads all tensors of a directory, from the first format that is there, and the file's name.

    The formats: one safetensors file, the parts that an index lists, transformers 4's Flax file.
    """
    from safetensors.numpy import load_file

    path = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if path.is_file():
        return load_file(path), str(path)
    if index.is_file():
        tensors = {}
        for part in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            tensors |= load_file(directory / part)
        return tensors, str(index)
    if (directory / FLAX_WEIGHTS).is_file():
        return _read_flax_weights(directory / FLAX_WEIGHTS), str(directory / FLAX_WEIGHTS)
    raise FileNotFoundError(
        f"{path}: no such file; convert other formats with transformers' "
        "CLIPModel.from_pretrained(...).save_pretrained(...)"
    )


def _read_flax_weights(path: Path) -> dict[str, np.ndarray]:
    """Reads the Flax weights of transformers 4 under the names and layouts of its PyTorch ones."""
    tree = serialization.msgpack_restore(path.read_bytes())
    tensors = {}
    for name, array in traverse_util.flatten_dict(tree, sep=".").items():
        parent, _, leaf = name.rpartition(".")
        if leaf == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        if leaf in ("kernel", "scale", "embedding"):
            name = f"{parent}.weight"
        tensors[name] = array
    return tensors


def _read_config(path: Path) -> ClipConfig:
    """Reads transformers' CLIPConfig; its defaults (ViT-B/32) stand where a field is absent."""
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
    for name, tower, width in (("vision", vision, vision_width), ("text", text, text_width)):
        _check_fixed(path, f"{name}_config.intermediate_size", tower, MLP_RATIO * width)
        _check_fixed(path, f"{name}_config.layer_norm_eps", tower, LAYER_NORM_EPSILON)
    activation = vision.get("hidden_act", "quick_gelu")
    _check_fixed(path, "text_config.hidden_act", {"hidden_act": "quick_gelu"} | text, activation)
    eos = text.get("eos_token_id", 49407)
    return ClipConfig(
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 32),
        vision_width=vision_width,
        vision_layers=vision.get("num_hidden_layers", 12),
        vision_heads=vision.get("num_attention_heads", 12),
        text_width=text_width,
        text_layers=text.get("num_hidden_layers", 12),
        text_heads=text.get("num_attention_heads", 8),
        vocab_size=text.get("vocab_size", 49408),
        context_length=text.get("max_position_embeddings", 77),
        embed_dim=fields.get("projection_dim", 512),
        activation=activation,
        eos_token_id=None if eos == LEGACY_EOS else eos,
    )


def _check_fixed(path: Path, key: str, tower: Mapping[str, Any], expected: Any) -> None:
    value = tower.get(key.split(".")[1], expected)
    if value != expected:
        raise ValueError(f"{path}: {key} is {value}; only {expected} is supported")


def _hugging_face_config(config: ClipConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    shared = {
        "projection_dim": config.embed_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "attention_dropout": 0.0,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": shared
        | {
            "model_type": "clip_text_model",
            "vocab_size": config.vocab_size,
            "hidden_size": config.text_width,
            "intermediate_size": MLP_RATIO * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "max_position_embeddings": config.context_length,
            "bos_token_id": tokenizer.start_id,
            "eos_token_id": LEGACY_EOS if config.eos_token_id is None else config.eos_token_id,
            "pad_token_id": tokenizer.end_id,
        },
        "vision_config": shared
        | {
            "model_type": "clip_vision_model",
            "hidden_size": config.vision_width,
            "intermediate_size": MLP_RATIO * config.vision_width,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_heads,
            "num_channels": 3,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        },
    }


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
        "image_mean": [x / 255 for x in CLIP_MEAN],
        "image_std": [x / 255 for x in CLIP_STD],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
