"""Data sets that a model is evaluated on: the experiment's own, and others by name."""

import os
from pathlib import Path
from typing import NamedTuple

from etils import epath

from zegformer_jax.evaluation.report.files import read_place
from zegformer_jax.experiment import Experiment
from zegformer_jax.input import benchmarks
from zegformer_jax.input.benchmarks import FOLDER
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.vocabulary import Vocabulary


class Target(NamedTuple):
    """A data set to evaluate on.

    Attributes:
        name: Name of the data set.
        experiment: The experiment on it.
        results: Name of the folder for its results.
        trained: Vocabulary of the training; None on the experiment's own data set.
    """

    name: str
    experiment: Experiment
    results: str
    trained: Vocabulary | None = None

    @property
    def place(self) -> str:
        """Directory of the data set: a whole local path, or a URL."""
        directory = self.experiment.dataset_directory
        return os.path.abspath(directory) if isinstance(directory, Path) else directory

    def check_results(self, folder: epath.Path) -> None:
        """Refuses to replace the results of another folder of the same name.

        Args:
            folder: Folder for the results.

        Raises:
            UserError: It has the results of another folder.
        """
        there = read_place(folder) if self.name == FOLDER else None
        if there and there != self.place:
            raise UserError(
                f"{folder}: has the results of {there}, and those of {self.place} would replace "
                "them: name another folder by --output, or remove this one"
            )


def choose(text: str, experiment: Experiment) -> list[Target]:
    """Returns the data sets that a text names; local ones are opened, so that errors come first.

    Args:
        text: NAME=DIR by commas. NAME alone is the experiment's own data set in its directory, or
            the directory NAME beside it. An empty text names the experiment's own data set.
        experiment: The experiment.

    Raises:
        UserError: There is no such data set, two have the same folder for results, or the records
            are not as they should be.
        MissingFile: A directory or a file in it is missing.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    own = experiment.dataset.name
    if not entries:
        return [Target(own, experiment, own)]
    targets: dict[str, Target] = {}
    for entry in entries:
        target = _parse(entry, experiment)
        if target.results in targets:
            raise UserError(
                f"--datasets: '{_describe(targets[target.results])}' and '{_describe(target)}' "
                f"would both be written to {target.results}: leave one out, or evaluate it with "
                "another --output"
            )
        targets[target.results] = target
    for target in targets.values():
        if "://" not in target.experiment.dataset.directory:
            target.experiment.open_split("validation")
    return list(targets.values())


def _describe(target: Target) -> str:
    return f"{target.name}={target.experiment.dataset.directory}"


def _parse(entry: str, experiment: Experiment) -> Target:
    name, given, directory = (part.strip() for part in entry.partition("="))
    names = benchmarks.names()
    if name not in names:
        raise UserError(f"--datasets: no data set '{name}'; there are {', '.join(names)}")
    if given and not directory:
        raise UserError(
            f"--datasets has '{entry}': give NAME=DIR, DIR with its records, or NAME alone for the "
            "directory NAME beside the experiment's own"
        )
    directory = directory or _find_beside(name, experiment)
    place = directory if "://" in directory else experiment.resolve(directory)
    if not _is_directory(place):
        raise MissingFile(f"--datasets: '{entry}': {place} is no directory; give NAME=DIR")
    results = name
    if name == FOLDER:
        results = f"{FOLDER}_{epath.Path(os.path.normpath(place)).name or 'root'}"
    there, trained = experiment.on_dataset(name, directory)
    return Target(name, there, results, trained)


def _find_beside(name: str, experiment: Experiment) -> str:
    """Returns the directory of a data set that is named alone."""
    if name == experiment.dataset.name:
        return experiment.dataset.directory
    own = experiment.dataset_directory
    if isinstance(own, Path):
        return str(own.absolute().parent / name)
    return os.fspath(epath.Path(own).parent / name)


def _is_directory(place: str | Path) -> bool:
    """Returns whether the directory exists; assumes True if a remote store is unreachable.

    Its reader reports that; data sets before it are evaluated without a network.
    """
    try:
        return epath.Path(place).is_dir()
    except Exception:  # each client of a remote store has its own
        if "://" in str(place):
            return True
        raise
