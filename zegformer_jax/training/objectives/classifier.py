"""The objective of a backbone that classifies images of single objects."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zegformer_jax.experiment import Experiment
from zegformer_jax.training.objective import Batch, Metrics
from zegformer_jax.training.objectives.image_text import ImageTextObjective


class ClassifierObjective(ImageTextObjective):
    """Classifies drawings of seen classes, standing in for ImageNet pretraining."""

    metrics = ("loss", "accuracy")

    def __init__(self, experiment: Experiment, text_cd: np.ndarray, drawings: Any):
        """Builds the model.

        Args:
            experiment: The experiment.
            text_cd: Text embeddings of the seen classes, float32 [C, D] of unit length.
            drawings: What is classified, `zegformer_jax.input.openmoji.rasters.Pictures`.
        """
        super().__init__(experiment, text_cd, experiment.clip_settings.image_size)
        self._drawings = drawings

    @classmethod
    def open(cls, experiment: Experiment) -> "ClassifierObjective":
        """Reads the drawings and embeds their seen classes."""
        from zegformer_jax.input.openmoji.rasters import load_pictures

        drawings = load_pictures(experiment.resolve(experiment.dataset.directory))
        vocabulary = drawings.vocabulary
        seen = vocabulary.seen_part()
        return cls(experiment, experiment.embed_classes(seen.names), drawings)

    def totals(self, batch: Batch) -> int:
        """Returns the number of images."""
        return len(batch["image"])

    def loss(
        self, params: Any, constants: Any, batch: Batch, totals: int, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns the mean cross entropy of a batch {image, picture_class}, and the accuracy."""
        logits_bc = self.apply(params, constants, batch, key)
        classes_b = batch["picture_class"].astype(jnp.int32)
        loss_b = optax.softmax_cross_entropy_with_integer_labels(logits_bc, classes_b)
        right_b = logits_bc.argmax(-1) == classes_b
        loss = loss_b.sum() / totals
        return loss, {"loss": loss, "accuracy": right_b.sum() / totals}

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields drawings and the indices of their classes among the seen classes."""
        from zegformer_jax.input.openmoji.pairs import contrastive_batches

        vocabulary = self._drawings.vocabulary
        table = vocabulary.training_table()
        for batch in contrastive_batches(
            self._drawings,
            vocabulary=vocabulary,
            templates=("{}",),
            batch_size=self.experiment.input.batch_size,
            image_size=self.experiment.clip_settings.image_size,
            seed=self.experiment.seed,
            start_step=start_step,
            num_steps=self.experiment.train.steps - start_step,
            seen_only=True,
            masked_share=0.0,  # A backbone sees whole images, not masked segments.
        ):
            yield {"image": batch["image"], "picture_class": table[batch["picture_class"]]}

    def facts(self) -> list[str]:
        """Returns lines on the drawings and CLIP."""
        drawings, directory = len(self._drawings.codes), self.experiment.dataset_directory
        return [
            f"data: {drawings:,} drawings in {directory}",
            f"CLIP: {self.experiment.clip.source}",
        ]
