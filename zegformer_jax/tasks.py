"""What can be trained, and the tasks of segmentation: the grouper and the per-pixel baseline."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from zegformer_jax import experiment, losses, matching
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.normalise import normalise_images

STARTED_PARTS = ("backbone", "pixel_decoder")  # what model.start_from hands over

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Variables = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A model's loss, and where its batches come from.

    Attributes:
        init: a random key to the variables: `params` and, with frozen norms, `constants`.
        loss: (params, constants, context, batch, random key) to the scalar loss and its parts.
        context: arrays that the loss reads besides (text embeddings).
        batches: the first step to this host's part of the batches from there on.
        finish: called with the trained parameters; writes what others read besides checkpoints.
    """

    init: Callable[[jax.Array], Variables]
    loss: Callable[[Any, Any, Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
    context: Any
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    finish: Callable[[Any], None] = lambda params: None


def make_task(config: ConfigDict, workdir: Path) -> Task:
    """Makes the task that `config.model.kind` names.

    Raises:
        ValueError: the kind is not known.
    """
    from zegformer_jax import picture_tasks

    if config.model.kind == "clip":
        return picture_tasks.clip_task(config, workdir)
    if config.model.kind == "classifier":
        return picture_tasks.classifier_task(config, workdir)
    return segmentation_task(config, workdir)


def set_loss_of_layers(output: Any, targets: losses.Targets, weights: Any) -> Metrics:
    """The weighted loss of every decoder layer and its parts, each summed over the layers.

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
        count = jnp.maximum(sums.targets, 1)
        return sums.class_sum / sums.class_weight, sums.mask_sum / count, sums.dice_sum / count

    by_class, by_mask, by_dice = (part.sum() for part in jax.lax.map(layer_loss, tuple(output)))
    parts = {
        "loss_class": weights.class_weight * by_class,
        "loss_mask": weights.mask_weight * by_mask,
        "loss_dice": weights.dice_weight * by_dice,
    }
    return parts | {"loss": sum(parts.values())}


def grouper_loss(model: Grouper, weights: Any) -> Callable:
    """The set prediction loss of a batch {image, label} (MaskFormer, section 3.2)."""

    def loss(params, constants, text_cd, batch, key):
        targets = losses.targets_from_labels(batch["label"], len(text_cd), weights.max_targets)
        output = model.apply(
            {"params": params, "constants": constants},
            normalise_images(batch["image"]),
            text_cd,
            deterministic=False,
            rngs={"dropout": key},
        )
        metrics = set_loss_of_layers(output, targets, weights)
        metrics["targets_lost"] = targets.overflow_b.sum()
        return metrics["loss"], metrics

    return loss


def pixel_loss(model: Any) -> Callable:
    """The cross entropy of the labelled pixels of a batch {image, label}."""

    def loss(params, constants, text_cd, batch, key):
        del key
        images = normalise_images(batch["image"])
        logits = model.apply({"params": params, "constants": constants}, images, text_cd)
        total, count = losses.per_pixel_loss(logits, batch["label"])
        loss = total / jnp.maximum(count, 1)
        return loss, {"loss": loss}

    return loss


def segmentation_task(config: ConfigDict, workdir: Path) -> Task:
    """Trains the grouper or the per-pixel baseline on the seen classes of a data set."""
    from zegformer_jax.input import pipeline

    vocabulary = experiment.load_vocabulary(config.dataset.vocabulary)
    seen = vocabulary.select(vocabulary.seen_indices)
    clip = experiment.load_clip_of(config, workdir)
    text_cd = experiment.embed_names(clip, seen.names, config.clip.grouper_prompts)
    model = experiment.build_model(config, clip.config.embed_dim)
    source = experiment.open_split(config, workdir, "train")

    def init(key: jax.Array) -> Variables:
        side = config.input.crop_size
        variables = jax.jit(model.init)(key, jnp.zeros((1, side, side, 3)), jnp.asarray(text_cd))
        if config.model.start_from:
            start = experiment.resolve(config.model.start_from, workdir)
            return hand_over(variables, experiment.load_variables(start), start)
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
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    is_grouper = config.model.kind == "zegformer"
    loss = grouper_loss(model, config.loss) if is_grouper else pixel_loss(model)
    return Task(init, loss, jnp.asarray(text_cd), batches)


def hand_over(variables: Variables, start: Variables, source: Path) -> Variables:
    """Replaces the backbone, and the pixel decoder if there is one, by those of another model.

    Raises:
        ValueError: the other model has no backbone, or its parameters have other names or shapes.
    """
    if "backbone" not in start["params"]:
        raise ValueError(f"{source}: its model has no backbone to start from (model.start_from)")
    merged = {name: dict(tree) for name, tree in variables.items()}
    for collection, tree in merged.items():
        for part in STARTED_PARTS:
            new = start.get(collection, {}).get(part)
            if part not in tree or new is None:
                continue
            if jax.tree.map(np.shape, new) != jax.tree.map(np.shape, tree[part]):
                raise ValueError(f"{source}: its {part} has other sizes than model.{part}")
            tree[part] = new
    return merged
