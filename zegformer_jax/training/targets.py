"""Targets of the set prediction loss, made on the device from label maps."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

NARROWEST = 4  # targets; a batch of fewer is padded to them


class Targets(NamedTuple):
    """The segments that an image's label map holds, one for each class present.

    Attributes:
        ids_bn: int32 [B, N], the class of every target, ascending.
        masks_bnhw: bool [B, N, H, W].
        valid_bn: bool [B, N]; the others are padding.
        overflow_b: int32 [B], classes present beyond the N that are kept.
    """

    ids_bn: jax.Array
    masks_bnhw: jax.Array
    valid_bn: jax.Array
    overflow_b: jax.Array


def targets_from_labels(labels_bhw: jax.Array, num_classes: int, max_targets: int) -> Targets:
    """Makes one binary mask for each class that is present in a label map.

    Args:
        labels_bhw: integers [B, H, W]; what is not in 0..num_classes - 1 belongs to no target.
        num_classes: number of classes C.
        max_targets: targets an image at most. Of more classes the first are kept and the rest is
            counted. N, to which the targets are padded, is this or `num_classes`, the smaller.
    """
    max_targets = min(max_targets, num_classes)

    def image_targets(labels_hw: jax.Array):
        known_hw = labels_hw < num_classes
        indices_hw = jnp.where(known_hw, labels_hw, num_classes).astype(jnp.int32)
        present_c = jnp.zeros(num_classes + 1, bool).at[indices_hw.reshape(-1)].set(True)[:-1]
        ids_n = jnp.nonzero(present_c, size=max_targets, fill_value=0)[0].astype(jnp.int32)
        valid_n = jnp.arange(max_targets) < present_c.sum()
        masks_nhw = (indices_hw[None] == ids_n[:, None, None]) & valid_n[:, None, None]
        overflow = jnp.maximum(present_c.sum() - max_targets, 0).astype(jnp.int32)
        return ids_n, masks_nhw, valid_n, overflow

    return Targets(*jax.vmap(image_targets)(labels_bhw))


def target_widths(most: int) -> tuple[int, ...]:
    """Numbers of targets to work at: `NARROWEST`, twice that and so on, and `most` itself."""
    doubled = (NARROWEST << doublings for doublings in itertools.count())
    return (*itertools.takewhile(lambda width: width < most, doubled), most)


def first_targets(targets: Targets, count: int) -> Targets:
    """Keeps the first targets of every image; all valid ones where there are no more."""
    kept = (array_bn[:, :count] for array_bn in targets[:-1])
    return Targets(*kept, targets.overflow_b)
