"""Objectives of segmentation: the grouper and the per-pixel baseline."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from zegformer_jax.experiment.data import dataset_vocabulary, open_split
from zegformer_jax.experiment.models import build_model, embed_classes, load_clip_of
from zegformer_jax.experiment.workdir import resolve
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.training import losses, matching
from zegformer_jax.training.initialise import hand_over, load_start
from zegformer_jax.training.objective import Batch, Metrics, Task, Variables
from zegformer_jax.training.targets import (
    Targets,
    first_targets,
    target_widths,
    targets_from_labels,
)


class SetTotals(NamedTuple):
    """What the set prediction loss of a whole batch is divided by; float32 scalars.

    Attributes:
        targets: their number; at least 1 is divided by.
        class_weight: sum of the queries' weights in the cross entropy.
    """

    targets: jax.Array
    class_weight: jax.Array


def set_loss_of_layers(output: Any, targets: Targets, weights: Any, totals: SetTotals) -> Metrics:
    """The weighted loss of every decoder layer and its parts, each summed over the layers.

    Most images have few targets: the batch is matched and compared at the narrowest of several
    widths that holds them all, so that padding costs little.
    """

    def at_width(count: int) -> Callable[[Any, Targets], tuple[jax.Array, ...]]:
        return lambda output, targets: _loss_parts(
            output, first_targets(targets, count), weights, totals
        )

    widths = target_widths(targets.valid_bn.shape[1])
    most = targets.valid_bn.sum(1).max()
    narrowest = jnp.searchsorted(jnp.asarray(widths), most)
    branches = [at_width(count) for count in widths]
    by_class, by_mask, by_dice = jax.lax.switch(narrowest, branches, output, targets)
    parts = {
        "loss_class": weights.class_weight * by_class,
        "loss_mask": weights.mask_weight * by_mask,
        "loss_dice": weights.dice_weight * by_dice,
    }
    return parts | {"loss": sum(parts.values())}


def _loss_parts(
    output: Any, targets: Targets, weights: Any, totals: SetTotals
) -> tuple[jax.Array, ...]:
    """Class, mask and dice loss, each summed over the decoder layers.

    Layers are worked through one by one and again in the backward pass, so that the masks at
    full resolution are held for one layer only.
    """

    @jax.checkpoint
    def layer_loss(layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        class_logits, mask_logits = layer
        matched = matching.match(
            class_logits, mask_logits, targets, weights.mask_weight, weights.dice_weight
        )
        sums = losses.set_loss(
            class_logits, mask_logits, targets, matched, weights.no_object_weight
        )
        count = jnp.maximum(totals.targets, 1)
        return sums.class_sum / totals.class_weight, sums.mask_sum / count, sums.dice_sum / count

    return tuple(part.sum() for part in jax.lax.map(layer_loss, tuple(output)))


class SegmentationLoss(NamedTuple):
    """A loss of a batch {image, label}, its totals and metrics; see `Task`."""

    loss: Callable[[Any, Any, Any, Batch, Any, jax.Array], tuple[jax.Array, Metrics]]
    totals: Callable[[Any, Batch], Any]
    metrics: tuple[str, ...]


def grouper_loss(model: Grouper, weights: Any) -> SegmentationLoss:
    """The set prediction loss (MaskFormer, section 3.2)."""
    queries = model.transformer.queries

    def totals(text_cd, batch):
        targets = targets_from_labels(batch["label"], len(text_cd), weights.max_targets)
        count = targets.valid_bn.sum().astype(jnp.float32)
        others = len(batch["label"]) * queries - count  # say "no object", whichever they are
        return SetTotals(count, count + weights.no_object_weight * others)

    def loss(params, constants, text_cd, batch, totals, key):
        targets = targets_from_labels(batch["label"], len(text_cd), weights.max_targets)
        output = _apply(model, params, constants, text_cd, batch, key)
        metrics = set_loss_of_layers(output, targets, weights, totals)
        metrics["targets_lost"] = targets.overflow_b.sum()
        return metrics["loss"], metrics

    names = ("loss", "loss_class", "loss_mask", "loss_dice", "targets_lost")
    return SegmentationLoss(loss, totals, names)


def pixel_loss(model: Any) -> SegmentationLoss:
    """The cross entropy of the labelled pixels."""

    def totals(text_cd, batch):
        return (batch["label"] < len(text_cd)).sum().astype(jnp.float32)

    def loss(params, constants, text_cd, batch, pixels, key):
        logits = _apply(model, params, constants, text_cd, batch, key)
        total, _ = losses.per_pixel_loss(logits, batch["label"])
        loss = total / jnp.maximum(pixels, 1)
        return loss, {"loss": loss}

    return SegmentationLoss(loss, totals, ("loss",))


def _apply(
    model: Any, params: Any, constants: Any, text_cd: Any, batch: Batch, key: jax.Array
) -> Any:
    return model.apply(
        {"params": params, "constants": constants},
        normalise_images(batch["image"]),
        text_cd,
        deterministic=False,
        rngs={"dropout": key},
    )


def segmentation_task(config: ConfigDict, workdir: epath.PathLike) -> Task:
    """Trains the grouper or the per-pixel baseline on the seen classes of a data set."""
    from zegformer_jax.input import pipeline

    vocabulary = dataset_vocabulary(config, workdir)
    seen = vocabulary.select(vocabulary.seen_indices)
    clip = load_clip_of(config, workdir)
    text_cd = embed_classes(config, workdir, clip, seen.names)
    model = build_model(config, text_cd.shape[1])
    source = open_split(config, workdir, "train")

    def init(key: jax.Array) -> Variables:
        side = config.input.crop_size
        variables = jax.jit(model.init)(key, jnp.zeros((1, side, side, 3)), jnp.asarray(text_cd))
        if config.model.start_from:
            path = resolve(config.model.start_from, workdir)
            start_kind, start = load_start(path)
            try:
                return hand_over(variables, config.model.kind, start, start_kind)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return variables

    def batches(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.train_batches(
            source,
            vocabulary,
            batch_size=config.input.batch_size,
            crop_size=config.input.crop_size,
            short_sides=config.input.short_sides,
            max_long_side=config.input.max_long_side,
            seed=config.seed,
            start_step=start_step,
            num_steps=config.train.steps - start_step,
            skip_unseen_pictures=config.input.skip_unseen_pictures,
            num_threads=config.input.threads,
            prefetch=config.input.prefetch,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    is_grouper = config.model.kind == "zegformer"
    losses_of = grouper_loss(model, config.loss) if is_grouper else pixel_loss(model)
    return Task(
        init,
        losses_of.loss,
        losses_of.metrics,
        jnp.asarray(text_cd),
        batches,
        totals=losses_of.totals,
        adds_up=True,
        name=lambda index: [source[int(i)]["id"] for i in index],
    )
