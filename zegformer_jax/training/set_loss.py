"""The set prediction loss of all decoder layers (MaskFormer, section 3.2)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zegformer_jax.experiment.settings import LossSettings
from zegformer_jax.models.grouper import GrouperOutput
from zegformer_jax.training import losses, matching
from zegformer_jax.training.objective import Metrics
from zegformer_jax.training.targets import Targets

TARGETS_AT_ONCE = 4  # of an image, whose masks at full resolution are in memory together


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
    """Returns the weighted loss and its parts, each summed over the decoder layers."""
    matched_lbn = matching.match_layers(
        *jax.lax.stop_gradient(output), targets, weights.mask_weight, weights.dice_weight
    )

    def class_sum(class_logits_bqc: jax.Array, matched_bn: jax.Array) -> jax.Array:
        return losses.class_loss(class_logits_bqc, targets, matched_bn, weights.no_object_weight)

    count = jnp.maximum(totals.targets, 1)
    factors = (weights.mask_weight / count, weights.dice_weight / count)
    loss_of_masks, (loss_mask, loss_dice) = _mask_loss(
        output.mask_logits_lbqhw, targets, matched_lbn, factors
    )
    of_layers = jax.vmap(class_sum)(output.class_logits_lbqc, matched_lbn)
    loss_class = weights.class_weight * of_layers.sum() / totals.class_weight
    return {
        "loss_class": loss_class,
        "loss_mask": loss_mask,
        "loss_dice": loss_dice,
        "loss": loss_class + loss_of_masks,
    }


@jax.custom_vjp
def _mask_loss(
    mask_logits_lbqhw: jax.Array,
    targets: Targets,
    matched_lbn: jax.Array,
    factors: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the focal and dice loss of all layers' matched masks: their sum, and each.

    Only the sum has a gradient. It is computed together with the loss, for `TARGETS_AT_ONCE`
    targets of each image at a time, since the masks at full resolution are the largest arrays of
    a training step, and most images have few targets of the many that they are padded to.

    Args:
        mask_logits_lbqhw: Mask logits [L, B, Q, h, w].
        targets: Targets of the batch.
        matched_lbn: Query of each target, int [L, B, N].
        factors: Weights of the focal and the dice loss of a pair.
    """
    return _mask_loss_forward(mask_logits_lbqhw, targets, matched_lbn, factors)[0]


def _mask_loss_forward(
    mask_logits_lbqhw: jax.Array,
    targets: Targets,
    matched_lbn: jax.Array,
    factors: tuple[jax.Array, jax.Array],
) -> tuple[Any, Any]:
    """Returns the loss, and the gradient with respect to the matched masks."""
    padding = ((0, 0), (0, -matched_lbn.shape[2] % TARGETS_AT_ONCE))
    ids_bn, valid_bn = jnp.pad(targets.ids_bn, padding), jnp.pad(targets.valid_bn, padding)
    parts = -(-targets.valid_bn.sum(1).max() // TARGETS_AT_ONCE)

    def of_part(index: jax.Array, logits_bnhw: jax.Array) -> tuple[jax.Array, Any]:
        def cut(array_bn: jax.Array) -> jax.Array:
            first = index * TARGETS_AT_ONCE
            return jax.lax.dynamic_slice_in_dim(array_bn, first, TARGETS_AT_ONCE, axis=1)

        def weighted(logits_bnhw: jax.Array) -> tuple[jax.Array, Any]:
            part = targets._replace(ids_bn=cut(ids_bn), valid_bn=cut(valid_bn))
            sums = losses.pair_losses(logits_bnhw, part.masks_bnhw, part.valid_bn)
            loss_mask, loss_dice = (x * factor for x, factor in zip(sums, factors, strict=True))
            return loss_mask + loss_dice, (loss_mask, loss_dice)

        return jax.value_and_grad(weighted, has_aux=True)(cut(logits_bnhw))

    def of_layer(layer: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        mask_logits_bqhw, matched_bn = layer
        logits_bnhw = losses.matched_masks(mask_logits_bqhw, jnp.pad(matched_bn, padding))

        def add(index: jax.Array, sums: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            total, gradient_bnhw = sums
            loss, gradient = of_part(index, logits_bnhw)
            gradient_bnhw = jax.lax.dynamic_update_slice_in_dim(
                gradient_bnhw, gradient, index * TARGETS_AT_ONCE, axis=1
            )
            return jax.tree.map(jnp.add, total, loss), gradient_bnhw

        zero = jnp.zeros(())
        return jax.lax.fori_loop(0, parts, add, ((zero, (zero, zero)), jnp.zeros_like(logits_bnhw)))

    of_layers, gradient_lbnhw = jax.lax.map(of_layer, (mask_logits_lbqhw, matched_lbn))
    loss = jax.tree.map(jnp.sum, of_layers)
    return loss, (gradient_lbnhw[:, :, : matched_lbn.shape[2]], matched_lbn, mask_logits_lbqhw)


def _mask_loss_backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
    """Returns the gradient with respect to the mask logits."""
    gradient_lbnhw, matched_lbn, like_lbqhw = saved

    def spread(gradient_nhw: jax.Array, matched_n: jax.Array, like_qhw: jax.Array) -> jax.Array:
        return jnp.zeros_like(like_qhw).at[matched_n].add(gradient_nhw.astype(like_qhw.dtype))

    gradient_lbqhw = jax.vmap(jax.vmap(spread))(gradient_lbnhw, matched_lbn, like_lbqhw)
    return gradient_lbqhw * cotangents[0], None, None, None


_mask_loss.defvjp(_mask_loss_forward, _mask_loss_backward)
