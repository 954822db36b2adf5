"""The models and text embeddings of an experiment."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from zegformer_jax import models
from zegformer_jax.experiment.workdir import resolve, resolve_prompts
from zegformer_jax.models.backbones import backbone_fields
from zegformer_jax.models.clip.model import CLIP, ClipConfig
from zegformer_jax.pretrained.clip.load import load_clip
from zegformer_jax.pretrained.clip.sources import HUB_NAME
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text import embeddings
from zegformer_jax.text.prompts import load_templates
from zegformer_jax.text.tokenizer import Tokenizer
from zegformer_jax.text.word_vectors import load_word_vectors


def set_sizes(model: ConfigDict, sizes: Mapping[str, Any]) -> None:
    """Writes a checkpoint's sizes over a config's."""
    model.kind = sizes["kind"]
    model.backbone = backbone_fields(**sizes["backbone"])
    model.pixel_decoder.encoder_layers = 0
    model.pixel_decoder.update(sizes["pixel_decoder"])
    if "transformer" in sizes:
        model.transformer.update(sizes["transformer"])
        model.memory = sizes["memory"]


def compare_sizes(model: ConfigDict, sizes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which a checkpoint's sizes differ from a config's section `model`.

    Args:
        model: The section `model` of the config.
        sizes: The checkpoint's sizes, which have the names of the section's fields.

    Returns:
        The config's and the checkpoint's values by name, such as `model.transformer.queries`.
    """
    changed = ConfigDict(model.to_dict())
    set_sizes(changed, sizes)
    ours, theirs = (traverse_util.flatten_dict(x.to_dict(), sep=".") for x in (model, changed))
    return {
        f"model.{name}": (ours[name], theirs[name])
        for name in theirs
        if _as_tuple(ours[name]) != _as_tuple(theirs[name])
    }


def attention_heads(model: ConfigDict) -> int:
    """Returns the number of attention heads, which cannot be inferred from a checkpoint."""
    if model.kind == "per_pixel":
        return model.pixel_decoder.encoder_heads
    return model.transformer.heads


def has_frozen_norms(model: ConfigDict) -> bool:
    """Returns True if the section's backbone has norms that are not trained."""
    return model.kind != "clip" and model.backbone.get("norm") == "frozen_batch"  # Swins have none


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class LoadedClip:
    """A CLIP that is ready to encode.

    Attributes:
        config: Its sizes.
        params: Its parameters.
        tokenizer: Its tokenizer, from texts to token ids.
        source: Its folder or file, or its name on the Hub.
    """

    config: ClipConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    source: str = ""

    def module(self, dtype: str = "float32") -> CLIP:
        """Returns the Flax module, which computes in `dtype`."""
        return CLIP(self.config, jnp.dtype(dtype))

    @functools.cached_property
    def text_digest(self) -> str:
        """Hash of the text tower's weights and sizes."""
        return embeddings.tower_digest(self.config, self.params["text"])

    def embed(self, names: tuple[str, ...], prompts: str) -> np.ndarray:
        """Returns text embeddings of class names with a prompt set, float32 [C, D] of unit length.

        They are computed once, and then read from the cache of `text.embeddings`.
        """
        tokens = embeddings.tokenize_classes(self.tokenizer, names, load_templates(prompts))
        return embeddings.load_or_compute(
            embeddings.embedding_key(self.text_digest, tokens),
            (len(names), self.config.embed_dim),
            lambda: self.embed_tokens(tokens),
        )

    def embed_tokens(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Embeds classes from their token ids, by `text.embeddings.embed_tokens`."""
        encode = jax.jit(
            lambda params, tokens: self.module().apply(
                {"params": params}, tokens, method=CLIP.encode_text
            )
        )
        return embeddings.embed_tokens(lambda tokens: encode(self.params, tokens), tokens)


def load_clip_of(config: ConfigDict, workdir: epath.PathLike) -> LoadedClip | None:
    """Reads the experiment's CLIP from a folder or the Hub; returns None if it uses no CLIP."""
    if not needs_clip(config):
        return None
    source = config.clip.source
    path = resolve(source, workdir)
    is_hub_name = HUB_NAME.fullmatch(source) and not path.exists()
    image_size = config.clip.input_size or None
    loaded = load_clip(source if is_hub_name else path, image_size)
    return LoadedClip(*loaded, f"{source} (Hugging Face Hub)" if is_hub_name else str(path))


def embed_classes(
    config: ConfigDict,
    workdir: epath.PathLike,
    clip: LoadedClip | None,
    names: tuple[str, ...],
    prompts: str = "",
) -> np.ndarray:
    """Returns the embeddings that the model compares its pixels or queries with.

    They are CLIP's text embeddings, or word vectors if the baseline's config names a file of them.

    Args:
        config: The experiment's config.
        workdir: Its workdir.
        clip: Its CLIP; None takes word vectors.
        names: C class names; commas separate synonyms.
        prompts: Prompt set; "" takes the training's.

    Returns:
        float32 [C, D], rows of unit length.

    Raises:
        UserError: Word vectors are asked for in another model than the baseline.
    """
    if config.model.word_vectors and config.model.kind != "per_pixel":
        raise UserError(
            f"model.word_vectors: for model.kind 'per_pixel', not '{config.model.kind}': that "
            "kind needs CLIP's text embeddings"
        )
    if clip is None:
        return load_word_vectors(resolve(config.model.word_vectors, workdir), names)
    return clip.embed(names, resolve_prompts(prompts or config.clip.grouper_prompts, workdir))


def needs_clip(config: ConfigDict) -> bool:
    """Returns False for the per-pixel baseline on word vectors, else True."""
    return config.model.kind != "per_pixel" or not config.model.word_vectors


def build_model(
    config: ConfigDict, embed_dim: int, dtype: str | None = None
) -> models.Grouper | models.PerPixel:
    """Makes the experiment's model.

    Args:
        config: The experiment's config.
        embed_dim: Size of the text embeddings.
        dtype: Compute dtype; None takes the training's.
    """
    return models.build(
        config.model.kind,
        config.model.to_dict(),
        embed_dim,
        dtype or config.dtype,
        remat=config.train.remat,
    )
