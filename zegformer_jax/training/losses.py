"""Losses as pure functions that return sums and counts; the caller divides."""

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
        class_sum: Weighted cross entropy summed over queries.
        mask_sum: Focal loss (mean over pixels) summed over matched pairs.
        dice_sum: Dice loss summed over matched pairs.
    """

    class_sum: jax.Array
    mask_sum: jax.Array
    dice_sum: jax.Array


def class_loss(
    class_logits_bqc: jax.Array,
    targets: Targets,
    matched_bn: jax.Array,
    no_object_weight: float = NO_OBJECT_WEIGHT,
) -> jax.Array:
    """Returns the weighted cross entropy of the queries' classes, summed over queries.

    A query that no valid target is matched to is labelled "no object", the last of C + 1 classes.

    Args:
        class_logits_bqc: Class logits [B, Q, C + 1].
        targets: Targets of the batch.
        matched_bn: Query of each target, int [B, N].
        no_object_weight: Weight of a "no object" query.
    """
    batch, queries, columns = class_logits_bqc.shape
    no_object = columns - 1
    # A padded target writes to an extra column, which is cut off.
    slots_bn = jnp.where(targets.valid_bn, matched_bn, queries)
    wanted_bq = jnp.full((batch, queries + 1), no_object)
    wanted_bq = wanted_bq.at[jnp.arange(batch)[:, None], slots_bn].set(targets.ids_bn)[:, :queries]
    cross_entropy_bq = optax.softmax_cross_entropy_with_integer_labels(
        class_logits_bqc.astype(jnp.float32), wanted_bq
    )
    weights_bq = jnp.where(wanted_bq == no_object, no_object_weight, 1.0)
    return (weights_bq * cross_entropy_bq).sum()


def focal_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the focal loss of every pixel with gamma 2 (RetinaNet, 2017, equation 5).

    The square is written out: with a general power, as in `optax.losses.sigmoid_focal_loss`, the
    mask losses and their gradient took 6 times as long on a CPU.

    Args:
        logits: Mask logits, float of any shape.
        targets: True inside the target, bool of the same shape.
    """
    probability = jax.nn.sigmoid(logits)
    wrong = jnp.where(targets, 1 - probability, probability)
    cross_entropy = jax.nn.softplus(jnp.where(targets, -logits, logits))
    return jnp.where(targets, FOCAL_ALPHA, 1 - FOCAL_ALPHA) * wrong**2 * cross_entropy


def mask_losses(
    mask_logits_bqhw: jax.Array, targets: Targets, matched_bn: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns focal and dice loss of the matched masks, each summed over pairs.

    Mask logits are resized bilinearly to the targets' resolution.

    Args:
        mask_logits_bqhw: Mask logits [B, Q, h, w].
        targets: Targets of the batch.
        matched_bn: Query of each target, int [B, N].
    """
    logits_bnhw = matched_masks(mask_logits_bqhw, matched_bn)
    return pair_losses(logits_bnhw, targets.masks_bnhw, targets.valid_bn)


def matched_masks(mask_logits_bqhw: jax.Array, matched_bn: jax.Array) -> jax.Array:
    """Returns the mask logits of each target's query, float32 [B, N, h, w]."""
    index_bn11 = matched_bn[:, :, None, None]
    return jnp.take_along_axis(mask_logits_bqhw.astype(jnp.float32), index_bn11, axis=1)


def pair_losses(
    logits_bnhw: jax.Array, masks_bnhw: jax.Array, valid_bn: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns focal and dice loss of pairs of a predicted and a true mask, each summed over pairs.

    Args:
        logits_bnhw: Mask logits [B, N, h, w], resized bilinearly to the targets' resolution.
        masks_bnhw: Masks of the targets, bool [B, N, H, W].
        valid_bn: False for pairs that do not count, bool [B, N].
    """
    logits_bnhw = jax.image.resize(logits_bnhw, masks_bnhw.shape, "bilinear", antialias=False)
    focal_bn = focal_loss(logits_bnhw, masks_bnhw).mean((2, 3))
    true_bnhw = masks_bnhw.astype(jnp.float32)
    probability = jax.nn.sigmoid(logits_bnhw)
    overlap_bn = 2 * (probability * true_bnhw).sum((2, 3))
    total_bn = probability.sum((2, 3)) + true_bnhw.sum((2, 3))
    dice_bn = 1 - (overlap_bn + DICE_SMOOTH) / (total_bn + DICE_SMOOTH)
    return (focal_bn * valid_bn).sum(), (dice_bn * valid_bn).sum()


def set_loss(
    class_logits_bqc: jax.Array,
    mask_logits_bqhw: jax.Array,
    targets: Targets,
    matched_bn: jax.Array,
    no_object_weight: float = NO_OBJECT_WEIGHT,
) -> SetLossSums:
    """Returns one decoder layer's loss, given the query that each target is matched to.

    Args:
        class_logits_bqc: Class logits [B, Q, C + 1]; the last column is "no object".
        mask_logits_bqhw: Mask logits [B, Q, h, w].
        targets: Targets of the batch, at any integer multiple of (h, w).
        matched_bn: Query of each target, int [B, N], from `matching.match`.
        no_object_weight: Weight of a "no object" query in the cross entropy.
    """
    class_sum = class_loss(class_logits_bqc, targets, matched_bn, no_object_weight)
    mask_sum, dice_sum = mask_losses(mask_logits_bqhw, targets, matched_bn)
    return SetLossSums(class_sum, mask_sum, dice_sum)


def per_pixel_loss(logits_bhwc: jax.Array, labels_bhw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the per-pixel cross entropy at the labels' resolution: its sum and the pixel count.

    Args:
        logits_bhwc: Class logits [B, h, w, C], which are resized bilinearly to the labels.
        labels_bhw: Labels, integers [B, H, W]; values outside 0..C - 1 are ignored.
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
    """Returns CLIP's symmetric contrastive loss (Radford et al., 2021), the mean over the batch.

    Pairs of the same class are positives of each other, in equal shares (as in supervised
    contrastive learning, Khosla et al., 2020): with few classes a batch holds many of them.

    Args:
        image_bd: Image embeddings of unit length [B, D].
        text_bd: Text embeddings of the images' captions, of unit length [B, D].
        logit_scale: Factor on the cosines, already exponentiated.
        class_b: Class of each image, int [B].
    """
    logits_bb = logit_scale * image_bd @ text_bd.T
    same_bb = (class_b[:, None] == class_b[None]).astype(jnp.float32)
    wanted_bb = same_bb / same_bb.sum(-1, keepdims=True)
    of_images = optax.softmax_cross_entropy(logits_bb, wanted_bb).mean()
    of_texts = optax.softmax_cross_entropy(logits_bb.T, wanted_bb).mean()
    return (of_images + of_texts) / 2
