"""Start of a training from other weights."""

from pathlib import Path

import numpy as np

from zegformer_jax.experiment import Experiment
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.start import locate, read_start
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.processes import is_first
from zegformer_jax.training.objective import Variables


def locate_start(experiment: Experiment) -> Path | None:
    """Returns the weights that a new training starts from; published ones are fetched first.

    Args:
        experiment: The experiment.

    Returns:
        A file or another run's workdir; None for a start from random parameters.

    Raises:
        MissingFile: `model.start_from` does not exist, or cannot be fetched.
        UserError: It is empty though the model has frozen norms, or the fetched file is not what
            its address says.
    """
    source = experiment.start_from
    if source:
        return locate(source, experiment.resolve(source), progress=is_first())
    if experiment.has_frozen_norms:
        raise UserError(
            "model.start_from is empty, and model.backbone.norm is frozen_batch, which only suits "
            "trained weights: name some, such as --config.model.start_from=detectron2://"
            "ImageNetPretrained/torchvision/R-50.pkl (docs/weights.md), or train from random "
            "parameters with --config.model.backbone.norm=group"
        )
    return None


def start_from(experiment: Experiment, variables: Variables) -> Variables:
    """Replaces a new model's variables by those that `model.start_from` names, if it is set.

    Args:
        experiment: The experiment.
        variables: Variables of its new model.

    Raises:
        MissingFile: `model.start_from` does not exist, or cannot be fetched.
        UserError: It holds no model, or one of other sizes, or is empty and must not be.
    """
    path = locate_start(experiment)
    if path is None:
        return variables
    kind, start = read_variables(path)
    try:
        return hand_over(variables, experiment.kind, start, kind)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def read_variables(path: Path) -> tuple[str, Variables]:
    """Reads the kind and the variables of a model.

    Args:
        path: Workdir of a run, or a file of published weights.

    Raises:
        MissingFile: There is nothing at the path.
        UserError: It is neither a run's workdir nor a file of published weights.
    """
    if path.is_dir():
        other = Experiment.open(None, path)
        return other.kind, other.variables()
    start = read_start(path)
    return start.kind, start.variables


def hand_over(variables: Variables, kind: str, start: Variables, start_kind: str) -> Variables:
    """Replaces the parts of a model that the start has as well: backbone, pixel decoder, ...

    The projection to the text embeddings is only replaced between models of one kind.

    Args:
        variables: Variables of the new model.
        kind: Kind of the new model.
        start: Variables to start from; parts and arrays may be missing.
        start_kind: Kind of the model that they come from.

    Raises:
        UserError: The start has no backbone, or a common array has another shape.
    """
    arrays, given = tables.flatten(variables), tables.flatten(start)
    if not any(path.startswith("params/backbone/") for path in given):
        raise UserError("its model has no backbone to start from (model.start_from)")
    parts = set(variables["params"])
    for path, array in given.items():
        part = path.split("/")[1]
        if part not in parts or (part == "class_projection" and kind != start_kind):
            continue
        if path not in arrays or arrays[path].shape != np.shape(array):
            wanted = list(arrays[path].shape) if path in arrays else "no such array"
            raise UserError(
                f"its {path} is {list(np.shape(array))}, this model has {wanted}: the sizes "
                f"under model.{part} differ (model.start_from)"
            )
        arrays[path] = np.asarray(array)
    return tables.unflatten(arrays)
