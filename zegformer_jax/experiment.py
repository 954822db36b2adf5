"""An experiment on disk: the config of a workdir, and the objects that the config names."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from zegformer_jax import embedding_cache, models
from zegformer_jax.checkpoints import FOLDER, Checkpoints
from zegformer_jax.models.clip import CLIP, ClipConfig
from zegformer_jax.pretrained.clip import HUB_NAME, load_clip
from zegformer_jax.text import DATA, Tokenizer, embed_tokens, load_templates, tokenize_classes
from zegformer_jax.vocabulary import Vocabulary
from zegformer_jax.word_vectors import load_word_vectors

CONFIG_FILE = "experiment.json"
CONVERTED_FILE = "converted.txt"  # in a workdir of converted weights: what became of every tensor


@dataclasses.dataclass(frozen=True)
class LoadedClip:
    """A CLIP that is ready to encode.

    Attributes:
        config: its sizes.
        params: its parameters.
        tokenizer: texts to token ids.
    """

    config: ClipConfig
    params: dict[str, Any]
    tokenizer: Tokenizer

    def module(self, dtype: str = "float32") -> CLIP:
        """The Flax module, that computes in a dtype."""
        return CLIP(self.config, jnp.dtype(dtype))

    @functools.cached_property
    def text_digest(self) -> str:
        """Stands for the text tower's numbers; see `embedding_cache`."""
        return embedding_cache.tower_digest(self.config, self.params["text"])

    def embed_tokens(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Embeds classes of given token ids; see `text.embed_tokens`."""
        encode = jax.jit(
            lambda params, tokens: self.module().apply(
                {"params": params}, tokens, method=CLIP.encode_text
            )
        )
        return embed_tokens(lambda tokens: encode(self.params, tokens), tokens)


def check_config(config: ConfigDict, workdir: epath.Path, change: bool = False) -> None:
    """Compares the config with the workdir's, if there is one.

    Args:
        config: the experiment.
        workdir: of a run, perhaps.
        change: whether they may differ.

    Raises:
        ValueError: the workdir holds another experiment, the message names the fields; or
            converted weights.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return
    if (workdir / CONVERTED_FILE).exists():
        raise ValueError(
            f"{workdir}: holds converted weights, no run to go on with: train in another --workdir "
            f"with --config.model.start_from={workdir}"
        )
    old = traverse_util.flatten_dict(json.loads(path.read_text()), sep=".")
    new = traverse_util.flatten_dict(json.loads(config.to_json_best_effort()), sep=".")
    changed = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
    if changed and not change:
        first = ", ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in changed)
        raise ValueError(
            f"{path}: the run in this workdir has another config ({first}): take another "
            "--workdir, remove this one, or go on with the new config by --change_config"
        )


def save_config(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes the config into the workdir."""
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / f"{CONFIG_FILE}.partial"
    partial.write_text(config.to_json_best_effort(indent=2) + "\n")
    partial.replace(workdir / CONFIG_FILE)


def load_config(workdir: epath.PathLike) -> ConfigDict:
    """Reads a workdir's config.

    Raises:
        FileNotFoundError: there is none.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir}: no trained model here ({CONFIG_FILE} is missing): "
            "name the --workdir of a finished run, or train one with ./run.sh"
        )
    return ConfigDict(json.loads(path.read_text())).lock()


def resolve(path: str, workdir: epath.PathLike) -> Path:
    """Takes a local path relative to the workdir if it exists there or nowhere else.

    A workdir in a bucket holds nothing else than its run: what is beside it is local.
    """
    if "://" in str(workdir):
        return Path(path)
    inside = Path(os.path.normpath(Path(workdir) / path))  # "../clip" also where it is yet to be
    return Path(path) if not inside.exists() and Path(path).exists() else inside


def load_vocabulary(name: str) -> Vocabulary:
    """Reads a vocabulary by its name in data/vocabularies, or a file by its path."""
    path = Path(name) if name.endswith(".json") else DATA / "vocabularies" / f"{name}.json"
    return Vocabulary.load(path)


def dataset_directory(config: ConfigDict, workdir: epath.PathLike) -> str | Path:
    """Where the experiment's data set lies: a local path, or a remote one as it is."""
    directory = config.dataset.directory
    return directory if "://" in directory else resolve(directory, workdir)


def dataset_vocabulary(config: ConfigDict, workdir: epath.PathLike) -> Vocabulary:
    """Gives the vocabulary of the experiment's labels; the data set's own where none is named.

    All its classes are seen where the experiment trains on all of them.
    """
    vocabulary = _labels_vocabulary(config, workdir)
    if config.dataset.all_seen:
        return dataclasses.replace(vocabulary, seen=(True,) * len(vocabulary))
    return vocabulary


def _labels_vocabulary(config: ConfigDict, workdir: epath.PathLike) -> Vocabulary:
    if config.dataset.vocabulary:
        return load_vocabulary(config.dataset.vocabulary)
    directory = dataset_directory(config, workdir)
    if isinstance(directory, Path):
        from zegformer_jax.input import folder

        return folder.read_classes(directory)
    from zegformer_jax.input import prepared

    return prepared.read_classes(directory)


