"""The model of an evaluation: a workdir's checkpoint, a single step of a run, or a file."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from zegformer_jax.evaluation.report.files import FOLDER as RESULTS
from zegformer_jax.experiment import Experiment, LoadedClip
from zegformer_jax.experiment.origins import Origin
from zegformer_jax.experiment.workdir import load_step
from zegformer_jax.pretrained.clip.load import from_openai_state_dict
from zegformer_jax.pretrained.clip.positions import resize_positions
from zegformer_jax.pretrained.formats import read_tensors
from zegformer_jax.pretrained.start import is_checkpoint
from zegformer_jax.pretrained.zegformer import read_model
from zegformer_jax.runtime.checkpoints import FOLDER
from zegformer_jax.runtime.environment import PROGRAM
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.tokenizer import Tokenizer

OpenExperiment = Callable[[epath.PathLike], Experiment]  # opens a config in a folder


class Source(NamedTuple):
    """A model to evaluate.

    Attributes:
        experiment: The experiment, with the CLIP that came with the model if one did.
        results: Folder for the results if no other is named.
        variables: Variables of the grouper or the baseline, on the host; None: the checkpoint that
            the experiment names.
    """

    experiment: Experiment
    results: epath.Path
    variables: dict[str, Any] | None = None


def open_source(workdir: str, checkpoint: str, open_experiment: OpenExperiment) -> Source:
    """Opens the model of a workdir, or a checkpoint instead; see `open_checkpoint`."""
    if checkpoint:
        return open_checkpoint(checkpoint, open_experiment)
    return Source(open_experiment(workdir), epath.Path(workdir) / RESULTS)


def open_checkpoint(path: str, open_experiment: OpenExperiment) -> Source:
    """Opens one step of a run, `WORKDIR/checkpoints/STEP`, or a file in the authors' layout.

    Args:
        path: The step's folder, or the file.
        open_experiment: Opens the experiment in a folder: the run's workdir, or the file's folder.
            A file must have the sizes of the experiment's model.

    Raises:
        MissingFile: There is nothing.
        UserError: It is neither, is damaged, or has other sizes than the experiment.
    """
    place = epath.Path(path if "://" in path else os.path.abspath(path))
    if place.is_dir():
        return _open_step(path, place, open_experiment)
    if not place.exists():
        steps = _steps(place.parent) if place.parent.name == FOLDER else ""
        raise MissingFile(f"{path}: no such checkpoint" + (steps and f"; there is {steps}"))
    return _open_file(path, place, open_experiment(place.parent))


def _open_step(path: str, place: epath.Path, open_experiment: OpenExperiment) -> Source:
    if place.parent.name != FOLDER or not place.name.isdecimal():
        folder = place if place.name == FOLDER else place / FOLDER
        raise UserError(
            f"{path}: no single checkpoint: name a step's folder, WORKDIR/{FOLDER}/STEP"
            + (f" (there is {_steps(folder)})" if folder.is_dir() else "")
            + ", or a file in the authors' layout; a whole workdir is --workdir"
        )
    workdir = place.parent.parent
    try:
        variables = load_step(workdir, int(place.name))
    except Exception as error:  # whatever Orbax and TensorStore meet in damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read, name another step: {reason}") from error
    experiment, step = open_experiment(workdir), int(place.name)
    experiment.origin = Origin(str(workdir), step, experiment.train.steps)
    return Source(experiment, workdir / RESULTS / f"step_{step}", variables)


def _steps(folder: epath.Path) -> str:
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    return ", ".join(sorted((name for name in names if name.isdecimal()), key=int))


def _open_file(path: str, place: epath.Path, experiment: Experiment) -> Source:
    tensors = read_tensors(place)
    if not is_checkpoint(tensors):
        raise UserError(
            f"{path}: not a whole model in the authors' layout; a training starts from a backbone "
            f"by --config.model.start_from={path}"
        )
    checkpoint = read_model(tensors, path, experiment.heads)
    _check_sizes(path, experiment.compare_sizes(checkpoint.sizes))
    if checkpoint.clip_tensors and experiment.uses_clip:
        clip_config, params = from_openai_state_dict(checkpoint.clip_tensors, path)
        if side := experiment.clip_settings.input_size:
            clip_config, params = resize_positions(params, clip_config, side)
        experiment.clip = LoadedClip(clip_config, params, Tokenizer.openai(), path)
    experiment.origin = Origin(path)
    return Source(experiment, place.parent / RESULTS / place.name, checkpoint.variables)


def _check_sizes(path: str, differing: dict[str, tuple[Any, Any]]) -> None:
    """Raises a UserError that names the fields in which a file differs from the experiment."""
    if differing:
        first = ", ".join(f"{x} is {theirs}, not {ours}" for x, (ours, theirs) in differing.items())
        raise UserError(
            f"{path}: has other sizes than the config ({first}): name the config's variant that "
            f"it is of, give --config.{next(iter(differing))}=... and so on, or convert it into a "
            f"workdir with {PROGRAM} convert"
        )
