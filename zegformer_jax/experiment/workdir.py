"""The workdir of a run: its config and its checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from zegformer_jax.runtime.checkpoints import FOLDER, Checkpoints
from zegformer_jax.runtime.errors import MissingFile, UserError, reading

CONFIG_FILE = "experiment.json"
SECTIONS = ("model", "clip", "dataset", "input", "loss", "optimiser", "train", "sharding", "eval")
CONVERTED_FILE = "converted.txt"  # in a workdir of converted weights: what became of every tensor


def check_config(config: ConfigDict, workdir: epath.Path, change: bool = False) -> None:
    """Compares the config with the workdir's, if there is one.

    Args:
        config: the experiment.
        workdir: of a run, perhaps.
        change: whether they may differ.

    Raises:
        UserError: the workdir holds another experiment, the message names the fields; or
            converted weights.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return
    if (workdir / CONVERTED_FILE).exists():
        raise UserError(
            f"{workdir}: holds converted weights, no run to go on with: train in another --workdir "
            f"with --config.model.start_from={workdir}"
        )
    old = traverse_util.flatten_dict(_read_fields(path), sep=".")
    new = traverse_util.flatten_dict(json.loads(config.to_json_best_effort()), sep=".")
    changed = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
    if changed and not change:
        first = ", ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in changed)
        raise UserError(
            f"{path}: the run in this workdir has another config ({first}): take another "
            "--workdir, remove this one, or go on with the new config by --change-config"
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
        MissingFile: there is none.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise MissingFile(
            f"{workdir}: no trained model here ({CONFIG_FILE} is missing): "
            "name the --workdir of a finished run, or train one with ./run.sh"
        )
    return ConfigDict(_read_fields(path)).lock()


def _read_fields(path: epath.Path) -> dict[str, Any]:
    with reading(path, "copy the whole workdir again, or train in a new one"):
        fields = json.loads(path.read_bytes())
        missing = [name for name in SECTIONS if name not in fields]
        if missing:
            raise UserError(f"{path}: no '{missing[0]}': written by another version of this code")
        return fields


def resolve(path: str, workdir: epath.PathLike) -> Path:
    """Takes a local path relative to the workdir if it exists there or nowhere else.

    A workdir in a bucket holds nothing else than its run: what is beside it is local.
    """
    if "://" in str(workdir):
        return Path(path)
    inside = Path(os.path.normpath(Path(workdir) / path))  # "../clip" also where it is yet to be
    return Path(path) if not inside.exists() and Path(path).exists() else inside


def load_variables(workdir: epath.PathLike, checkpoint: str = "latest") -> dict[str, Any]:
    """Reads `params` and `constants` of a checkpoint in a workdir.

    The parameters are their averages where the run kept such.

    Args:
        workdir: of a run.
        checkpoint: `latest` or `best`, the one whose validation was.

    Raises:
        MissingFile: there is no checkpoint, or none was validated.
        UserError: `checkpoint` is neither.
    """
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
        return _read_variables(checkpoints, step)


def load_step(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """Reads the variables of one step's checkpoint, as `load_variables` does."""
    with Checkpoints(workdir) as checkpoints:
        return _read_variables(checkpoints, step)


def _read_variables(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    parts = checkpoints.read(("params", "constants", "ema"), step)
    return {"params": parts["ema"] or parts["params"], "constants": parts["constants"]}
