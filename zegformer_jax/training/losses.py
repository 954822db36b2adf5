"""Losses as pure functions that return sums and counts; whoever reports divides."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from zegformer_jax.training.targets import Targets

FOCAL_ALPHA = 0.25  # Lin et al., 2017 (RetinaNet); gamma is 2
NO_OBJECT_WEIGHT = 0.1  # DETR, section 4
DICE_SMOOTH = 1.0  # added to numerator and denominator; MaskFormer


class SetLossSums(NamedTuple):
    """One decoder layer's loss over a batch, before division; all float32 scalars.

    Attributes:
        class_sum: weighted cross entropy summed over queries.
        class_weight: the weights' sum.
        mask_sum: focal loss (mean over pixels) summed over matched pairs.
        dice_sum: dice loss summed over matched pairs.
        targets: number of matched pairs.
    """

    class_sum: jax.Array
    class_weight: jax.Array
    mask_sum: jax.Array
    dice_sum: jax.Array
    targets: jax.Array


def class_loss(
    class_logits_bqc: jax.Array,
    targets: Targets,
    matched_bn: jax.Array,
    no_object_weight: float = NO_OBJECT_WEIGHT,
) -> tuple[jax.Array, jax.Array]:
    """Weighted cross entropy of the queries' classes: its sum and the weights' sum.

    A query that no valid target is matched to shall say "no object", the last of C + 1 classes.
    """
    batch, queries, columns = class_logits_bqc.shape
    no_object = columns - 1
    # A padded target writes to a column that is cut off again.
    slots_bn = jnp.where(targets.valid_bn, matched_bn, queries)
    wanted_bq = jnp.full((batch, queries + 1), no_object)
    wanted_bq = wanted_bq.at[jnp.arange(batch)[:, None], slots_bn].set(targets.ids_bn)[:, :queries]
    cross_entropy_bq = optax.softmax_cross_entropy_with_integer_labels(
        class_logits_bqc.astype(jnp.float32), wanted_bq
    )
    weights_bq = jnp.where(wanted_bq == no_object, no_object_weight, 1.0)
    return (weights_bq * cross_entropy_bq).sum(), weights_bq.sum()


def focal_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Focal loss of every pixel with gamma 2 (RetinaNet, 2017, equation 5).

    The square is written out: with a general power, as in `optax.losses.sigmoid_focal_loss`, the
    mask losses and their gradient took 6 times as long on a CPU.

    Args:
        logits: float of any shape.
        targets: bool of the same shape.
    """
    probability = jax.nn.sigmoid(logits)
    wrong = jnp.where(targets, 1 - probability, probability)
    cross_entropy = jax.nn.softplus(jnp.where(targets, -logits, logits))
    return jnp.where(targets, FOCAL_ALPHA, 1 - FOCAL_ALPHA) * wrong**2 * cross_entropy


def mask_losses(
    mask_logits_bqhw: jax.Array, targets: Targets, matched_bn: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Focal and dice loss of the matched masks at the targets' resolution, summed over pairs."""
    matched_bnhw = jnp.take_along_axis(
        mask_logits_bqhw.astype(jnp.float32), matched_bn[:, :, None, None], axis=1
    )
    logits_bnhw = jax.image.resize(
        matched_bnhw, targets.masks_bnhw.shape, "bilinear", antialias=False
    )
    focal_bn = focal_loss(logits_bnhw, targets.masks_bnhw).mean((2, 3))
    masks_bnhw = targets.masks_bnhw.astype(jnp.float32)
    probability = jax.nn.sigmoid(logits_bnhw)
    overlap_bn = 2 * (probability * masks_bnhw).sum((2, 3))
    total_bn = probability.sum((2, 3)) + masks_bnhw.sum((2, 3))
    dice_bn = 1 - (overlap_bn + DICE_SMOOTH) / (total_bn + DICE_SMOOTH)
    return (focal_bn * targets.valid_bn).sum(), (dice_bn * targets.valid_bn).sum()


def set_loss(
    class_logits_bqc: jax.Array,
    mask_logits_bqhw: jax.Array,
    targets: Targets,
    matched_bn: jax.Array,
    no_object_weight: float = NO_OBJECT_WEIGHT,
) -> SetLossSums:
    """One decoder layer's loss, given which query each target is matched to.

    Args:
        class_logits_bqc: [B, Q, C + 1], the last column is "no object".
        mask_logits_bqhw: [B, Q, h, w].
        targets: of the batch, at any integer multiple of (h, w).
        matched_bn: int [B, N], from `matching.match`.
        no_object_weight: weight of a "no object" query in the cross entropy.
    """
    class_sum, class_weight = class_loss(class_logits_bqc, targets, matched_bn, no_object_weight)
    mask_sum, dice_sum = mask_losses(mask_logits_bqhw, targets, matched_bn)
    count = targets.valid_bn.sum().astype(jnp.float32)
    return SetLossSums(class_sum, class_weight, mask_sum, dice_sum, count)


def per_pixel_loss(logits_bhwc: jax.Array, labels_bhw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of the per-pixel baseline at the labels' resolution: sum and pixel count.

    Args:
        logits_bhwc: [B, h, w, C], upsampled bilinearly to the labels.
        labels_bhw: integers [B, H, W]; what is not in 0..C - 1 does not count.
    """
    batch, height, width = labels_bhw.shape
    classes = logits_bhwc.shape[-1]
    logits_bhwc = jax.image.resize(
        logits_bhwc.astype(jnp.float32),
        (batch, height, width, classes),
        "bilinear",
        antialias=False,
    )
    known_bhw = labels_bhw < classes
    wanted_bhw = jnp.where(known_bhw, labels_bhw, 0).astype(jnp.int32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits_bhwc, wanted_bhw)
    return (cross_entropy * known_bhw).sum(), known_bhw.sum().astype(jnp.float32)


def contrastive_loss(
    image_bd: jax.Array, text_bd: jax.Array, logit_scale: jax.Array, class_b: jax.Array
) -> jax.Array:
    """CLIP's symmetric contrastive loss (Radford et al., 2021), mean over the batch.

    Pairs of the same class are positives of each other, in equal shares (as in supervised
    contrastive learning, Khosla et al., 2020): with few classes a batch holds many of them.

    Args:
        image_bd: image embeddings of unit length.
        text_bd: text embeddings of unit length, row by row the images' captions.
        logit_scale: the factor on cosines, already exponentiated.
        class_b: int [B], what each picture shows.
    """
    logits_bb = logit_scale * image_bd @ text_bd.T
    same_bb = (class_b[:, None] == class_b[None]).astype(jnp.float32)
    wanted_bb = same_bb / same_bb.sum(-1, keepdims=True)
    of_images = optax.softmax_cross_entropy(logits_bb, wanted_bb).mean()
    of_texts = optax.softmax_cross_entropy(logits_bb.T, wanted_bb).mean()
    return (of_images + of_texts) / 2
