"""The workdir of a run: its config and its checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from zegformer_jax.experiment import settings
from zegformer_jax.runtime.checkpoints import FOLDER, Checkpoints
from zegformer_jax.runtime.environment import PROGRAM
from zegformer_jax.runtime.errors import MissingFile, UserError, reading
from zegformer_jax.text.prompts import split_prompts

AGAIN = "copy the whole workdir again, or train in a new one"
CONFIG_FILE = "experiment.json"
FIELDS = (*settings.SHARED, "model", *settings.SECTIONS)
CONVERTED_FILE = "converted.txt"  # list of tensors, in workdirs of converted weights


def check_config(config: ConfigDict, workdir: epath.Path, change: bool = False) -> None:
    """Compares the config with the workdir's, if there is one.

    Args:
        config: The experiment's config.
        workdir: Folder of the run; it may hold no run yet.
        change: Allows them to differ.

    Raises:
        UserError: The workdir holds converted weights, or a run with another config; the message
            lists the fields.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return
    if (workdir / CONVERTED_FILE).exists():
        raise UserError(
            f"{workdir}: holds converted weights, not a run to resume: train in another --workdir "
            f"with --config.model.start_from={workdir}"
        )
    old = traverse_util.flatten_dict(_read_fields(path), sep=".")
    new = traverse_util.flatten_dict(json.loads(config.to_json_best_effort()), sep=".")
    changed = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
    if changed and not change:
        first = ", ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in changed)
        raise UserError(
            f"{path}: the run in this workdir has another config ({first}): take another "
            "--workdir, remove this one, or resume with the new config by --change-config"
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
        MissingFile: The workdir has no config.
        UserError: The config is damaged, or of another version of this code.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise MissingFile(
            f"{workdir}: no trained model here ({CONFIG_FILE} is missing): "
            f"name the --workdir of a finished run, or train one with {PROGRAM} demo"
        )
    with reading(path, AGAIN):
        config = ConfigDict(_read_fields(path)).lock()
        try:
            settings.check(config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return config


def _read_fields(path: epath.Path) -> dict[str, Any]:
    with reading(path, AGAIN):
        fields = json.loads(path.read_bytes())
        missing = [name for name in FIELDS if name not in fields]
        if missing:
            raise UserError(f"{path}: no '{missing[0]}': written by another version of this code")
        return fields


def resolve(path: str, workdir: epath.PathLike) -> Path:
    """Resolves a local path, relative to the workdir or else to the current folder.

    A path that exists in neither is relative to the workdir. If the workdir is in a bucket, all
    paths are relative to the current folder, as a bucket holds only the run.
    """
    if "://" in str(workdir):
        return Path(path)
    # Without normpath "../clip" is not found before the workdir exists.
    inside = Path(os.path.normpath(Path(workdir) / path))
    return Path(path) if not inside.exists() and Path(path).exists() else inside


def resolve_prompts(prompts: str, workdir: epath.PathLike) -> str:
    """Returns a prompt set, NAME or FILE.json:NAME, with the file resolved if it is local."""
    file, name = split_prompts(prompts)
    return f"{resolve(file, workdir)}:{name}" if file and "://" not in file else prompts


def load_variables(workdir: epath.PathLike, checkpoint: str = "latest") -> dict[str, Any]:
    """Reads `params` and `constants` of a checkpoint in a workdir.

    The parameters are their moving averages if the run has these.

    Args:
        workdir: Folder of the run.
        checkpoint: `latest`, or `best` for the one with the best validation score.

    Raises:
        MissingFile: There is no checkpoint, or none was validated.
        UserError: `checkpoint` has another value.
    """
    return load_step(workdir, find_step(workdir, checkpoint))


def find_step(workdir: epath.PathLike, checkpoint: str = "latest") -> int:
    """Returns the step of a checkpoint in a workdir; see `load_variables`."""
    if checkpoint not in ("latest", "best"):
        raise UserError(f"eval.checkpoint '{checkpoint}': choose latest or best")
    if not (epath.Path(workdir) / FOLDER).is_dir():
        raise MissingFile(f"{workdir}: no checkpoint here: train the model first")
    with Checkpoints(workdir) as checkpoints:
        if checkpoints.latest_step is None:
            raise MissingFile(f"{workdir}: no checkpoint here: train the model first")
        step = checkpoints.latest_step if checkpoint == "latest" else checkpoints.best_step
    if step is None:
        raise MissingFile(
            f"{workdir}: no checkpoint here was validated (eval.checkpoint): "
            "train with train.validate_every"
        )
    return step


def has_checkpoint(workdir: epath.PathLike) -> bool:
    """Returns True if there is a checkpoint in a workdir, from which a training resumes."""
    if not (epath.Path(workdir) / FOLDER).is_dir():
        return False
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.latest_step is not None


def load_step(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """Reads `params` and `constants` of the checkpoint of one step."""
    with Checkpoints(workdir) as checkpoints:
        return _read_variables(checkpoints, step)


def _read_variables(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    parts = checkpoints.read(("params", "constants", "ema"), step)
    return {"params": parts["ema"] or parts["params"], "constants": parts["constants"]}
