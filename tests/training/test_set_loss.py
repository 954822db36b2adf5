"""The loss of all decoder layers, against the layers' losses one by one at the full padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_but import slow_but

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


def one_by_one(class_logits, mask_logits, targets, totals):
    parts, count = jnp.zeros(3), jnp.maximum(totals.targets, 1)
    for layer in zip(class_logits, mask_logits, strict=True):
        matched = matching.match(*layer, targets, WEIGHTS.mask_weight, WEIGHTS.dice_weight)
        sums = losses.set_loss(*layer, targets, matched, WEIGHTS.no_object_weight)
        parts += jnp.stack(list(sums)) / jnp.stack([totals.class_weight, count, count])
    return parts * jnp.array([WEIGHTS.class_weight, WEIGHTS.mask_weight, WEIGHTS.dice_weight])


@jax.jit
def expected(class_logits, mask_logits, targets, totals):
    def total(*logits):
        parts = one_by_one(*logits, targets, totals)
        return parts.sum(), parts

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(class_logits, mask_logits)


@jax.jit
def actual(class_logits, mask_logits, targets, totals):
    def total(*logits):
        metrics = set_loss_of_layers(GrouperOutput(*logits), targets, WEIGHTS, totals)
        return metrics["loss"], jnp.stack([metrics[name] for name in PARTS])

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(class_logits, mask_logits)


@pytest.mark.parametrize("most", slow_but([4], [0, 1, 4, 5, 9, 20]))
def test_the_loss_and_its_gradient_are_those_of_the_layers_one_by_one(most):
    """For every number of targets, also none, up to the full padding."""
    labels = np.full((2, 20, 16), 255, np.uint8)
    labels[0].flat[: 16 * most] = np.repeat(
        np.random.default_rng(0).permutation(CLASSES)[:most], 16
    )
    labels[1, :4] = 3 if most else 255
    targets = targets_from_labels(jnp.asarray(labels), CLASSES, CLASSES)
    totals = SetTotals(targets.valid_bn.sum().astype(jnp.float32), jnp.float32(17.0))
    problem = (*output_of(most), targets, totals)
    close = {"rtol": 1e-5, "atol": 1e-7}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **close), actual(*problem), expected(*problem)
    )
    assert (actual(*problem)[1][1] != 0).any() == (most > 0)
