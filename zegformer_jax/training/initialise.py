"""Start of a training from other weights."""

from pathlib import Path

import numpy as np

from zegformer_jax.experiment.workdir import load_config, load_variables
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.start import read_start
from zegformer_jax.training.objective import Variables


def load_start(path: Path) -> tuple[str, Variables]:
    """Reads what a training starts from: the kind of its model and its variables.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is neither a run's workdir nor a file of published weights.
    """
    if path.is_dir():
        return load_config(path).model.kind, load_variables(path)
    start = read_start(path)
    return start.kind, start.variables


def hand_over(variables: Variables, kind: str, start: Variables, start_kind: str) -> Variables:
    """Replaces what a model has in common with the one that it starts from.

    These are all parts of that name: the backbone, the pixel decoder, ...; but the projection to
    the text embeddings only between models of one kind.

    Args:
        variables: of the new model.
        kind: of the new model.
        start: of the other; parts and leaves may be missing.
        start_kind: of the other.

    Raises:
        ValueError: the other model has no backbone, or a shared array has another shape.
    """
    arrays, given = tables.flatten(variables), tables.flatten(start)
    if not any(path.startswith("params/backbone/") for path in given):
        raise ValueError("its model has no backbone to start from (model.start_from)")
    parts = set(variables["params"])
    for path, array in given.items():
        part = path.split("/")[1]
        if part not in parts or (part == "class_projection" and kind != start_kind):
            continue
        if path not in arrays or arrays[path].shape != np.shape(array):
            wanted = list(arrays[path].shape) if path in arrays else "nothing of that name"
            raise ValueError(
                f"its {path} is {list(np.shape(array))}, this model has {wanted}: the sizes "
                f"under model.{part} differ (model.start_from)"
            )
        arrays[path] = np.asarray(array)
    return tables.unflatten(arrays)