def open_split(config: ConfigDict, workdir: epath.PathLike, split: str) -> Any:
    """Opens a split of the experiment's data set: a `zegformer_jax.input.datasets.Source`."""
    from zegformer_jax.input import datasets

    return datasets.open_source(
        config.dataset.name,
        split,
        data_dir=dataset_directory(config, workdir),
        vocabulary=dataset_vocabulary(config, workdir),
        **config.dataset.options.to_dict(),
    )


def load_clip_of(config: ConfigDict, workdir: epath.PathLike) -> LoadedClip | None:
    """Reads the experiment's CLIP from a folder or from the Hub; None where none takes part."""
    if not needs_clip(config):
        return None
    source = config.clip.source
    path = resolve(source, workdir)
    is_hub_name = HUB_NAME.fullmatch(source) and not path.exists()
    image_size = config.clip.input_size or None
    return LoadedClip(*load_clip(source if is_hub_name else path, image_size))


def embed_names(clip: LoadedClip, names: tuple[str, ...], prompts: str) -> np.ndarray:
    """Text embeddings of class names with a prompt set, float32 [C, D] of unit length.

    They are computed once, and then read from where `embedding_cache` keeps them.
    """
    tokens = tokenize_classes(clip.tokenizer, names, load_templates(prompts))
    return embedding_cache.load_or_compute(
        embedding_cache.embedding_key(clip.text_digest, tokens),
        (len(names), clip.config.embed_dim),
        lambda: clip.embed_tokens(tokens),
    )


def embed_classes(
    config: ConfigDict,
    workdir: epath.PathLike,
    clip: LoadedClip | None,
    names: tuple[str, ...],
    prompts: str = "",
) -> np.ndarray:
    """What the model compares its pixels or queries with: float32 [C, D] of unit length.

    CLIP's text embeddings, or word vectors where the baseline's config names a file of them.
    `prompts` names another prompt set than the training's.

    Raises:
        ValueError: word vectors are asked for in another model than the baseline.
    """
    if config.model.word_vectors and config.model.kind != "per_pixel":
        raise ValueError(
            f"model.word_vectors: for model.kind 'per_pixel', not '{config.model.kind}': what "
            "CLIP names needs CLIP's text embeddings"
        )
    if clip is None:
        return load_word_vectors(resolve(config.model.word_vectors, workdir), names)
    return embed_names(clip, names, prompts or config.clip.grouper_prompts)


def needs_clip(config: ConfigDict) -> bool:
    """Whether CLIP takes part: not in the per-pixel baseline on word vectors."""
    return config.model.kind != "per_pixel" or not config.model.word_vectors


def model_sizes(config: ConfigDict) -> dict[str, Any]:
    """The sizes of the experiment's model, as `models.build` takes them."""
    sizes = config.model.to_dict()
    swin = sizes.pop("swin")
    if config.model.backbone.kind == "swin":
        sizes["backbone"] = {"kind": "swin"} | swin
    return sizes


def build_model(
    config: ConfigDict, embed_dim: int, dtype: str | None = None
) -> models.Grouper | models.PerPixel:
    """Makes the experiment's model; `dtype` is what to compute in, None: as the training does."""
    return models.build(
        config.model.kind,
        model_sizes(config),
        embed_dim,
        dtype or config.dtype,
        remat=config.train.remat,
    )


def load_variables(workdir: epath.PathLike, checkpoint: str = "latest") -> dict[str, Any]:
    """Reads `params` and `constants` of a checkpoint in a workdir.

    The parameters are their averages where the run kept such.

    Args:
        workdir: of a run.
        checkpoint: `latest` or `best`, the one whose validation was.

    Raises:
        FileNotFoundError: there is no checkpoint, or none was validated.
        ValueError: `checkpoint` is neither.
    """
    if checkpoint not in ("latest", "best"):
        raise ValueError(f"eval.checkpoint '{checkpoint}': choose latest or best")
    if not (epath.Path(workdir) / FOLDER).is_dir():
        raise FileNotFoundError(f"{workdir}: no checkpoint here: train the model first")
    with Checkpoints(workdir) as checkpoints:
        if checkpoints.latest_step is None:
            raise FileNotFoundError(f"{workdir}: no checkpoint here: train the model first")
        step = checkpoints.latest_step if checkpoint == "latest" else checkpoints.best_step
        if step is None:
            raise FileNotFoundError(
                f"{workdir}: no checkpoint here was validated (eval.checkpoint): "
                "train with train.validate_every"
            )
        return _read_variables(checkpoints, step)


def load_step(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """Reads the variables of one step's checkpoint, as `load_variables` does."""
    with Checkpoints(workdir) as checkpoints:
        return _read_variables(checkpoints, step)


def _read_variables(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    parts = checkpoints.read(("params", "constants", "ema"), step)
    return {"params": parts["ema"] or parts["params"], "constants": parts["constants"]}
