"""The common part of the segmentation objectives."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from zegformer_jax.experiment import Experiment
from zegformer_jax.input.benchmarks import FOLDER, GENERATED
from zegformer_jax.input.label_counts import find_fault
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.training.objectives.image_text import ImageTextObjective


class SegmentationObjective(ImageTextObjective):
    """Trains on the label maps of an experiment's training split, on seen classes alone."""

    def __init__(self, experiment: Experiment, text_cd: np.ndarray, source: Any = None):
        """Builds the model.

        Args:
            experiment: The experiment.
            text_cd: Text embeddings of the seen classes, float32 [C, D] of unit length.
            source: Training images, a `zegformer_jax.input.datasets.Source`; None if no batches
                are read.
        """
        super().__init__(experiment, text_cd, experiment.input.crop_size)
        self._source = source

    @classmethod
    def open(cls, experiment: Experiment) -> "SegmentationObjective":
        """Opens the experiment's training split and embeds its seen classes.

        Raises:
            UserError: The split's labels look wrong, and that is not allowed.
        """
        names = experiment.vocabulary.seen_part().names
        if experiment.dataset.name == GENERATED:  # last, so that nothing is written without a CLIP
            return cls(experiment, experiment.embed_classes(names), experiment.open_split("train"))
        source = experiment.open_split("train")
        if not experiment.input.allow_missing_classes:
            _check_labels(experiment, source)
        return cls(experiment, experiment.embed_classes(names), source)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of a whole batch: crops and their label maps."""
        settings, label_dtype = self.experiment.input, self.experiment.vocabulary.label_dtype
        sides = (settings.batch_size, settings.crop_size, settings.crop_size)
        return {
            "image": jax.ShapeDtypeStruct((*sides, 3), np.uint8),
            "label": jax.ShapeDtypeStruct(sides, label_dtype),
        }

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields augmented crops with their label maps: `image`, `label` and `index`."""
        from zegformer_jax.input import pipeline

        return pipeline.train_batches(
            self._source,
            self.experiment.vocabulary,
            self.experiment.input,
            seed=self.experiment.seed,
            start_step=start_step,
            num_steps=self.experiment.train.steps - start_step,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    def name_examples(self, index: np.ndarray) -> list[str]:
        """Returns the ids of images by their index in the training split."""
        return [self._source[int(i)]["id"] for i in index]

    def facts(self) -> list[str]:
        """Returns lines on the data, the vocabulary and CLIP."""
        return self.experiment.facts("train", len(self._source))


def _check_labels(experiment: Experiment, source: Any) -> None:
    """Checks that every seen class has pixels; see `label_counts.find_fault`."""
    vocabulary, dataset = experiment.vocabulary, experiment.dataset
    fault = find_fault(source, vocabulary, vocabulary.seen_indices, dataset.name == FOLDER)
    if fault:
        raise UserError(
            f"{dataset.directory}: train: {fault}; if it is meant so, set "
            "input.allow_missing_classes=True"
        )
