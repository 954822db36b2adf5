"""Objective of a small CLIP on images and captions."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from zegformer_jax.experiment.workdir import resolve
from zegformer_jax.models.clip.model import CLIP, CLIP_MEAN, CLIP_STD, ClipConfig
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.pretrained.clip.load import save_clip
from zegformer_jax.text.prompts import load_templates
from zegformer_jax.text.tokenizer import train_tokenizer
from zegformer_jax.training import losses
from zegformer_jax.training.objective import Task, Variables

MAX_LOGIT_SCALE = 100.0  # CLIP, section 2.5
LENGTH_STEP = 8  # token arrays are cut to a multiple of this


def clip_task(config: ConfigDict, workdir: epath.PathLike) -> Task:
    """Trains a small CLIP on pictures and captions of every class, never on scenes or masks."""
    from zegformer_jax.input.openmoji.pairs import contrastive_batches
    from zegformer_jax.input.openmoji.rasters import load_pictures

    prompts = (config.clip.grouper_prompts, config.clip.classifier_prompts)
    templates = tuple(dict.fromkeys(t for name in prompts for t in load_templates(name)))
    pictures = load_pictures(resolve(config.dataset.directory, workdir))
    names = [*pictures.vocabulary.names, *pictures.titles]
    captions = [template.format(name) for name in names for template in templates]
    tokenizer = train_tokenizer(captions, config.clip.vocab_size, config.clip.context_length)
    # Attention is causal: padding beyond the longest caption changes nothing but the time.
    used = -(-int((tokenizer(captions) != 0).sum(1).max()) // LENGTH_STEP) * LENGTH_STEP
    fields = config.clip.to_dict()
    sizes = {name: fields[name] for name in ClipConfig.__dataclass_fields__ if name in fields}
    sizes |= {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.end_id}
    model = CLIP(ClipConfig(**sizes))

    def init(key: jax.Array) -> Variables:
        side, length = config.clip.image_size, config.clip.context_length
        tokens = jnp.zeros((1, length), jnp.int32)
        variables = jax.jit(model.init)(key, jnp.zeros((1, side, side, 3)), tokens)
        scale = jnp.log(jnp.float32(config.clip.initial_logit_scale))
        return {"params": variables["params"] | {"logit_scale": scale}}

    def loss(params, constants, context, batch, totals, key):
        del constants, context, totals, key
        images = normalise_images(batch["image"], None, CLIP_MEAN, CLIP_STD)
        image_bd, text_bd, scale = model.apply({"params": params}, images, batch["tokens"])
        scale = jnp.minimum(scale, MAX_LOGIT_SCALE)
        loss = losses.contrastive_loss(image_bd, text_bd, scale, batch["picture_class"])
        return loss, {"loss": loss, "logit_scale": scale}

    def batches(start_step: int) -> Iterator[dict[str, np.ndarray]]:
        for batch in contrastive_batches(
            pictures,
            vocabulary=pictures.vocabulary,
            templates=templates,
            batch_size=config.input.batch_size,
            image_size=config.clip.image_size,
            seed=config.seed,
            start_step=start_step,
            num_steps=config.train.steps - start_step,
        ):
            captions = batch.pop("caption")
            yield batch | {"tokens": tokenizer(list(captions))[:, :used]}

    def finish(params: Any) -> None:
        save_clip(workdir, model.config, params, tokenizer)

    return Task(init, loss, ("loss", "logit_scale"), None, batches, finish=finish)
