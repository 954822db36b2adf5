"""The data set and vocabulary of an experiment."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from zegformer_jax.experiment.workdir import resolve
from zegformer_jax.input import benchmarks
from zegformer_jax.runtime.assets import DATA
from zegformer_jax.text.vocabulary import Vocabulary

FOLDER, GENERATED = "folder", "openmoji_voc"  # data sets that are no published benchmarks


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
    from zegformer_jax.input.records import read

    return read.read_classes(directory)


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


def on_dataset(
    config: ConfigDict, workdir: epath.PathLike, name: str, directory: str
) -> tuple[ConfigDict, bool]:
    """Returns the config of an experiment's model on another data set.

    As the cross-dataset tables have it: gamma is 0. On the experiment's own data set, in any
    directory, nothing else changes.

    Args:
        config: The experiment's config.
        workdir: Its workdir.
        name: Name of the data set.
        directory: Directory of its records, or of a folder of images and labels.

    Returns:
        The config there, and whether it is the experiment's own data set.
    """
    there = ConfigDict(config.to_dict()).unlock()
    there.dataset.directory = directory
    if _is_own(config, workdir, name, directory):
        return there.lock(), True
    vocabulary = benchmarks.find(name).vocabulary if name in benchmarks.BENCHMARKS else ""
    if name == GENERATED:
        vocabulary = GENERATED
    there.dataset.update(name=name, vocabulary=vocabulary, all_seen=False)
    there.dataset.options = ConfigDict()
    there.eval.update(vocabularies=(), gamma=0.0)
    return there.lock(), False


def _is_own(config: ConfigDict, workdir: epath.PathLike, name: str, directory: str) -> bool:
    """Whether the experiment is on this data set; folders of one name are different data sets."""
    if name != FOLDER or config.dataset.name != FOLDER:
        return name == config.dataset.name
    own, other = config.dataset.directory, directory
    if "://" in own or "://" in other:
        return own.rstrip("/") == other.rstrip("/")
    return _absolute(own, workdir) == _absolute(other, workdir)


def _absolute(directory: str, workdir: epath.PathLike) -> str:
    return os.path.realpath(resolve(directory, workdir))
