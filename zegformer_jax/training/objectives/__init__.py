"""The objectives by the name in `model.kind`."""

from collections.abc import Callable

from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.training.objective import Objective
from zegformer_jax.training.objectives.classifier import ClassifierObjective
from zegformer_jax.training.objectives.clip import ClipObjective
from zegformer_jax.training.objectives.grouper import GrouperObjective
from zegformer_jax.training.objectives.per_pixel import PerPixelObjective

OBJECTIVES: dict[str, Callable[[Experiment], Objective]] = {
    "zegformer": GrouperObjective.open,
    "per_pixel": PerPixelObjective.open,
    "classifier": ClassifierObjective.open,
    "clip": ClipObjective,
}


def open_objective(experiment: Experiment) -> Objective:
    """Opens the objective of an experiment and its data.

    Raises:
        UserError: `model.kind` names no objective.
    """
    if experiment.kind not in OBJECTIVES:
        raise UserError(f"model.kind '{experiment.kind}': choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[experiment.kind](experiment)
