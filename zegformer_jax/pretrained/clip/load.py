"""Loads CLIPs: OpenAI's archives, Hugging Face's and OpenCLIP's directories and Hub names.

It needs no PyTorch and executes nothing that a file holds. transformers and huggingface_hub cannot
read OpenAI's and OpenCLIP's layouts, nor weights without PyTorch.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from zegformer_jax.models.clip.model import ClipConfig
from zegformer_jax.pretrained.clip import configs, normalisation
from zegformer_jax.pretrained.clip.positions import resize_positions
from zegformer_jax.pretrained.clip.shapes import from_shapes
from zegformer_jax.pretrained.clip.sources import (
    FLAX_WEIGHTS,
    HUGGING_FACE_CONFIG,
    HUGGING_FACE_WEIGHTS,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    is_open_clip,
    locate,
)
from zegformer_jax.pretrained.clip.tensors import (
    HUGGING_FACE,
    OPENAI,
    published_tensors,
    read_parameters,
)
from zegformer_jax.pretrained.formats import read_tensors, write_tensors
from zegformer_jax.runtime.errors import MissingFile, UserError, reading
from zegformer_jax.text.tokenizer import Tokenizer

OPENAI_VOCAB_SIZE = 49408
AGAIN = "get the published file again"
# Prefix of the text tower's names if it is a separate module (OpenCLIP's CustomTextCLIP).
TEXT_PREFIX = re.compile(
    r"^text\.(?=transformer\.|token_embedding\.|ln_final\."
    r"|positional_embedding$|text_projection$)"
)


def load_clip(
    source: str | Path, image_size: int | None = None
) -> tuple[ClipConfig, dict, Tokenizer]:
    """Loads a CLIP: sizes, parameters and tokenizer.

    Args:
        source: One of
            - a Hugging Face directory: `config.json`, weights, the tokenizer's files;
            - an OpenCLIP directory: `open_clip_config.json`, weights; or its file of weights;
            - the name of either on the Hub, such as `openai/clip-vit-base-patch16`: it is
              downloaded once, and read from the Hub's cache without a network;
            - an OpenAI archive (`ViT-B-16.pt`), or a state dict in OpenAI's naming, .pth, .npz
              or .safetensors, with QuickGELU and heads of width 64.
        image_size: Side of the images in pixels; position embeddings are interpolated to it. None
            keeps the training's.

    Returns:
        Sizes, parameters (float32, NumPy; for images normalised by CLIP_MEAN and CLIP_STD) and
        the tokenizer: the source's, or OpenAI's if the source has none.

    Raises:
        MissingFile: A file is missing.
        UserError: A tensor is missing, unused or of another shape, or a field of the config is not
            supported.
    """
    path = locate(source)
    if path.is_dir() and not is_open_clip(path):
        config, params = _read_hugging_face(path)
    elif (path if path.is_dir() else path.parent).joinpath(OPEN_CLIP_CONFIG).is_file():
        config, params = _read_open_clip(path)
    else:
        config, params = _read_openai(path)
    tokenizer = _load_tokenizer(path, config)
    if image_size is not None:
        config, params = resize_positions(params, config, image_size)
    return config, params, tokenizer


def from_openai_state_dict(
    arrays: Mapping[str, np.ndarray], where: str = "OpenAI's state dict"
) -> tuple[ClipConfig, dict]:
    """Converts OpenAI's state dict of a ViT or ResNet to sizes and float32 parameters.

    Args:
        arrays: Arrays by name, in the names and layouts of OpenAI's state dicts. In place of
            `token_embedding.weight` there may be `token_embedding.rows` and
            `token_embedding.values`: the indices and values of the nonzero rows among 49408.
        where: The source's name, for messages.

    Raises:
        UserError: The named tensor is missing, unused or of another shape.
    """
    arrays = dict(arrays)
    if "token_embedding.rows" in arrays:
        values = np.asarray(arrays.pop("token_embedding.values"), np.float32)
        embedding = np.zeros((OPENAI_VOCAB_SIZE, values.shape[1]), np.float32)
        embedding[arrays.pop("token_embedding.rows")] = values
        arrays["token_embedding.weight"] = embedding
    config = from_shapes(arrays, where)
    return config, read_parameters(arrays, config, OPENAI, where)


def save_clip(
    directory: str | Path, config: ClipConfig, params: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    """Writes a directory that `load_clip` reads.

    A ViT becomes a Hugging Face directory, which transformers' CLIPModel reads, with
    `preprocessor_config.json`. A ResNet, for which transformers has no model, becomes an
    OpenCLIP directory.

    Args:
        directory: Receives the files; it is made if it is missing.
        config: The CLIP's sizes.
        params: Its parameters.
        tokenizer: Its tokenizer.

    Raises:
        UserError: The parameters do not fit the config.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    naming = OPENAI if config.is_resnet else HUGGING_FACE
    weights = OPEN_CLIP_WEIGHTS[0] if config.is_resnet else HUGGING_FACE_WEIGHTS[0]
    tensors = published_tensors(params, config, naming)
    write_tensors(directory / weights, tensors, {"format": "pt"})  # transformers needs it
    if config.is_resnet:
        fields = json.dumps(configs.open_clip_config(config), indent=2)
        (directory / OPEN_CLIP_CONFIG).write_text(fields + "\n")
    else:
        configs.save_hugging_face(directory, config, tokenizer.start_id, tokenizer.end_id)
    tokenizer.save(directory)


