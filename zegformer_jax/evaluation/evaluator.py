"""The compiled step of an evaluation: from a batch of images to the metrics' states."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from zegformer_jax.evaluation.metric import Prediction, States, Truth, by_key, zeros
from zegformer_jax.evaluation.metrics import METRICS
from zegformer_jax.evaluation.plan import make_plan
from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.checkpoints import sum_bits
from zegformer_jax.runtime.mesh import make_local_mesh, replicate, to_devices
from zegformer_jax.segmentation.augmentation import make_views
from zegformer_jax.segmentation.zegformer import TextEmbeddings, Weights, predict
from zegformer_jax.text.vocabulary import Vocabulary

SIDE = 32  # of an image that is never seen; states have the same shapes for all images
ON_HOST = ("id", "index")  # a batch's entries that the devices do not need


class Evaluator:
    """A model with its metrics on a data set.

    Attributes:
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
        self.model = experiment.segmentation_model
        self.plan = make_plan(experiment, self.model, trained)
        self.metrics = by_key(metric for make in METRICS for metric in make(self.plan))
        self._questions = list({id(x.question): x.question for x in self.metrics.values()}.values())
        self._experiment, self._mirrored_too = experiment, experiment.eval.flip
        # Each process works on its own images, whose shapes differ from the others'.
        self._mesh = make_local_mesh()
        self._text = replicate(experiment.text_embeddings(self.plan.vocabulary.names), self._mesh)
        self._classifier = replicate(weights.classifier, self._mesh)
        self.set_variables(weights.model)
        split, whole = PartitionSpec("data"), PartitionSpec()
        self._step = jax.jit(
            jax.shard_map(
                self._device_step,
                mesh=self._mesh,
                in_specs=(whole, whole, split),
                out_specs=(whole, split),
                check_vma=False,
            )
        )

    def set_variables(self, variables: Any) -> None:
        """Replaces the variables of the grouper or the baseline."""
        self._weights = Weights(replicate(variables, self._mesh), self._classifier)

    @functools.cached_property
    def nothing(self) -> States:
        """The states of no image, on the host."""
        label = jnp.zeros((SIDE, SIDE), self.plan.vocabulary.label_dtype)
        size, count = jnp.full(2, SIDE, jnp.int32), 1 + len(self._experiment.eval.more_short_sides)
        views = ((jnp.zeros((SIDE, SIDE, 3), jnp.uint8), size),) * count
        example = {"views": views, "label": label, "original_size": size}
        states, _ = jax.eval_shape(self._count_image, self._weights, self._text, example)
        return zeros(states)

    def identity(self) -> str:
        """Returns a hash of the weights, the vocabularies and the settings."""
        plan, bits = self.plan, sum_bits((self._weights, self._text))
        subsets = [(subset.name, subset.vocabulary) for subset in plan.subsets]
        parts = (self._experiment.config_json, bits, plan.vocabulary, subsets, list(self.metrics))
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
        return jax.device_get(self._step(self._weights, self._text, arrays))

    def _device_step(
        self, weights: Weights, text: TextEmbeddings, batch: Any
    ) -> tuple[States, jax.Array]:
        """Counts a device's rows image by image, and sums over devices; skips filler rows."""
        count = functools.partial(self._count_image, weights, text)
        first = jax.tree.map(lambda rows: rows[0], batch)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(count, first))

        def add(total: States, example: Any) -> tuple[States, jax.Array]:
            states, labels = jax.lax.cond(example["valid"], count, lambda _: nothing, example)
            return jax.tree.map(jnp.add, total, states), labels

        total, labels_byx = jax.lax.scan(add, nothing[0], batch)
        return jax.lax.psum(total, "data"), labels_byx

    def _count_image(
        self, weights: Weights, text: TextEmbeddings, example: Any
    ) -> tuple[States, jax.Array]:
        """Segments an image, and counts the result by every metric."""
        original_size, label_yx = example["original_size"], example["label"].astype(jnp.int32)
        outputs, maps = predict(
            self.model,
            weights,
            text,
            make_views(example["views"], self._mirrored_too),
            self._questions,
            original_size=original_size,
            out_size=label_yx.shape,
        )
        predictions = [
            Prediction(outputs, question, maps_ngyx)
            for question, maps_ngyx in zip(self._questions, maps, strict=True)
        ]
        image_hwc, size = example["views"][0]
        ignore_label = self.plan.vocabulary.ignore_label
        truth = Truth(label_yx, original_size, size, image_hwc.shape[:2], ignore_label)
        states = {
            key: metric.count(_find(metric.question, predictions), truth)
            for key, metric in self.metrics.items()
        }
        shown = _find(self.plan.questions[0], predictions)
        return states, shown.label_map(self.plan.shown, self.plan.gamma)


def _find(question: Any, predictions: list[Prediction]) -> Prediction:
    return next(prediction for prediction in predictions if prediction.question is question)
