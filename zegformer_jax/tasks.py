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
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.starts import read_start

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
        logits = model.apply(
            {"params": params, "constants": constants},
            normalise_images(batch["image"]),
            text_cd,
            deterministic=False,
            rngs={"dropout": key},
        )
        total, count = losses.per_pixel_loss(logits, batch["label"])
        loss = total / jnp.maximum(count, 1)
        return loss, {"loss": loss}

    return loss


def segmentation_task(config: ConfigDict, workdir: Path) -> Task:
    """Trains the grouper or the per-pixel baseline on the seen classes of a data set."""
    from zegformer_jax.input import pipeline

    vocabulary = experiment.dataset_vocabulary(config, workdir)
    seen = vocabulary.select(vocabulary.seen_indices)
    clip = experiment.load_clip_of(config, workdir)
    text_cd = experiment.embed_classes(config, workdir, clip, seen.names)
    model = experiment.build_model(config, text_cd.shape[1])
    source = experiment.open_split(config, workdir, "train")

    def init(key: jax.Array) -> Variables:
        side = config.input.crop_size
        variables = jax.jit(model.init)(key, jnp.zeros((1, side, side, 3)), jnp.asarray(text_cd))
        if config.model.start_from:
            path = experiment.resolve(config.model.start_from, workdir)
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
    loss = grouper_loss(model, config.loss) if is_grouper else pixel_loss(model)
    return Task(init, loss, jnp.asarray(text_cd), batches)


def load_start(path: Path) -> tuple[str, Variables]:
    """Reads what a training starts from: the kind of its model and its variables.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is neither a run's workdir nor a file of published weights.
    """
    if path.is_dir():
        return experiment.load_config(path).model.kind, experiment.load_variables(path)
    start = read_start(path)
    return start.kind, start.variables


def hand_over(variables: Variables, kind: str, start: Variables, start_kind: str) -> Variables:
    """Replaces what a model has in common with the one that it starts from.

    These are all parts of that name: the backbone, the pixel decoder, ...; but the projection to
    the text embeddings only between models of one kind.

    Args:
        variables: of the new model.
        kind: of the new model.
        start: of the other; parts and leaves may be missing.
        start_kind: of the other.

    Raises:
        ValueError: the other model has no backbone, or a shared array has another shape.
    """
    arrays, given = tables.flatten(variables), tables.flatten(start)
    if not any(path.startswith("params/backbone/") for path in given):
        raise ValueError("its model has no backbone to start from (model.start_from)")
    parts = set(variables["params"])
    for path, array in given.items():
        part = path.split("/")[1]
        if part not in parts or (part == "class_projection" and kind != start_kind):
            continue
        if path not in arrays or arrays[path].shape != np.shape(array):
            wanted = list(arrays[path].shape) if path in arrays else "nothing of that name"
            raise ValueError(
                f"its {path} is {list(np.shape(array))}, this model has {wanted}: the sizes "
                f"under model.{part} differ (model.start_from)"
            )
        arrays[path] = np.asarray(array)
    return tables.unflatten(arrays)
