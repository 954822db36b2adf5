"""Text embeddings of class names, and their cache on disk.

The name of a cached file is a hash of everything that determines its embeddings. Faults of the
folder or of a file cost time, but never change a result.
"""

import dataclasses
import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from zegformer_jax.models.clip.model import ClipConfig
from zegformer_jax.runtime import environment
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.files import write_bytes
from zegformer_jax.text.prompts import class_prompts
from zegformer_jax.text.tokenizer import Tokenizer

BATCH_SIZE = 256  # texts that the tower encodes at once
LENGTH_STEP = 16  # lengths of token arrays are multiples of this, so that few shapes are compiled
ROW_STEP = 32  # rows of a short batch are padded to a multiple of this

CACHE_FOLDER = "embeddings"
RECIPE = 1  # increase it when embeddings are computed in another way
TEXT_FIELDS = ("vocab_size", "context_length", "embed_dim", "activation", "eos_token_id")
_warned: list[Exception] = []


def tokenize_classes(
    tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str]
) -> list[np.ndarray]:
    """Returns the token ids of each class: all its synonyms in all templates.

    Args:
        tokenizer: Converts texts to token ids.
        names: C class names; "sofa, couch" is two synonyms.
        templates: Prompts with `{}` where a synonym goes.

    Returns:
        C arrays, int32 [N, T].

    Raises:
        UserError: A class has no name or a text is too long; the message names the class.
    """
    prompts = [class_prompts(name, templates) for name in names]
    return [_class_tokens(tokenizer, *x) for x in zip(names, prompts, strict=True)]


def embed_tokens(
    encode_text: Callable[[np.ndarray], np.ndarray],
    tokens: Sequence[np.ndarray],
    batch_size: int = BATCH_SIZE,
) -> np.ndarray:
    """Embeds classes: the normalised mean of a class's normalised text features.

    The source is CLIP (Radford et al. 2021), section 3.1.4.

    Args:
        encode_text: Maps token ids int32 [N, T], T <= context length, to features [N, D].
        tokens: Each class's token ids, from `tokenize_classes`.
        batch_size: The largest N; a short batch is padded to a multiple of 32.

    Returns:
        float32 [C, D], rows of length 1.
    """
    features = _encode_in_batches(encode_text, np.concatenate(tokens), batch_size)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    ends = np.cumsum([len(group) for group in tokens])
    means = np.stack([group.mean(axis=0) for group in np.split(features, ends[:-1])])
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def cache_folder() -> epath.Path:
    """Returns the folder of the cache, which need not exist.

    Raises:
        RuntimeError: No environment variable names it, and the user has no home.
    """
    return epath.Path(environment.cache_folder()) / CACHE_FOLDER


def tower_digest(config: ClipConfig, text_params: Mapping[str, Any]) -> str:
    """Returns a hash of the text tower's sizes and weights.

    Args:
        config: Sizes of the CLIP; the image tower's are ignored.
        text_params: The text tower's parameters.
    """
    fields = dataclasses.asdict(config).items()
    sizes = [(k, v) for k, v in fields if k.startswith("text_") or k in TEXT_FIELDS]
    weights = dict(sorted(traverse_util.flatten_dict(text_params, sep="/").items()))
    return _digest((sizes, list(weights)), weights.values())


def embedding_key(tower: str, tokens: Sequence[np.ndarray]) -> str:
    """Returns a hash of everything that determines text embeddings.

    Args:
        tower: The text tower's hash, from `tower_digest`.
        tokens: Each class's token ids, from `tokenize_classes`; they include the effect of names,
            prompts and tokenizer.
    """
    # Devices differ in the precision of float32 products.
    device = (jax.default_backend(), jax.config.jax_default_matmul_precision)
    return _digest((RECIPE, tower, device), tokens)


def load_or_compute(
    key: str, shape: tuple[int, int], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """Reads embeddings from the cache, or computes them and writes them there.

    Args:
        key: The embeddings' hash, from `embedding_key`.
        shape: Shape of the embeddings, [C, D].
        compute: Computes the embeddings, float32 [C, D].
    """
    try:
        path = cache_folder() / f"{key}.npz"
        cached_cd = _read(path, shape)
    except Exception as error:  # file systems and buckets' clients raise many types
        _warn_once(error)
        return compute()
    if cached_cd is not None:
        return cached_cd
    embeddings_cd = compute()
    try:
        content = io.BytesIO()
        np.savez(content, embeddings=embeddings_cd)  # npz has a check sum
        write_bytes(path, content.getvalue())
    except Exception as error:  # file systems and buckets' clients raise many types
        _warn_once(error)
    return embeddings_cd


def _class_tokens(tokenizer: Tokenizer, name: str, prompts: list[str]) -> np.ndarray:
    try:
        return tokenizer(prompts)
    except ValueError as error:
        raise UserError(f"class '{name}': {error}") from error


def _encode_in_batches(
    encode_text: Callable[[np.ndarray], np.ndarray], tokens_nt: np.ndarray, batch_size: int
) -> np.ndarray:
    """Encodes rows of tokens in batches of one shape, without the padding that all rows share."""
    used = int(np.flatnonzero(tokens_nt.any(axis=0))[-1]) + 1
    tokens_nt = tokens_nt[:, : _round_up(used, LENGTH_STEP)]
    rows = min(batch_size, _round_up(len(tokens_nt), ROW_STEP))
    features = []
    for start in range(0, len(tokens_nt), rows):
        batch = tokens_nt[start : start + rows]
        filled = np.pad(batch, ((0, rows - len(batch)), (0, 0)))
        features.append(np.array(encode_text(filled), np.float32)[: len(batch)])
    return np.concatenate(features)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _digest(facts: Any, arrays: Iterable[Any]) -> str:
    digest = hashlib.sha256(repr(facts).encode())
    for array in map(np.asarray, arrays):
        digest.update(repr((array.dtype.str, array.shape)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read(path: epath.Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Reads embeddings; returns None if the file is missing or damaged."""
    if not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as arrays:
            embeddings_cd = arrays["embeddings"]
        fits = (embeddings_cd.shape, embeddings_cd.dtype) == (shape, np.float32)
    except Exception:  # a damaged header can raise anything
        return None
    return embeddings_cd if fits else None


def _warn_once(error: Exception) -> None:
    """Logs once per process why nothing is cached."""
    if not _warned:
        text = " ".join(str(error).split())
        logging.getLogger(__name__).warning(
            f"text embeddings are not cached: {text}: "
            f"set another folder, {environment.CACHE_VARIABLE}=DIR"
        )
    _warned.append(error)
