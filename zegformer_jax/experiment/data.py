"""The data set and vocabulary of an experiment."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from zegformer_jax.experiment.workdir import resolve
from zegformer_jax.input import benchmarks
from zegformer_jax.input.benchmarks import FOLDER
from zegformer_jax.runtime.errors import MissingFile
from zegformer_jax.text.vocabulary import Vocabulary, load_vocabulary


def dataset_directory(config: ConfigDict, workdir: epath.PathLike) -> str | Path:
    """Returns the directory of the experiment's data set: a local path, or a URL unchanged.

    Raises:
        MissingFile: A user's folder is neither in the workdir nor in the current folder.
    """
    directory = config.dataset.directory
    if "://" in directory:
        return directory
    path = resolve(directory, workdir)
    if config.dataset.name == FOLDER and not path.is_dir():
        raise MissingFile(
            f"{directory}: no such folder, neither here nor in {workdir}; "
            "--config.dataset.directory=DIR names the folder of your images and labels"
        )
    return path


def dataset_vocabulary(config: ConfigDict, workdir: epath.PathLike) -> Vocabulary:
    """Returns the vocabulary of the experiment's labels.

    It is the config's, else the data set's own. With `dataset.all_seen` all its classes are seen.
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
    """Opens a split of the experiment's data set, a `zegformer_jax.input.datasets.Source`."""
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

    On the experiment's own data set only the directory changes. On others gamma is 0, as in the
    published cross-dataset tables.

    Args:
        config: The experiment's config.
        workdir: Its workdir.
        name: Name of the data set.
        directory: Directory of its records, or of a folder of images and labels.

    Returns:
        The config there, and True if it is the experiment's own data set.
    """
    there = ConfigDict(config.to_dict()).unlock()
    there.dataset.directory = directory
    if _is_own(config, workdir, name, directory):
        return there.lock(), True
    vocabulary = benchmarks.vocabulary_name(name)
    there.dataset.update(name=name, vocabulary=vocabulary, all_seen=False)
    there.dataset.options = ConfigDict()
    there.eval.update(vocabularies=(), gamma=0.0)
    return there.lock(), False


def _is_own(config: ConfigDict, workdir: epath.PathLike, name: str, directory: str) -> bool:
    """Compares names; two folders of images are the same data set if their paths are equal."""
    if name != FOLDER or config.dataset.name != FOLDER:
        return name == config.dataset.name
    own, other = config.dataset.directory, directory
    if "://" in own or "://" in other:
        return own.rstrip("/") == other.rstrip("/")
    return _absolute(own, workdir) == _absolute(other, workdir)


def _absolute(directory: str, workdir: epath.PathLike) -> str:
    return os.path.realpath(resolve(directory, workdir))
