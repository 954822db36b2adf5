"""Converts published weights to workdirs, CLIP directories and backbone files, and back."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from zegformer_jax.experiment.models import load_clip_of, set_sizes
from zegformer_jax.experiment.workdir import (
    CONFIG_FILE,
    CONVERTED_FILE,
    load_config,
    load_variables,
    save_config,
)
from zegformer_jax.pretrained import backbones, tables
from zegformer_jax.pretrained.clip.load import from_openai_state_dict, load_clip, save_clip
from zegformer_jax.pretrained.clip.tensors import OPENAI, published_tensors
from zegformer_jax.pretrained.formats import read_tensors, write_tensors
from zegformer_jax.pretrained.start import is_checkpoint, read_backbone
from zegformer_jax.pretrained.zegformer import CLIP_PREFIX, read_model, to_checkpoint
from zegformer_jax.runtime.checkpoints import Checkpoints
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.tokenizer import Tokenizer

CLIP_FOLDER = "clip"
WEIGHT_SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".safetensors", ".npz")
CLIP_MARKS = ("visual.conv1.weight", "visual.stem.0.weight")  # in a file of OpenAI's or OpenCLIP's


def convert(
    source: str | Path,
    destination: str | Path,
    config: ConfigDict,
    *,
    heads: int | None = None,
    with_clip: bool = False,
) -> str:
    """Converts weights to another layout, depending on the content of `source`.

    - A workdir with a trained model becomes a checkpoint in the authors' layout: `destination`
      is a `.safetensors`, `.npz` or, with PyTorch installed, `.pth`.
    - The authors' checkpoint becomes a workdir for `evaluate`, `predict` and
      `zegformer_jax.load`, with CLIP if the checkpoint holds it.
    - A CLIP (a directory, a name on the Hub, OpenAI's or OpenCLIP's file) becomes a directory in
      the Hugging Face layout, or in OpenCLIP's if it is a ResNet.
    - A backbone (detectron2, torchvision, timm, Swin) becomes a file in detectron2's names.

    Args:
        source: A file, a directory or a name on the Hub.
        destination: A file or a directory that does not exist yet.
        config: The config of a new workdir; the checkpoint's sizes replace its own.
        heads: Number of attention heads of a checkpoint, which cannot be inferred from its
            tensors; None takes one per 32 channels, as published.
        with_clip: Also writes CLIP into a checkpoint, as the authors do.

    Returns:
        A table in plain text of the tensors that were used, left out and are new.

    Raises:
        MissingFile: The source does not exist.
        UserError: The source is none of these or incomplete, or the destination exists.
    """
    path, destination = Path(source), Path(destination)
    is_workdir = (path / CONFIG_FILE).is_file()
    if is_workdir and load_config(path).model.kind != "clip":
        return export(path, destination, with_clip)
    if path.is_dir() or not path.exists():
        if path.suffix in WEIGHT_SUFFIXES:
            raise MissingFile(f"{source}: no such file")
        return _convert_clip(source, destination)
    tensors = read_tensors(path)
    if is_checkpoint(tensors):
        return _convert_checkpoint(tensors, str(path), destination, config, heads)
    if any(mark in tensors for mark in CLIP_MARKS):
        return _convert_clip(source, destination)
    return _convert_backbone(tensors, str(path), destination)


def export(workdir: Path, destination: Path, with_clip: bool = False) -> str:
    """Writes a trained model as a checkpoint in the authors' layout, for PyTorch."""
    config = load_config(workdir)
    variables = load_variables(workdir)
    tensors = to_checkpoint(variables, config.model.to_dict())
    if with_clip:
        clip = load_clip_of(config, workdir)
        if clip is None:
            raise UserError(f"{workdir}: this model has no CLIP to write")
        inside = published_tensors(clip.params, clip.config, OPENAI)
        tensors |= {CLIP_PREFIX + name: tensor for name, tensor in inside.items()}
    write_tensors(destination, tensors)
    return f"{len(tensors):,} tensors, {_count(tensors):,} numbers"


def _convert_checkpoint(
    tensors: tables.Tensors, where: str, workdir: Path, config: ConfigDict, heads: int | None
) -> str:
    _check_empty(workdir)
    checkpoint = read_model(tensors, where, heads)
    config = ConfigDict(config.to_dict())
    set_sizes(config.model, checkpoint.sizes)
    clip = None
    if checkpoint.clip_tensors:
        clip = from_openai_state_dict(checkpoint.clip_tensors, where)
        config.clip.source = CLIP_FOLDER
    summary = tables.describe(checkpoint.summary, tensors)
    with _new_folder(workdir) as folder:
        if clip is not None:
            save_clip(folder / CLIP_FOLDER, *clip, Tokenizer.openai())
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(0, checkpoint.variables)
        (folder / CONVERTED_FILE).write_text(f"{where}\n{summary}\n")
        save_config(config, folder)
    return summary


def _convert_clip(source: str | Path, directory: Path) -> str:
    _check_empty(directory)
    config, params, tokenizer = load_clip(source)
    with _new_folder(directory) as folder:
        save_clip(folder, config, params, tokenizer)
    flat = tables.flatten(params)
    return f"CLIP: {len(flat):,} arrays, {_count(flat):,} numbers\n{config}"


def _convert_backbone(tensors: tables.Tensors, where: str, destination: Path) -> str:
    start = read_backbone(tensors, where)
    write_tensors(destination, backbones.write(start.sizes, start.variables))
    return f"{tables.describe(start.summary, tensors)}\nbackbone: {json.dumps(start.sizes)}"


def _check_empty(directory: Path) -> None:
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise UserError(f"{directory}: exists already: name a new folder")


@contextlib.contextmanager
def _new_folder(directory: Path) -> Iterator[Path]:
    """Yields a folder that becomes `directory` at the end; an error leaves nothing."""
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        yield partial
        if directory.is_dir():
            directory.rmdir()
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _count(tensors: Mapping[str, Any]) -> int:
    return sum(int(np.size(tensor)) for tensor in tensors.values())
