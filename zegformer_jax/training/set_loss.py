"""The set prediction loss of all decoder layers (MaskFormer, section 3.2)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zegformer_jax.experiment.settings import LossSettings
from zegformer_jax.models.grouper import GrouperOutput
from zegformer_jax.training import losses, matching
from zegformer_jax.training.objective import Metrics
from zegformer_jax.training.targets import Targets, first_targets, target_widths


class SetTotals(NamedTuple):
    """Divisors of a whole batch's set prediction loss, float32 scalars.

    Attributes:
        targets: Number of targets; the divisor is at least 1.
        class_weight: Sum of the queries' weights in the cross entropy.
    """

    targets: jax.Array
    class_weight: jax.Array


def set_loss_of_layers(
    output: GrouperOutput, targets: Targets, weights: LossSettings, totals: SetTotals
) -> Metrics:
    """Returns the weighted loss and its parts, each summed over the decoder layers.

    Most images have few targets. The batch is matched and compared at the narrowest of several
    widths that holds them all, so that padding costs little.
    """

    def at_width(count: int) -> Callable[[GrouperOutput, Targets], tuple[jax.Array, ...]]:
        return lambda output, targets: _loss_parts(
            output, first_targets(targets, count), weights, totals
        )

    widths = target_widths(targets.valid_bn.shape[1])
    most = targets.valid_bn.sum(1).max()
    narrowest = jnp.searchsorted(jnp.asarray(widths), most)
    branches = [at_width(count) for count in widths]
    class_part, mask_part, dice_part = jax.lax.switch(narrowest, branches, output, targets)
    parts = {
        "loss_class": weights.class_weight * class_part,
        "loss_mask": weights.mask_weight * mask_part,
        "loss_dice": weights.dice_weight * dice_part,
    }
    return parts | {"loss": sum(parts.values())}


def _loss_parts(
    output: GrouperOutput, targets: Targets, weights: LossSettings, totals: SetTotals
) -> tuple[jax.Array, ...]:
    """Returns class, mask and dice loss, each summed over the decoder layers.

    Layers are computed one by one, and again in the backward pass, so that only one layer's masks
    at full resolution are in memory.
    """

    @jax.checkpoint
    def layer_loss(layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        class_logits_bqc, mask_logits_bqhw = layer
        matched_bn = matching.match(
            class_logits_bqc, mask_logits_bqhw, targets, weights.mask_weight, weights.dice_weight
        )
        sums = losses.set_loss(
            class_logits_bqc, mask_logits_bqhw, targets, matched_bn, weights.no_object_weight
        )
        count = jnp.maximum(totals.targets, 1)
        return sums.class_sum / totals.class_weight, sums.mask_sum / count, sums.dice_sum / count

    return tuple(part.sum() for part in jax.lax.map(layer_loss, tuple(output)))
