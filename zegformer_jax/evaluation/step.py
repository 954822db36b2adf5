"""The pure step of an evaluation: from a batch of images to the metrics' states."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from zegformer_jax.evaluation.metric import Prediction, States, Truth, by_key
from zegformer_jax.evaluation.metrics import METRICS
from zegformer_jax.evaluation.plan import make_plan
from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.target import target_device
from zegformer_jax.segmentation.augmentation import View, make_views
from zegformer_jax.segmentation.zegformer import TextEmbeddings, Weights
from zegformer_jax.text.vocabulary import Vocabulary

IMAGES_TOGETHER = 4  # most images that go through the networks together
IMAGES_TOGETHER_ON = {"cpu": 1}  # its cores are busy with one
SIDE = 32  # of an image that is never seen; states have the same shapes for all images


class EvaluationStep:
    """Counts batches of images: a model and its metrics, without the model's arrays.

    Attributes:
        model: The model.
        plan: What is asked of the model.
        metrics: What is measured, by the keys of the states.
    """

    def __init__(self, experiment: Experiment, trained: Vocabulary | None = None):
        """Makes the model and its metrics.

        Args:
            experiment: The experiment.
            trained: Vocabulary of the training if the experiment's data set is another one.
        """
        self.model = experiment.segmentation_model
        self.plan = make_plan(experiment, self.model, trained)
        self.metrics = by_key(metric for make in METRICS for metric in make(self.plan))
        self._questions = list({id(x.question): x.question for x in self.metrics.values()}.values())
        self._mirrored_too = experiment.eval.flip
        self._views = 1 + len(experiment.eval.more_short_sides)

    def states(self, weights: Weights, text: TextEmbeddings) -> States:
        """Returns the shapes of the states."""
        label = jnp.zeros((SIDE, SIDE), self.plan.vocabulary.label_dtype)
        size = jnp.full(2, SIDE, jnp.int32)
        views = ((jnp.zeros((SIDE, SIDE, 3), jnp.uint8), size),) * self._views
        example = {"views": views, "label": label, "original_size": size}
        return jax.eval_shape(self.count_image, weights, text, example)[0]

    def __call__(
        self, weights: Weights, text: TextEmbeddings, batch: Mapping[str, Any]
    ) -> tuple[States, jax.Array]:
        """Segments a device's rows, counts each, and sums over devices; skips filler rows.

        Where the device is wide, several images go through the networks together.

        Runs inside `jax.shard_map` along the axis `data`.

        Args:
            weights: The model's arrays.
            text: Text embeddings of the data set's vocabulary.
            batch: The device's rows, as `input.pipeline.eval_batches` yields them.

        Returns:
            The states, and label maps int32 [b, y, x].
        """
        run = functools.partial(self._run, weights, text)
        first = jax.tree.map(lambda rows: rows[0], batch)
        no_outputs = _zeros(run, first)
        nothing = _zeros(self._count, first, no_outputs)

        def run_row(row: Any) -> list[Any]:
            return jax.lax.cond(row["valid"], run, lambda _: no_outputs, row)

        def run_group(group: Any) -> list[Any]:
            return jax.vmap(run_row)(group) if together > 1 else jax.lax.map(run_row, group)

        def add_row(total: States, row: Any) -> tuple[States, jax.Array]:
            states, labels = jax.lax.cond(row[0]["valid"], self._count, lambda *_: nothing, *row)
            return jax.tree.map(jnp.add, total, states), labels

        def add_group(total: States, group: Any) -> tuple[States, jax.Array]:
            return jax.lax.scan(add_row, total, (group, run_group(group)))

        together = images_together(len(batch["valid"]))
        groups = jax.tree.map(lambda rows: rows.reshape(-1, together, *rows.shape[1:]), batch)
        total, labels_gnyx = jax.lax.scan(add_group, nothing[0], groups)
        labels_byx = labels_gnyx.reshape(-1, *labels_gnyx.shape[2:])
        return jax.lax.psum(total, "data"), labels_byx

    def count_image(
        self, weights: Weights, text: TextEmbeddings, example: Any
    ) -> tuple[States, jax.Array]:
        """Segments an image, and counts the result by every metric."""
        return self._count(example, self._run(weights, text, example))

    def _run(self, weights: Weights, text: TextEmbeddings, example: Any) -> list[Any]:
        """Returns the model's output for each view of an image."""
        views = self._view(example)
        return [self.model.run(weights, text, view, self._questions) for view in views]

    def _view(self, example: Any) -> list[View]:
        return make_views(example["views"], self._mirrored_too)

    def _count(self, example: Any, outputs: list[Any]) -> tuple[States, jax.Array]:
        """Counts the outputs for an image by every metric, and makes the label map shown."""
        original_size, label_yx = example["original_size"], example["label"].astype(jnp.int32)
        maps = self.model.label_maps(
            outputs,
            self._view(example),
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


def images_together(images: int) -> int:
    """Returns how many images of a batch should go through the networks together.

    An image's result does not depend on the others, but by rounding on how many there are.

    Args:
        images: Images of the batch, of which the result is a divisor.
    """
    most = IMAGES_TOGETHER_ON.get(target_device().platform, IMAGES_TOGETHER)
    return max(x for x in range(1, most + 1) if images % x == 0)


def _zeros(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns zeros in the shapes of a function's result."""
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _find(question: Any, predictions: list[Prediction]) -> Prediction:
    return next(prediction for prediction in predictions if prediction.question is question)
