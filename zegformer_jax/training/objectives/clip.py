"""The objective of a small CLIP on images and captions."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zegformer_jax.experiment import Experiment
from zegformer_jax.models.clip.model import CLIP, CLIP_MEAN, CLIP_STD
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.pretrained.clip.load import save_clip
from zegformer_jax.text.prompts import load_templates
from zegformer_jax.text.tokenizer import train_tokenizer
from zegformer_jax.training import losses
from zegformer_jax.training.objective import Batch, Metrics, Objective, Variables

MAX_LOGIT_SCALE = 100.0  # CLIP, section 2.5
LENGTH_STEP = 8  # token arrays are cut to a multiple of this


class ClipObjective(Objective):
    """Trains a small CLIP on drawings and captions of every class, never on label maps."""

    metrics = ("loss", "logit_scale")

    def __init__(self, experiment: Experiment):
        """Reads the drawings, trains the tokenizer on their captions and builds the model."""
        from zegformer_jax.input.openmoji.rasters import load_pictures

        self.experiment, settings = experiment, experiment.clip_settings
        self._drawings = load_pictures(experiment.resolve(experiment.dataset.directory))
        names = map(
            experiment.resolve_prompts, (settings.grouper_prompts, settings.classifier_prompts)
        )
        self._templates = tuple(dict.fromkeys(t for name in names for t in load_templates(name)))
        names = [*self._drawings.vocabulary.names, *self._drawings.titles]
        captions = [template.format(name) for name in names for template in self._templates]
        self._tokenizer = train_tokenizer(captions, settings.vocab_size, settings.context_length)
        self._length = self._used_length(captions)
        tokenizer = self._tokenizer
        sizes = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.end_id}
        self.model = CLIP(settings.trained_here(**sizes))

    def _used_length(self, captions: Sequence[str]) -> int:
        """Returns the number of tokens of the longest caption, rounded up.

        Attention is causal, so that padding beyond it would only cost time.
        """
        longest = int((self._tokenizer(captions) != 0).sum(1).max())
        return -(-longest // LENGTH_STEP) * LENGTH_STEP

    def init(self, key: jax.Array) -> Variables:
        """Returns the variables of a new CLIP."""
        settings = self.experiment.clip_settings
        images_bhwc = jnp.zeros((1, settings.image_size, settings.image_size, 3))
        tokens_bl = jnp.zeros((1, settings.context_length), jnp.int32)
        params = self.model.init(key, images_bhwc, tokens_bl)["params"]
        scale = jnp.log(jnp.float32(settings.initial_logit_scale))
        return {"params": params | {"logit_scale": scale}}

    def loss(
        self, params: Any, constants: Any, batch: Batch, totals: None, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns the contrastive loss of a batch {image, tokens, picture_class}."""
        images_bhwc = normalise_images(batch["image"], None, CLIP_MEAN, CLIP_STD)
        image_bd, text_bd, scale = self.model.apply(
            {"params": params}, images_bhwc, batch["tokens"]
        )
        scale = jnp.minimum(scale, MAX_LOGIT_SCALE)
        loss = losses.contrastive_loss(image_bd, text_bd, scale, batch["picture_class"])
        return loss, {"loss": loss, "logit_scale": scale}

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields drawings, the tokens of their captions, and their classes."""
        from zegformer_jax.input.openmoji.pairs import contrastive_batches

        for batch in contrastive_batches(
            self._drawings,
            vocabulary=self._drawings.vocabulary,
            templates=self._templates,
            batch_size=self.experiment.input.batch_size,
            image_size=self.experiment.clip_settings.image_size,
            seed=self.experiment.seed,
            start_step=start_step,
            num_steps=self.experiment.train.steps - start_step,
        ):
            captions = batch.pop("caption")
            yield batch | {"tokens": self._tokenizer(list(captions))[:, : self._length]}

    def facts(self) -> list[str]:
        """Returns a line on the drawings."""
        drawings, directory = len(self._drawings.codes), self.experiment.dataset_directory
        return [f"data: {drawings:,} drawings in {directory}"]

    def finish(self, params: Any) -> None:
        """Writes the CLIP as a Hugging Face folder into the workdir."""
        save_clip(self.experiment.workdir, self.model.config, params, self._tokenizer)
