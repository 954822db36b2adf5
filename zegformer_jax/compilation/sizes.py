"""Experiments whose arrays are known by their shapes alone."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from zegformer_jax.experiment import Experiment, LoadedClip
from zegformer_jax.models.clip.model import CLIP, ClipConfig
from zegformer_jax.pretrained.clip.sources import HUB_NAME

# The `config.json` of these repositories on the Hub.
PUBLISHED = {
    "openai/clip-vit-base-patch16": ClipConfig(),
    "openai/clip-vit-base-patch32": ClipConfig(patch_size=32),
    "openai/clip-vit-large-patch14": ClipConfig(
        patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16,
        text_width=768, text_heads=12, embed_dim=768,
    ),
}  # fmt: skip


class SizedClip(LoadedClip):
    """A CLIP of which only the sizes are known; it embeds every text as zeros."""

    def embed(self, names: tuple[str, ...], prompts: str) -> np.ndarray:
        """Returns zeros, float32 [C, D]."""
        return np.zeros((len(names), self.config.embed_dim), np.float32)


def without_weights(experiment: Experiment) -> Experiment:
    """Returns the experiment with a CLIP of shapes alone.

    A CLIP that is neither in `PUBLISHED` nor trained by the experiment's own workdir is read for
    its sizes.
    """
    if not experiment.uses_clip:
        return experiment
    settings = experiment.clip_settings
    if settings.source in PUBLISHED:
        config = PUBLISHED[settings.source]
    elif HUB_NAME.fullmatch(settings.source) or experiment.resolve(settings.source).exists():
        config = experiment.clip.config
    else:
        config = settings.trained_here()
    config = dataclasses.replace(config, image_size=settings.input_size or config.image_size)
    images_bhwc = jnp.zeros((1, config.image_size, config.image_size, 3))
    tokens_bl = jnp.zeros((1, config.context_length), jnp.int32)
    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0), images_bhwc, tokens_bl)
    experiment = copy.copy(experiment)
    experiment.clip = SizedClip(config, shapes["params"], tokenizer=None)
    return experiment
