"""The common part of objectives whose model compares images with text embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zegformer_jax.experiment import Experiment
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.training.objective import Batch, Objective, Variables


class ImageTextObjective(Objective):
    """Objective of a model that is called with images and text embeddings.

    Attributes:
        experiment: The experiment.
        model: The Flax module.
        classes: Number of classes.
    """

    adds_up = True

    def __init__(self, experiment: Experiment, text_cd: np.ndarray, image_size: int):
        """Builds the model.

        Args:
            experiment: The experiment.
            text_cd: Text embeddings of the seen classes, float32 [C, D] of unit length.
            image_size: Pixels of an image's side.
        """
        self.experiment = experiment
        self.model = experiment.build_model(text_cd.shape[1])
        self.classes = len(text_cd)
        self.constants = {"text_cd": jnp.asarray(text_cd)}
        self._image_size = image_size

    def init(self, key: jax.Array) -> Variables:
        """Returns the variables of a new model."""
        images_bhwc = jnp.zeros((1, self._image_size, self._image_size, 3))
        return self.model.init(key, images_bhwc, self.constants["text_cd"])

    def apply(self, params: Any, constants: Any, batch: Batch, key: jax.Array) -> Any:
        """Returns the model's output on a batch, with dropout."""
        return self.model.apply(
            {"params": params, "constants": constants},
            normalise_images(batch["image"]),
            constants["text_cd"],
            deterministic=False,
            rngs={"dropout": key},
        )
