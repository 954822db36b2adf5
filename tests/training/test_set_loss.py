"""The loss of all decoder layers, against the layers' losses one by one at the full padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zegformer_jax.experiment.settings import LossSettings
from zegformer_jax.models.grouper import GrouperOutput
from zegformer_jax.training import losses, matching
from zegformer_jax.training.set_loss import SetTotals, set_loss_of_layers
from zegformer_jax.training.targets import targets_from_labels

CLASSES, LAYERS, QUERIES = 20, 2, 24
WEIGHTS = LossSettings(
    class_weight=2.0, mask_weight=20.0, dice_weight=5.0, no_object_weight=0.1, max_targets=CLASSES
)
PARTS = ("loss_class", "loss_mask", "loss_dice")


def output_of(seed):
    rng = np.random.default_rng(seed)
    class_logits = rng.normal(size=(LAYERS, 2, QUERIES, CLASSES + 1)).astype(np.float32)
    mask_logits = 3 * rng.normal(size=(LAYERS, 2, QUERIES, 5, 4)).astype(np.float32)
    return GrouperOutput(jnp.asarray(class_logits), jnp.asarray(mask_logits))


def one_by_one(output, targets, totals):
    parts = np.zeros(3)
    for class_logits, mask_logits in zip(*output, strict=True):
        matched = matching.match(class_logits, mask_logits, targets, 20.0, 5.0)
        sums = losses.set_loss(class_logits, mask_logits, targets, matched, 0.1)
        parts += np.divide(
            [sums.class_sum, sums.mask_sum, sums.dice_sum],
            [totals.class_weight, max(totals.targets, 1), max(totals.targets, 1)],
        )
    return parts * (WEIGHTS.class_weight, WEIGHTS.mask_weight, WEIGHTS.dice_weight)


@pytest.mark.parametrize("most", [0, 1, 4, 5, 9, 20])
def test_the_width_of_the_padding_changes_nothing(most):
    labels = np.full((2, 20, 16), 255, np.uint8)
    labels[0].flat[: 16 * most] = np.repeat(
        np.random.default_rng(0).permutation(CLASSES)[:most], 16
    )
    labels[1, :4] = 3 if most else 255
    targets = targets_from_labels(jnp.asarray(labels), CLASSES, CLASSES)
    totals = SetTotals(targets.valid_bn.sum().astype(jnp.float32), jnp.float32(17.0))
    output = output_of(most)
    loss = jax.jit(lambda *arrays: set_loss_of_layers(*arrays[:2], WEIGHTS, arrays[2]))
    metrics = loss(output, targets, totals)
    wanted = one_by_one(output, targets, totals)
    np.testing.assert_allclose([metrics[name] for name in PARTS], wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss"], wanted.sum(), rtol=1e-5)
