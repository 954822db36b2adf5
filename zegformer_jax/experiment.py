"""An experiment on disk: the config of a workdir, and the objects that the config names."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from zegformer_jax import models
from zegformer_jax.checkpoints import FOLDER, Checkpoints
from zegformer_jax.models.clip import CLIP, ClipConfig
from zegformer_jax.pretrained.clip import HUB_NAME, load_clip
from zegformer_jax.text import DATA, Tokenizer, load_templates, text_embeddings
from zegformer_jax.vocabulary import Vocabulary

CONFIG_FILE = "experiment.json"


class LoadedClip(NamedTuple):
    """A CLIP that is ready to encode.

    Attributes:
        config: its sizes.
        params: its parameters.
        tokenizer: texts to token ids.
    """

    config: ClipConfig
    params: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def module(self) -> CLIP:
        """The Flax module."""
        return CLIP(self.config)


def check_config(config: ConfigDict, workdir: Path) -> None:
    """Compares the config with the workdir's, if there is one.

    Raises:
        ValueError: the workdir holds another experiment; the message names the fields.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return
    old = traverse_util.flatten_dict(json.loads(path.read_text()), sep=".")
    new = traverse_util.flatten_dict(json.loads(config.to_json_best_effort()), sep=".")
    changed = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
    if changed:
        first = ", ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in changed[:3])
        raise ValueError(
            f"{path}: the run in this workdir has another config ({first}): "
            "take another --workdir, or remove this one"
        )


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes the config into the workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(config.to_json_best_effort(indent=2) + "\n")
    os.replace(partial, path)


def load_config(workdir: str | Path) -> ConfigDict:
    """Reads a workdir's config.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(workdir) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir}: no trained model here ({CONFIG_FILE} is missing): "
            "name the --workdir of a finished run, or train one with ./run.sh"
        )
    return ConfigDict(json.loads(path.read_text())).lock()


def resolve(path: str, workdir: Path) -> Path:
    """Takes a path relative to the workdir if it exists there or nowhere else."""
    inside = Path(os.path.normpath(workdir / path))  # "../clip" also of a workdir yet to be made
    return Path(path) if not inside.exists() and Path(path).exists() else inside


def load_vocabulary(name: str) -> Vocabulary:
    """Reads a vocabulary by its name in data/vocabularies, or a file by its path."""
    path = Path(name) if name.endswith(".json") else DATA / "vocabularies" / f"{name}.json"
    return Vocabulary.load(path)


def open_split(config: ConfigDict, workdir: Path, split: str) -> Any:
    """Opens a split of the experiment's data set: a `zegformer_jax.input.datasets.Source`."""
    from zegformer_jax.input import datasets

    return datasets.open_source(
        config.dataset.name,
        split,
        data_dir=resolve(config.dataset.directory, workdir),
        vocabulary=load_vocabulary(config.dataset.vocabulary),
        **config.dataset.options.to_dict(),
    )


def load_clip_of(config: ConfigDict, workdir: Path) -> LoadedClip:
    """Reads the experiment's CLIP from a folder or from the Hub."""
    source = config.clip.source
    path = resolve(source, workdir)
    is_hub_name = HUB_NAME.fullmatch(source) and not path.exists()
    return LoadedClip(*load_clip(source if is_hub_name else path))


def embed_names(clip: LoadedClip, names: tuple[str, ...], prompts: str) -> np.ndarray:
    """Text embeddings of class names with a prompt set, float32 [C, D] of unit length."""
    encode = jax.jit(
        lambda params, tokens: clip.module.apply(
            {"params": params}, tokens, method=CLIP.encode_text
        )
    )
    return text_embeddings(
        lambda tokens: encode(clip.params, tokens), clip.tokenizer, names, load_templates(prompts)
    )


def build_model(config: ConfigDict, embed_dim: int) -> models.Grouper | models.PerPixel:
    """Makes the experiment's model."""
    sizes = config.model.to_dict()
    return models.build(config.model.kind, sizes, embed_dim, config.dtype)


def load_variables(workdir: str | Path) -> dict[str, Any]:
    """Reads `params` and `constants` of the newest checkpoint in a workdir.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    missing = FileNotFoundError(f"{workdir}: no checkpoint here: train the model first")
    if not (Path(workdir) / FOLDER).is_dir():
        raise missing
    with Checkpoints(workdir) as checkpoints:
        if checkpoints.latest_step is None:
            raise missing
        state = checkpoints.restore_raw()
    return {"params": state["params"], "constants": state.get("constants") or {}}
