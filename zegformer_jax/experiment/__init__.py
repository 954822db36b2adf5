"""An experiment: a config and a workdir, and the objects that they define, each made once."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

from zegformer_jax.experiment import data, models, origins, settings, workdir
from zegformer_jax.experiment.models import LoadedClip
from zegformer_jax.input.settings import InputSettings
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.segmentation.classifiers import CLASSIFIERS
from zegformer_jax.segmentation.skipping import Skipping
from zegformer_jax.segmentation.zegformer import (
    Model,
    PerPixelBaseline,
    TextEmbeddings,
    Weights,
    ZegFormer,
)
from zegformer_jax.text.vocabulary import Vocabulary

__all__ = ["Experiment", "LoadedClip"]


class Experiment:
    """A config and a workdir, opened once and passed on; nothing else reads a config.

    The sections of the config are the typed values of `settings`. Files are read when they are
    first needed.

    Attributes:
        workdir: Folder of the run, local or remote.
        kind: Kind of model, `model.kind`.
        seed: Seed of parameters, dropout, and order and augmentation of the images.
        dtype: Compute dtype of the training.
        start_from: Weights that the training starts from, `model.start_from`.
        clip_settings: Section `clip`.
        dataset: Section `dataset`.
        input: Section `input`.
        loss: Section `loss`.
        optimiser: Section `optimiser`.
        train: Section `train`.
        sharding: Section `sharding`.
        eval: Section `eval`.
    """

    def __init__(self, config: ConfigDict, folder: epath.PathLike):
        """Reads the config's values.

        Args:
            config: The complete config.
            folder: The workdir.
        """
        self._config = config
        self.workdir = epath.Path(folder)
        self.kind: str = config.model.kind
        self.seed: int = config.seed
        self.dtype: str = config.dtype
        self.start_from: str = config.model.start_from
        read = settings.read_section
        self.clip_settings = read(settings.ClipSettings, config.clip)
        self.dataset = read(settings.DatasetSettings, config.dataset)
        self.input = read(InputSettings, config.input)
        self.loss = read(settings.LossSettings, config.loss)
        self.optimiser = read(settings.OptimiserSettings, config.optimiser)
        self.train = read(settings.TrainSettings, config.train)
        self.sharding = read(settings.ShardingSettings, config.sharding)
        self.eval = read(settings.EvalSettings, config.eval)

    @classmethod
    def open(cls, config: ConfigDict | None, folder: epath.PathLike) -> "Experiment":
        """Opens an experiment.

        Args:
            config: The complete config; None reads the workdir's.
            folder: The workdir.

        Raises:
            MissingFile: No config is given, and the workdir holds none.
        """
        return cls(workdir.load_config(folder) if config is None else config, folder)

    @property
    def config_json(self) -> str:
        """The whole config as JSON, for notes and hashes."""
        return self._config.to_json_best_effort()

    def check(self, change: bool = False) -> None:
        """Compares the config with the workdir's, if it has one, by `workdir.check_config`."""
        workdir.check_config(self._config, self.workdir, change)

    def save(self) -> None:
        """Writes the config into the workdir."""
        workdir.save_config(self._config, self.workdir)

    def resolve(self, path: str) -> Path:
        """Resolves a local path: relative to the workdir, else to the current folder."""
        return workdir.resolve(path, self.workdir)

    def resolve_prompts(self, prompts: str) -> str:
        """Resolves a prompt set's file, if it names one, by `workdir.resolve_prompts`."""
        return workdir.resolve_prompts(prompts, self.workdir)

    @functools.cached_property
    def dataset_directory(self) -> str | Path:
        """Directory of the data set: a local path, or a URL."""
        return data.dataset_directory(self._config, self.workdir)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the data set's labels."""
        return data.dataset_vocabulary(self._config, self.workdir)

    def open_split(self, split: str) -> Any:
        """Opens `train` or `validation`, a `zegformer_jax.input.datasets.Source`."""
        return data.open_split(self._config, self.workdir, split)

    def on_dataset(self, name: str, directory: str) -> "tuple[Experiment, Vocabulary | None]":
        """Returns the experiment on another data set, by `data.on_dataset`.

        Args:
            name: Name of the data set.
            directory: Directory of its records, or of a folder of images and labels.

        Returns:
            The experiment there, and the vocabulary of its training; None for the experiment's own
            data set.
        """
        config, is_own = data.on_dataset(self._config, self.workdir, name, directory)
        there = Experiment(config, self.workdir)
        for name in vars(self).keys() & {"clip", "origin"}:
            setattr(there, name, getattr(self, name))
        return there, None if is_own else self.vocabulary

    @functools.cached_property
    def clip(self) -> LoadedClip | None:
        """The CLIP of the experiment; None for a baseline on word vectors."""
        return models.load_clip_of(self._config, self.workdir)

    @property
    def uses_clip(self) -> bool:
        """True unless the model is a baseline on word vectors."""
        return models.needs_clip(self._config)

    @property
    def heads(self) -> int:
        """Number of the model's attention heads, which cannot be inferred from a checkpoint."""
        return models.attention_heads(self._config.model)

    @property
    def has_frozen_norms(self) -> bool:
        """True if the backbone's norms are not trained: they need weights to start from."""
        return models.has_frozen_norms(self._config.model)

    @property
    def has_checkpoint(self) -> bool:
        """True if a training in the workdir resumes from a checkpoint."""
        return workdir.has_checkpoint(self.workdir)

    def compare_sizes(self, sizes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns the fields in which a checkpoint's sizes differ, by `models.compare_sizes`."""
        return models.compare_sizes(self._config.model, sizes)

    def embed_classes(self, names: tuple[str, ...], prompts: str = "") -> np.ndarray:
        """Returns the embeddings of class names for the grouper, float32 [C, D] of unit length.

        Args:
            names: Class names; commas separate synonyms.
            prompts: Prompt set; "" takes the training's, `clip.grouper_prompts`.
        """
        return models.embed_classes(self._config, self.workdir, self.clip, names, prompts)

    def text_embeddings(self, names: tuple[str, ...]) -> TextEmbeddings:
        """Returns the text embeddings of class names for both halves of the method."""
        grouper_cd = jnp.asarray(self.embed_classes(names, self.eval.grouper_prompts))
        if self.kind == "per_pixel":
            return TextEmbeddings(grouper_cd)
        prompts = self.resolve_prompts(self.clip_settings.classifier_prompts)
        classifier_cd = self.clip.embed(names, prompts)
        return TextEmbeddings(grouper_cd, jnp.asarray(classifier_cd))

    def build_model(self, embed_dim: int, dtype: str | None = None) -> nn.Module:
        """Returns the Flax module that is trained.

        Args:
            embed_dim: Size of the text embeddings.
            dtype: Compute dtype; None takes the training's.
        """
        return models.build_model(self._config, embed_dim, dtype)

    @functools.cached_property
    def embed_dim(self) -> int:
        """Size of the text embeddings."""
        if self.clip is not None:
            return self.clip.config.embed_dim
        return self.embed_classes(self.vocabulary.names).shape[1]

    @functools.cached_property
    def segmentation_model(self) -> Model:
        """The model for `segmentation.zegformer.predict`, without its arrays.

        Raises:
            UserError: A field of the section `eval` is unknown or does not fit.
        """
        module = self.build_model(self.embed_dim, self.eval.dtype)
        if self.kind == "per_pixel":
            return PerPixelBaseline(module, self.eval.resize)
        if self.kind != "zegformer":
            raise UserError(
                f"{self.workdir}: a model of kind '{self.kind}' does not segment images"
            )
        return ZegFormer(
            module,
            self._segment_classifier(),
            self.eval.ensemble_weight,
            Skipping(self.eval.skip_below, self.eval.top_segments),
            self.eval.resize,
        )

    def _segment_classifier(self) -> Any:
        name = self.eval.segment_classifier
        if name not in CLASSIFIERS:
            raise UserError(
                f"eval.segment_classifier '{name}': choose one of {', '.join(CLASSIFIERS)}"
            )
        kind = CLASSIFIERS[name]
        fields = [field.name for field in dataclasses.fields(kind) if field.name != "clip"]
        options = {field: getattr(self.eval, field) for field in fields}
        return kind(self.clip.module(self.eval.dtype), **options)

    @functools.cached_property
    def origin(self) -> origins.Origin:
        """Origin of the trained weights: the checkpoint of `eval.checkpoint`."""
        return origins.origin_of(self.workdir, self.train.steps, self.eval.checkpoint)

    def facts(self, split: str, images: int) -> list[str]:
        """Returns lines on the data, the vocabulary and CLIP, for the start of a run.

        Args:
            split: `train` or `validation`.
            images: Number of the split's images.
        """
        place = self.dataset_directory
        return origins.facts(self.dataset, place, split, images, self.vocabulary, self.clip)

    def variables(self, checkpoint: str = "latest") -> dict[str, Any]:
        """Reads the model's variables to the host, by `workdir.load_variables`."""
        return workdir.load_variables(self.workdir, checkpoint)

    def weights(self, variables: Any = None) -> Weights:
        """Returns the arrays for `segmentation.zegformer.predict`, on the host.

        Args:
            variables: The model's variables; None reads the checkpoint of `eval.checkpoint`.
        """
        if variables is None:
            variables = self.variables(self.eval.checkpoint)
        return Weights(variables, self.clip and self.clip.params)
