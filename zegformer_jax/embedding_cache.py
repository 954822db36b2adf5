"""Text embeddings kept on disk, so that a vocabulary is embedded once for each CLIP and prompts.

A file is named by a hash of everything that it follows from. Whatever is wrong with the folder or a
file costs time, and never a result.
"""

import dataclasses
import hashlib
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from zegformer_jax.models.clip.model import ClipConfig
from zegformer_jax.pretrained.tables import flatten
from zegformer_jax.runtime.files import write_bytes

VARIABLE = "ZEGFORMER_CACHE"
FOLDER = "embeddings"
RECIPE = 1  # to be raised when embeddings are computed in another way
DIGEST_BYTES = hashlib.sha256().digest_size
TEXT_FIELDS = ("vocab_size", "context_length", "embed_dim", "activation", "eos_token_id")
_warned: list[Exception] = []


def cache_folder(environment: Mapping[str, str] = os.environ) -> epath.Path:
    """Where embeddings are kept.

    In $ZEGFORMER_CACHE, else in $XDG_CACHE_HOME/zegformer_jax, else in ~/.cache/zegformer_jax.

    Raises:
        RuntimeError: none is set, and the user has no home.
    """
    if environment.get(VARIABLE):
        return epath.Path(environment[VARIABLE]) / FOLDER
    caches = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return epath.Path(caches) / "zegformer_jax" / FOLDER


def tower_digest(config: ClipConfig, text_params: Mapping[str, Any]) -> str:
    """Stands for a CLIP's text tower: its sizes and the bits of its parameters.

    Args:
        config: of the CLIP; what concerns images alone does not count.
        text_params: the tower's parameters.
    """
    fields = dataclasses.asdict(config).items()
    sizes = [(k, v) for k, v in fields if k.startswith("text_") or k in TEXT_FIELDS]
    digest = hashlib.sha256(repr(sizes).encode())
    for path, array in sorted(flatten(text_params).items()):
        array = np.asarray(array)
        digest.update(repr((path, array.dtype.str, array.shape)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def embedding_key(tower: str, tokens: Sequence[np.ndarray]) -> str:
    """Stands for a vocabulary's embeddings.

    Args:
        tower: see `tower_digest`.
        tokens: of each class, token ids int32 [N, T]: they hold names, prompts and tokenizer.
    """
    # Devices multiply float32 each in its own precision.
    device = (jax.default_backend(), jax.config.jax_default_matmul_precision)
    digest = hashlib.sha256(repr((RECIPE, tower, device)).encode())
    for array in tokens:
        digest.update(repr((array.dtype.str, array.shape)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def load_or_compute(
    key: str, shape: tuple[int, int], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """Reads embeddings from the cache, or computes them and writes them there.

    Args:
        key: see `embedding_key`.
        shape: of the embeddings, [C, D].
        compute: gives them, float32 [C, D].
    """
    try:
        path = cache_folder() / f"{key}.npy"
        kept = _read(path, shape)
    except Exception as error:  # whatever a file system, or a bucket's client, has to say
        _warn_once(error)
        return compute()
    if kept is not None:
        return kept
    embeddings_cd = compute()
    try:
        write_bytes(path, _to_bytes(embeddings_cd))
    except Exception as error:  # likewise
        _warn_once(error)
    return embeddings_cd


def _to_bytes(embeddings_cd: np.ndarray) -> bytes:
    """A .npy file with a checksum after its end, where `np.load` does not look."""
    file = io.BytesIO()
    np.save(file, embeddings_cd)
    return file.getvalue() + hashlib.sha256(file.getvalue()).digest()


def _read(path: epath.Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Reads embeddings; None where there are none, or others than were written."""
    if not path.exists():
        return None
    data = path.read_bytes()
    content, checksum = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        return None
    embeddings_cd = np.load(io.BytesIO(content), allow_pickle=False)
    fits = embeddings_cd.shape == shape and embeddings_cd.dtype == np.float32
    return embeddings_cd if fits else None


def _warn_once(error: Exception) -> None:
    """Says in a line why nothing is kept, the first time."""
    if not _warned:
        text = " ".join(str(error).split())
        logging.getLogger(__name__).warning(
            f"text embeddings are not kept: {text}: name another folder, {VARIABLE}=DIR"
        )
    _warned.append(error)
