"""An evaluation's compiled step, with a model's arrays on the devices."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from zegformer_jax.evaluation.metric import States, zeros
from zegformer_jax.evaluation.step import EvaluationStep
from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.checkpoints import sum_bits
from zegformer_jax.runtime.mesh import make_local_mesh, replicate, to_devices
from zegformer_jax.segmentation.zegformer import Weights
from zegformer_jax.text.vocabulary import Vocabulary

ON_HOST = ("id", "index")  # a batch's entries that the devices do not need


def jit_step(step: EvaluationStep, mesh: Mesh) -> Callable:
    """Returns the step as one program for a mesh's devices, each of which takes its rows."""
    split, whole = PartitionSpec("data"), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(whole, whole, split),
            out_specs=(whole, split),
            check_vma=False,
        )
    )


class Evaluator:
    """A model with its metrics on a data set.

    Attributes:
        step: The pure step.
        model: The model, without its arrays.
        plan: What is asked of the model.
        metrics: What is measured, by the keys of the states.
    """

    def __init__(
        self, experiment: Experiment, variables: Any = None, trained: Vocabulary | None = None
    ):
        """Loads the model and makes its metrics.

        Args:
            experiment: The experiment.
            variables: Variables of the grouper or the baseline, on the host; None reads the
                checkpoint that the experiment names.
            trained: Vocabulary of the training if the experiment's data set is another one.
        """
        weights = experiment.weights(variables)  # first, so that a missing checkpoint is reported
        self.step = EvaluationStep(experiment, trained)
        self.model, self.plan, self.metrics = self.step.model, self.step.plan, self.step.metrics
        self._config_json = experiment.config_json
        # Each process works on its own images, whose shapes differ from the others'.
        self._mesh = make_local_mesh()
        self._text = replicate(experiment.text_embeddings(self.plan.vocabulary.names), self._mesh)
        self._classifier = replicate(weights.classifier, self._mesh)
        self.set_variables(weights.model)
        self._count = jit_step(self.step, self._mesh)

    def set_variables(self, variables: Any) -> None:
        """Replaces the variables of the grouper or the baseline."""
        self._weights = Weights(replicate(variables, self._mesh), self._classifier)

    @functools.cached_property
    def nothing(self) -> States:
        """The states of no image, on the host."""
        return zeros(self.step.states(self._weights, self._text))

    def identity(self) -> str:
        """Returns a hash of the weights, the vocabularies and the settings."""
        plan, bits = self.plan, sum_bits((self._weights, self._text))
        subsets = [(subset.name, subset.vocabulary) for subset in plan.subsets]
        parts = (self._config_json, bits, plan.vocabulary, subsets, list(self.metrics))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __call__(self, batch: Mapping[str, Any]) -> tuple[States, np.ndarray]:
        """Counts a batch.

        Args:
            batch: As `input.pipeline.eval_batches` yields them.

        Returns:
            The states, and label maps int32 [b, y, x] by `eval.scores` in the headline vocabulary.
        """
        arrays = {name: array for name, array in batch.items() if name not in ON_HOST}
        arrays = to_devices(arrays, self._mesh)
        return jax.device_get(self._count(self._weights, self._text, arrays))
