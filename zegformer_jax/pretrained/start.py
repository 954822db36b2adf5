"""Weights that a training starts from: pretrained backbones and checkpoints."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from zegformer_jax.pretrained import backbones
from zegformer_jax.pretrained.clip.sources import FILE_SUFFIXES, HUB_NAME
from zegformer_jax.pretrained.formats import read_tensors
from zegformer_jax.pretrained.tables import Summary, Tensors, unflatten
from zegformer_jax.pretrained.zegformer import from_checkpoint
from zegformer_jax.runtime.environment import PROGRAM
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.runtime.fetch import SCHEMES, fetch

HEADS = "sem_seg_head."  # begins a name in a checkpoint of a whole model
# detectron2's model zoo: what its names begin with, and where their files are.
DETECTRON2 = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # of timm's repositories


class Start(NamedTuple):
    """Variables to start from.

    Attributes:
        kind: Of the model that they come from: zegformer, per_pixel or backbone.
        sizes: Of that model; a backbone's own, with its `name`.
        variables: `params` and, with frozen norms, `constants`, float32.
        summary: What became of every published tensor.
    """

    kind: str
    sizes: dict[str, Any]
    variables: dict[str, Any]
    summary: Summary


def locate(source: str, path: Path, progress: bool = True) -> Path:
    """Returns the path of weights; published ones are fetched once, into the cache.

    Args:
        source: An address (`https://...`), a file in detectron2's model zoo (`detectron2://...`),
            a path, or a name on the Hub (`timm/resnet101.tv_in1k`).
        path: The path that the source is, if it is one.
        progress: Shows the progress of a download.

    Raises:
        MissingFile: It does not exist, or cannot be fetched.
        UserError: The fetched file is not what the address says, or the address is of another kind.
    """
    if source.startswith(DETECTRON2[0]):
        source = source.replace(*DETECTRON2, 1)
    if source.startswith(SCHEMES):
        return fetch(source, progress)
    if "://" in source:
        raise UserError(
            f"{source}: weights are read from a path, {', '.join(SCHEMES)}, {DETECTRON2[0]} or the "
            "Hub: copy them to this machine"
        )
    if path.exists():
        return path
    if HUB_NAME.fullmatch(source) and path.suffix not in (*FILE_SUFFIXES, ".pkl"):
        return _from_hub(source)
    raise MissingFile(
        f"{path}: no such file or workdir; name one that exists (model.start_from), or let "
        f"{PROGRAM} demo train the built-in models in runs/openmoji"
    )


def _from_hub(name: str) -> Path:
    """Returns a repository's weights from the Hub's cache, else downloads them into it."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for file in HUB_FILES:
        if isinstance(cached := try_to_load_from_cache(name, file), str):
            return Path(cached)
    try:
        for file in HUB_FILES:
            with contextlib.suppress(RemoteEntryNotFoundError):
                return Path(hf_hub_download(name, file))
        reason = f"it has no {' and no '.join(HUB_FILES)}"
    except Exception as error:  # the Hub's errors have many types and span many lines
        first_line = str(error).partition("\n")[0]
        reason = f"{type(error).__name__}: {first_line}"
    raise MissingFile(
        f"{name}: no file or workdir here, and not available from the Hugging Face Hub ({reason}): "
        f"get its {HUB_FILES[0]} on another machine, and name that file"
    )


def is_checkpoint(tensors: Tensors) -> bool:
    """Returns whether tensors are a whole model in detectron2's layout."""
    return any(name.startswith(HEADS) for name in tensors)


def read_start(path: str | Path) -> Start:
    """Reads a file of published weights.

    Args:
        path: The authors' or MaskFormer's checkpoint, or a backbone: detectron2's `.pkl`,
            torchvision's or timm's ResNet, a Swin of Microsoft's or timm's.

    Raises:
        MissingFile: There is no such file.
        UserError: It is none of these, or a tensor is missing, unknown or of another shape.
    """
    tensors = read_tensors(path)
    if not is_checkpoint(tensors):
        return read_backbone(tensors, str(path))
    checkpoint = from_checkpoint(tensors, str(path))
    sizes = dict(checkpoint.sizes)
    return Start(sizes["kind"], sizes, checkpoint.variables, checkpoint.summary)


def read_backbone(tensors: Tensors, where: str) -> Start:
    """Reads a backbone from all the tensors of a file; `where` is its name, for messages.

    Raises:
        UserError: It is no known backbone, or a tensor is missing, unknown or of another shape.
    """
    backbone = backbones.read(tensors, where)
    return Start("backbone", backbone.sizes, unflatten(backbone.arrays), backbone.summary)
