"""The objective of the grouper."""

from typing import Any

import jax
import jax.numpy as jnp

from zegformer_jax.training.objective import Batch, Metrics
from zegformer_jax.training.objectives.segmentation import SegmentationObjective
from zegformer_jax.training.set_loss import SetTotals, set_loss_of_layers
from zegformer_jax.training.targets import Targets, targets_from_labels


class GrouperObjective(SegmentationObjective):
    """The set prediction loss of the grouper (MaskFormer, section 3.2)."""

    metrics = ("loss", "loss_class", "loss_mask", "loss_dice", "targets_lost")

    def totals(self, batch: Batch) -> SetTotals:
        """Returns the number of targets, and the sum of the queries' weights."""
        count = self.targets(batch).valid_bn.sum().astype(jnp.float32)
        # Their number does not depend on the matching; all of them are labelled "no object".
        others = len(batch["label"]) * self.model.transformer.queries - count
        return SetTotals(count, count + self.experiment.loss.no_object_weight * others)

    def loss(
        self, params: Any, constants: Any, batch: Batch, totals: SetTotals, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss of a batch {image, label}, and its parts."""
        targets = self.targets(batch)
        output = self.apply(params, constants, batch, key)
        metrics = set_loss_of_layers(output, targets, self.experiment.loss, totals)
        metrics["targets_lost"] = targets.overflow_b.sum()
        return metrics["loss"], metrics

    def targets(self, batch: Batch) -> Targets:
        """Returns the labelled segments of a batch {label}, at most `loss.max_targets` an image."""
        most = self.experiment.loss.max_targets or self.model.transformer.queries
        return targets_from_labels(batch["label"], self.classes, most)