def _read_hugging_face(directory: Path) -> tuple[ClipConfig, dict]:
    config_path = directory / HUGGING_FACE_CONFIG
    with reading(config_path, AGAIN):
        config = configs.from_hugging_face(config_path)
    tensors, where = _read_hugging_face_tensors(directory)
    params = read_parameters(tensors, config, HUGGING_FACE, where)
    mean, std = normalisation.from_hugging_face(directory)
    return config, normalisation.fold_normalisation(params, config, mean, std, str(directory))


def _read_open_clip(path: Path) -> tuple[ClipConfig, dict]:
    """Reads a directory in OpenCLIP's layout, or one file of weights in it."""
    directory = path if path.is_dir() else path.parent
    if path.is_dir():
        found = [directory / x for x in OPEN_CLIP_WEIGHTS if (directory / x).is_file()]
        if not found:
            raise MissingFile(f"{directory / OPEN_CLIP_WEIGHTS[0]}: no such file")
        path = found[0]
    config_path = directory / OPEN_CLIP_CONFIG
    with reading(config_path, AGAIN):
        config = configs.from_open_clip(config_path)
        mean, std = normalisation.from_open_clip(config_path)
    params = read_parameters(_openai_names(read_tensors(path)), config, OPENAI, str(path))
    return config, normalisation.fold_normalisation(params, config, mean, std, str(config_path))


def _read_openai(path: Path) -> tuple[ClipConfig, dict]:
    if path.name in OPEN_CLIP_WEIGHTS:
        raise MissingFile(
            f"{path}: {OPEN_CLIP_CONFIG}, which holds its activation and heads, is not beside it"
        )
    if path.name in HUGGING_FACE_WEIGHTS:
        raise UserError(f"{path}: pass the directory {path.parent}, with its {HUGGING_FACE_CONFIG}")
    return from_openai_state_dict(_openai_names(read_tensors(path)), str(path))


def _openai_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the prefix of OpenCLIP's text tower, and the axis of its logit scale if any."""
    renamed = {TEXT_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
    if "logit_scale" in renamed:
        renamed["logit_scale"] = np.reshape(renamed["logit_scale"], ())
    return renamed


def _read_hugging_face_tensors(directory: Path) -> tuple[dict[str, np.ndarray], str]:
    """Reads the tensors of a directory; returns them and the name of the file.

    It takes the first of these formats: one safetensors file, the parts listed in an index, the
    Flax file of transformers 4, PyTorch's file.
    """
    paths = [directory / name for name in HUGGING_FACE_WEIGHTS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise MissingFile(
            f"{paths[0]}: no such file; convert other formats with transformers' "
            "CLIPModel.from_pretrained(...).save_pretrained(...)"
        )
    if path.suffix == ".json":
        tensors, parts = {}, configs.read_fields(path).get("weight_map")
        if not isinstance(parts, dict):
            raise UserError(f"{path}: no weight_map: not an index of weights")
        for part in sorted(set(parts.values())):
            tensors |= read_tensors(directory / part)
        return tensors, str(path)
    read = _read_flax_weights if path.name == FLAX_WEIGHTS else read_tensors
    return read(path), str(path)


def _read_flax_weights(path: Path) -> dict[str, np.ndarray]:
    """Converts the Flax weights of transformers 4 to PyTorch's names and layouts."""
    with reading(path, AGAIN):
        tree = serialization.msgpack_restore(path.read_bytes())
        arrays = traverse_util.flatten_dict(tree, sep=".")
    tensors = {}
    for name, array in arrays.items():
        parent, _, leaf = name.rpartition(".")
        if leaf == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        if leaf in ("kernel", "scale", "embedding"):
            name = f"{parent}.weight"
        tensors[name] = array
    return tensors


def _load_tokenizer(path: Path, config: ClipConfig) -> Tokenizer:
    """Reads the tokenizer beside a CLIP; OpenAI's if the layout makes it optional."""
    directory = path if path.is_dir() else path.parent
    has_own = any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    is_open_clip = (directory / OPEN_CLIP_CONFIG).is_file()
    if path.is_file() and not is_open_clip or is_open_clip and not has_own:
        tokenizer = Tokenizer.openai(config.context_length)
    else:
        tokenizer = Tokenizer.from_directory(directory, config.context_length)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the token embedding "
            f"{config.vocab_size}: they belong to different models"
        )
    return tokenizer
