"""Targets of the set prediction loss, made on the device from label maps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WORD = 32  # bits of an integer


class Targets(NamedTuple):
    """The segments in a batch of label maps, one for each class in an image.

    Attributes:
        ids_bn: Class of each target, ascending, int32 [B, N].
        labels_bhw: Label of each pixel, int32 [B, H, W]; C where it is in no target.
        valid_bn: False for padding, bool [B, N].
        overflow_b: Number of classes beyond the N that are kept, int32 [B].
    """

    ids_bn: jax.Array
    labels_bhw: jax.Array
    valid_bn: jax.Array
    overflow_b: jax.Array

    @property
    def masks_bnhw(self) -> jax.Array:
        """Masks of the targets, bool [B, N, H, W]; large, so take few targets at a time."""
        ids_bn11, valid_bn11 = (x[:, :, None, None] for x in (self.ids_bn, self.valid_bn))
        return (self.labels_bhw[:, None] == ids_bn11) & valid_bn11


def targets_from_labels(labels_bhw: jax.Array, num_classes: int, max_targets: int) -> Targets:
    """Makes a target of each class in a label map.

    Args:
        labels_bhw: Labels, integers [B, H, W]; values outside 0..num_classes - 1 are in no target.
        num_classes: Number of classes C.
        max_targets: Most targets of an image. Of more classes some are kept at random, which
            depends on the label map alone, and the others are counted. Targets are padded to the
            smaller of this and `num_classes`.
    """
    max_targets = min(max_targets, num_classes)

    def image_targets(labels_hw: jax.Array):
        known_hw = labels_hw < num_classes
        indices_hw = jnp.where(known_hw, labels_hw, num_classes).astype(jnp.int32)
        present_c = _values_in(indices_hw, num_classes)
        if max_targets < num_classes:
            kept_c = _keep(present_c, max_targets, indices_hw.sum())
        else:
            kept_c = present_c
        ids_n = jnp.nonzero(kept_c, size=max_targets, fill_value=0)[0].astype(jnp.int32)
        valid_n = jnp.arange(max_targets) < present_c.sum()
        overflow = jnp.maximum(present_c.sum() - max_targets, 0).astype(jnp.int32)
        return ids_n, indices_hw, valid_n, overflow

    return Targets(*jax.vmap(image_targets)(labels_bhw))


def _keep(present_c: jax.Array, most: int, seed: jax.Array) -> jax.Array:
    """Returns at most so many of the classes that are present, drawn at random, bool [C]."""
    random_c = jax.random.uniform(jax.random.key(seed), present_c.shape)
    order_c = jnp.argsort(jnp.where(present_c, random_c, 2.0))
    return present_c & jnp.zeros_like(present_c).at[order_c[:most]].set(True)


def _values_in(labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns whether each of 0..num_classes - 1 is among the labels, bool [C].

    The bits of the labels are or-ed. A scatter took 7% of a training step on an H200, as its
    threads wait for each other where most pixels have the same label.
    """
    word, bit = labels // WORD, jnp.uint32(1) << (labels % WORD).astype(jnp.uint32)
    words = [
        jax.lax.reduce(
            jnp.where(word == index, bit, jnp.uint32(0)),
            jnp.uint32(0),
            jax.lax.bitwise_or,
            tuple(range(labels.ndim)),
        )
        for index in range(-(-num_classes // WORD))
    ]
    classes = np.arange(num_classes)
    bits_c = jnp.stack(words)[classes // WORD] >> (classes % WORD).astype(np.uint32)
    return (bits_c & 1).astype(bool)
