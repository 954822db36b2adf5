"""Finds a CLIP's files: on this machine, or in a repository on the Hub."""

import re
from pathlib import Path

from zegformer_jax.pretrained.clip import configs
from zegformer_jax.runtime.environment import PROGRAM
from zegformer_jax.runtime.errors import MissingFile

HUB_NAME = re.compile(r"(?!runs/)[^./~][^/]*/[^/]+")  # owner/model; runs/... are workdirs
FLAX_WEIGHTS = "flax_model.msgpack"  # of transformers 4, in some of OpenAI's repositories
HUGGING_FACE_CONFIG = "config.json"
HUGGING_FACE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    FLAX_WEIGHTS,
    "pytorch_model.bin",
)
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
FILE_SUFFIXES = (".pt", ".pth", ".bin", ".npz", ".safetensors")
SMALL_FILES = ("*.json", "merges.txt")  # of a repository on the Hub


def locate(source: str | Path) -> Path:
    """Returns a CLIP's file or directory; a name on the Hub is downloaded into its cache.

    Args:
        source: A file, a directory or a name on the Hub; see `load_clip`.

    Raises:
        MissingFile: There is none, neither here nor on the Hub.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    is_name = isinstance(source, str) and HUB_NAME.fullmatch(source)
    if not is_name or path.suffix in FILE_SUFFIXES:
        raise MissingFile(
            f"{source}: no CLIP here: pass a Hugging Face or OpenCLIP directory, a file of "
            f"OpenAI's or a name on the Hub, or let {PROGRAM} demo train a small one in "
            "runs/openmoji/clip"
        )
    try:
        return _download(source)
    except Exception as error:  # the Hub's errors have many types and span many lines
        first_line = str(error).partition("\n")[0]
        raise MissingFile(
            f"{source}: neither a local directory nor available from the Hugging Face Hub "
            f"({type(error).__name__}: {first_line}); download its {HUGGING_FACE_CONFIG}, "
            f"{HUGGING_FACE_WEIGHTS[0]} and tokenizer.json (or {OPEN_CLIP_CONFIG} and "
            f"{OPEN_CLIP_WEIGHTS[0]}) on another machine into a folder, and pass that folder"
        ) from error


def _download(name: str) -> Path:
    """Downloads a repository's small files and its first readable format of weights.

    Files in the Hub's cache are not downloaded again. The formats are tried one after the other
    instead of listed, since the Hub's list is not available without a network.
    """
    from huggingface_hub import snapshot_download

    directory = Path(snapshot_download(name, allow_patterns=SMALL_FILES))
    weights = OPEN_CLIP_WEIGHTS
    if _model_type(directory) == "clip" or not (directory / OPEN_CLIP_CONFIG).is_file():
        weights = ("model*.safetensors", *HUGGING_FACE_WEIGHTS[2:], *OPEN_CLIP_WEIGHTS)
    for pattern in weights:
        if not any(directory.glob(pattern)):
            directory = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, pattern]))
        if any(directory.glob(pattern)):
            break
    return directory


def _model_type(directory: Path) -> str | None:
    path = directory / HUGGING_FACE_CONFIG
    return configs.read_fields(path).get("model_type") if path.is_file() else None


def is_open_clip(directory: Path) -> bool:
    """Returns True for OpenCLIP's directories, unless complete in Hugging Face's layout."""
    if not (directory / OPEN_CLIP_CONFIG).is_file():
        return False
    has_weights = any((directory / name).is_file() for name in HUGGING_FACE_WEIGHTS)
    return not (has_weights and _model_type(directory) == "clip")
