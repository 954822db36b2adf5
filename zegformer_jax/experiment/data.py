"""The data set and vocabulary of an experiment."""

import dataclasses
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from zegformer_jax.experiment.workdir import resolve
from zegformer_jax.text import DATA
from zegformer_jax.vocabulary import Vocabulary


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
