"""Which data sets a model is evaluated on: the experiment's own, and others by their names."""

import os
from pathlib import Path
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from zegformer_jax.experiment.data import (
    FOLDER,
    GENERATED,
    dataset_directory,
    on_dataset,
    open_split,
)
from zegformer_jax.experiment.workdir import resolve
from zegformer_jax.input import benchmarks

NAMES = (FOLDER, GENERATED, *benchmarks.BENCHMARKS)


class Target(NamedTuple):
    """A data set to evaluate on.

    Attributes:
        name: of the data set.
        config: the experiment as it is evaluated there.
        results: name of the folder for its results.
        dataset: name and directory, as `evaluate.evaluate` takes them; None for the experiment's
            own where it lies.
    """

    name: str
    config: ConfigDict
    results: str
    dataset: tuple[str, str] | None = None


def choose(text: str, config: ConfigDict, workdir: epath.PathLike) -> list[Target]:
    """Finds data sets, and opens those that are on this machine before any is evaluated on.

    Args:
        text: NAME=DIR by commas. NAME alone is the experiment's own data set where it lies, or the
            directory NAME beside it. Of no text it is the experiment's own data set.
        config: the experiment.
        workdir: of its model.

    Raises:
        ValueError: there is no such data set, two would have the same results' folder, or the
            records are not what they should be.
        FileNotFoundError: a directory or a file in it is missing.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        return [Target(config.dataset.name, config, config.dataset.name)]
    targets: dict[str, Target] = {}
    for entry in entries:
        target = _parse(entry, config, workdir)
        if target.results in targets:
            other = "=".join(targets[target.results].dataset)
            raise ValueError(
                f"--datasets: '{other}' and '{'='.join(target.dataset)}' would both be written to "
                f"{target.results}: leave one out, or evaluate it with another --output"
            )
        targets[target.results] = target
    for target in targets.values():
        if "://" not in target.dataset[1]:
            open_split(target.config, workdir, "validation")
    return list(targets.values())


def _parse(entry: str, config: ConfigDict, workdir: epath.PathLike) -> Target:
    name, given, directory = (part.strip() for part in entry.partition("="))
    if name not in NAMES:
        raise ValueError(f"--datasets: no data set '{name}'; there are {', '.join(NAMES)}")
    if given and not directory:
        raise ValueError(
            f"--datasets has '{entry}': give NAME=DIR, DIR with its records, or NAME alone for the "
            "directory NAME beside the experiment's own"
        )
    directory = directory or _find_beside(name, config, workdir)
    place = directory if "://" in directory else resolve(directory, workdir)
    if not _is_directory(place):
        raise FileNotFoundError(f"--datasets: '{entry}': {place} is no directory; give NAME=DIR")
    results = name
    if name == FOLDER:
        results = f"{FOLDER}_{epath.Path(os.path.normpath(place)).name or 'root'}"
    there, _ = on_dataset(config, workdir, name, directory)
    return Target(name, there, results, (name, directory))


def _find_beside(name: str, config: ConfigDict, workdir: epath.PathLike) -> str:
    """Where a data set lies that is named alone."""
    own = dataset_directory(config, workdir)
    if name == config.dataset.name:
        return config.dataset.directory
    if isinstance(own, Path):
        return str(own.absolute().parent / name)
    return os.fspath(epath.Path(own).parent / name)


def _is_directory(place: str | Path) -> bool:
    """Whether a directory is there; of a remote one that cannot be asked now its reader will tell.

    Evaluations before it go on without a network, too.
    """
    try:
        return epath.Path(place).is_dir()
    except Exception:  # of whichever client reaches it
        if "://" in str(place):
            return True
        raise
