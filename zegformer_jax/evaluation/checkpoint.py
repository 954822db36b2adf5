"""Where an evaluation's model comes from, if not from a workdir's newest or best checkpoint."""

import os
from typing import Any, NamedTuple

from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from zegformer_jax.evaluation.report.tables import FOLDER as RESULTS
from zegformer_jax.experiment.models import LoadedClip, needs_clip, set_sizes
from zegformer_jax.experiment.workdir import load_step
from zegformer_jax.pretrained.archives import read_tensors
from zegformer_jax.pretrained.clip.load import from_openai_state_dict
from zegformer_jax.pretrained.clip.positions import resize_positions
from zegformer_jax.pretrained.start import is_checkpoint
from zegformer_jax.pretrained.zegformer_model import read_model
from zegformer_jax.runtime.checkpoints import FOLDER
from zegformer_jax.text.tokenizer import Tokenizer


class Source(NamedTuple):
    """A model to be evaluated.

    Attributes:
        workdir: that the config's paths are relative to.
        results: folder for the results, where no other is named.
        variables: of the grouper or the baseline, on the host; None: a checkpoint of the workdir.
        clip: that came with it; None: the config's.
    """

    workdir: epath.Path
    results: epath.Path
    variables: dict[str, Any] | None = None
    clip: LoadedClip | None = None


def open_source(workdir: str, checkpoint: str, config: ConfigDict) -> Source:
    """The checkpoint of a workdir that the config names; or another one, see `open_checkpoint`."""
    if checkpoint:
        return open_checkpoint(checkpoint, config)
    return Source(epath.Path(workdir), epath.Path(workdir) / RESULTS)


def open_checkpoint(path: str, config: ConfigDict) -> Source:
    """One step of a run, `WORKDIR/checkpoints/STEP`, or a file in the authors' layout.

    Args:
        path: of either.
        config: of the model; the sizes of a file must be its.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is neither, is damaged, or has other sizes than the config.
    """
    place = epath.Path(path if "://" in path else os.path.abspath(path))
    if place.is_dir():
        return _open_step(path, place)
    if not place.exists():
        steps = _steps(place.parent) if place.parent.name == FOLDER else ""
        raise FileNotFoundError(f"{path}: no such checkpoint" + (steps and f"; there is {steps}"))
    return _open_file(path, place, config)


def _open_step(path: str, place: epath.Path) -> Source:
    if place.parent.name != FOLDER or not place.name.isdecimal():
        folder = place if place.name == FOLDER else place / FOLDER
        raise ValueError(
            f"{path}: no single checkpoint: name a step's folder, WORKDIR/{FOLDER}/STEP"
            + (f" (there is {_steps(folder)})" if folder.is_dir() else "")
            + ", or a file in the authors' layout; a whole workdir is --workdir"
        )
    workdir = place.parent.parent
    try:
        variables = load_step(workdir, int(place.name))
    except Exception as error:  # whatever Orbax and TensorStore meet in damaged files
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: cannot be read, name another step: {reason}") from error
    return Source(workdir, workdir / RESULTS / f"step_{place.name}", variables)


def _steps(folder: epath.Path) -> str:
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    return ", ".join(sorted((name for name in names if name.isdecimal()), key=int))


def _open_file(path: str, place: epath.Path, config: ConfigDict) -> Source:
    tensors = read_tensors(place)
    if not is_checkpoint(tensors):
        raise ValueError(
            f"{path}: not a whole model in the authors' layout; a training starts from a backbone "
            f"by --config.model.start_from={path}"
        )
    heads = config.model.transformer.heads
    if config.model.kind == "per_pixel":
        heads = config.model.pixel_decoder.encoder_heads
    checkpoint = read_model(tensors, path, heads)
    _check_sizes(path, config, checkpoint.sizes)
    clip = None
    if checkpoint.clip_tensors and needs_clip(config):
        clip_config, params = from_openai_state_dict(checkpoint.clip_tensors, path)
        if config.clip.input_size:
            clip_config, params = resize_positions(params, clip_config, config.clip.input_size)
        clip = LoadedClip(clip_config, params, Tokenizer.openai())
    folder = place.parent
    return Source(folder, folder / RESULTS / place.stem, checkpoint.variables, clip)


def _check_sizes(path: str, config: ConfigDict, sizes: dict[str, Any]) -> None:
    """Compares a file's sizes with the config's.

    Raises:
        ValueError: they differ; the message names the fields.
    """
    model = ConfigDict(config.model.to_dict())
    set_sizes(model, sizes)
    ours, theirs = (traverse_util.flatten_dict(x.to_dict(), sep=".") for x in (config.model, model))
    differing = [name for name in theirs if _plain(theirs[name]) != _plain(ours[name])]
    if differing:
        first = ", ".join(f"model.{x} is {theirs[x]}, not {ours[x]}" for x in differing)
        raise ValueError(
            f"{path}: has other sizes than the config ({first}): name the config's variant that "
            f"it is of, give --config.model.{differing[0]}=... and so on, or convert it into a "
            "workdir with ./run.sh convert"
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
