"""Lines that a training prints at its start."""

import jax

from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.mesh import describe_devices
from zegformer_jax.training.objective import Objective
from zegformer_jax.training.step import TrainState


def describe_start(experiment: Experiment, objective: Objective, state: TrainState) -> list[str]:
    """Returns lines on what runs where, from which weights and from which step.

    Args:
        experiment: The experiment.
        objective: Its objective.
        state: The first state, new or restored.
    """
    numbers = sum(array.size for array in jax.tree.leaves(state.params))
    first, steps, batch = int(state.step), experiment.train.steps, experiment.input.batch_size
    if first >= steps:
        last = f"finished before, at step {first:,} of {steps:,}: nothing is left to train"
    elif first:
        last = f"resumes after step {first:,} of {steps:,}, with {batch:,} images a step"
    else:
        last = f"starts at step 0 of {steps:,}, with {batch:,} images a step"
    return [
        describe_devices(),
        f"model: {experiment.kind}, {numbers:,} trained parameters",
        f"start weights: {_start_of(experiment)}",
        *objective.facts(),
        last,
    ]


def _start_of(experiment: Experiment) -> str:
    source = experiment.start_from
    if not source:
        return "random"
    path = experiment.resolve(source)
    return str(path if path.exists() else source)  # else an address, or a name on the Hub
