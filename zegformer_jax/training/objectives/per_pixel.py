"""The objective of the per-pixel baseline."""

from typing import Any

import jax
import jax.numpy as jnp

from zegformer_jax.training import losses
from zegformer_jax.training.objective import Batch, Metrics
from zegformer_jax.training.objectives.segmentation import SegmentationObjective


class PerPixelObjective(SegmentationObjective):
    """The mean cross entropy of the labelled pixels."""

    metrics = ("loss",)

    def totals(self, batch: Batch) -> jax.Array:
        """Returns the number of labelled pixels."""
        return (batch["label"] < self.classes).sum().astype(jnp.float32)

    def loss(
        self, params: Any, constants: Any, batch: Batch, totals: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss of a batch {image, label}."""
        logits_bhwc = self.apply(params, constants, batch, key)
        total, _ = losses.per_pixel_loss(logits_bhwc, batch["label"])
        loss = total / jnp.maximum(totals, 1)
        return loss, {"loss": loss}
