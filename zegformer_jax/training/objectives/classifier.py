"""Objective of a backbone that classifies single images of seen classes."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from zegformer_jax.experiment.models import build_model, embed_classes, load_clip_of
from zegformer_jax.experiment.workdir import resolve
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.training.objective import Task, Variables


def classifier_task(config: ConfigDict, workdir: epath.PathLike) -> Task:
    """Trains the backbone to name single pictures of the seen classes, as ImageNet would."""
    from zegformer_jax.input.openmoji.pairs import contrastive_batches
    from zegformer_jax.input.openmoji.rasters import load_pictures

    pictures = load_pictures(resolve(config.dataset.directory, workdir))
    vocabulary, side = pictures.vocabulary, config.clip.image_size
    seen = vocabulary.select(vocabulary.seen_indices)
    clip = load_clip_of(config, workdir)
    text_cd = embed_classes(config, workdir, clip, seen.names)
    model = build_model(config, text_cd.shape[1])

    def init(key: jax.Array) -> Variables:
        return jax.jit(model.init)(key, jnp.zeros((1, side, side, 3)), jnp.asarray(text_cd))

    def loss(params, constants, text_cd, batch, rows, key):
        logits_bc = model.apply(
            {"params": params, "constants": constants},
            normalise_images(batch["image"]),
            text_cd,
            deterministic=False,
            rngs={"dropout": key},
        )
        wanted_b = batch["picture_class"].astype(jnp.int32)
        loss_b = optax.softmax_cross_entropy_with_integer_labels(logits_bc, wanted_b)
        right_b = logits_bc.argmax(-1) == wanted_b
        return loss_b.sum() / rows, {"loss": loss_b.sum() / rows, "accuracy": right_b.sum() / rows}

    def batches(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        table = vocabulary.training_table()
        for batch in contrastive_batches(
            pictures,
            vocabulary=vocabulary,
            templates=("{}",),
            batch_size=config.input.batch_size,
            image_size=side,
            seed=config.seed,
            start_step=start_step,
            num_steps=config.train.steps - start_step,
            seen_only=True,
            masked_share=0.0,  # a backbone sees whole scenes
        ):
            yield {"image": batch["image"], "picture_class": table[batch["picture_class"]]}

    return Task(
        init,
        loss,
        ("loss", "accuracy"),
        jnp.asarray(text_cd),
        batches,
        totals=lambda context, batch: len(batch["image"]),
        adds_up=True,
    )
