"""The sections of a config as typed values; each field is explained in `configs/base.py`."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from zegformer_jax.input.settings import InputSettings
from zegformer_jax.models import PARTS
from zegformer_jax.models.backbones import NOT_FIELDS, find_backbone
from zegformer_jax.models.clip.model import ClipConfig
from zegformer_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """The section `clip`: source and prompts of the CLIP, and sizes of one that is trained here."""

    source: str
    input_size: int
    grouper_prompts: str
    classifier_prompts: str
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    vocab_size: int
    context_length: int
    embed_dim: int
    initial_logit_scale: float

    def trained_here(self, **sizes: Any) -> ClipConfig:
        """Returns the sizes of a CLIP that is trained here.

        Args:
            **sizes: Fields of `ClipConfig` that replace the section's.
        """
        known = {field.name for field in dataclasses.fields(ClipConfig)}
        own = {name: value for name, value in vars(self).items() if name in known}
        return ClipConfig(**own | sizes)


@dataclasses.dataclass(frozen=True)
class DatasetSettings:
    """The section `dataset`."""

    name: str
    directory: str
    vocabulary: str
    all_seen: bool
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The section `loss`."""

    class_weight: float
    mask_weight: float
    dice_weight: float
    no_object_weight: float
    max_targets: int


@dataclasses.dataclass(frozen=True)
class OptimiserSettings:
    """The section `optimiser`."""

    learning_rate: float
    weight_decay: float
    clip_norm: float
    power: float
    warmup_steps: int
    groups: tuple[tuple[str, Mapping[str, float]], ...]


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The section `train`."""

    steps: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    validate_every: int
    accumulate: int
    remat: bool
    ema: float
    most_skipped: int
    tensorboard: bool


@dataclasses.dataclass(frozen=True)
class ShardingSettings:
    """The section `sharding`."""

    params: str
    model: int


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """The section `eval`."""

    vocabularies: tuple[str, ...]
    checkpoint: str
    dtype: str
    batch_size: int
    short_side: int
    max_long_side: int
    tile: int
    more_short_sides: tuple[int, ...]
    flip: bool
    grouper_prompts: str
    scores: str
    ensemble_weight: float
    segment_classifier: str
    crop_style: str
    one_pass_layers: int
    resize: str
    gamma: float
    sweep_gamma: str
    clip_chunk: int
    methods: tuple[str, ...]
    oracles: bool
    skip_below: float
    top_segments: int


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The section `model`."""

    kind: str
    backbone: Mapping[str, Any]
    pixel_decoder: Mapping[str, Any]
    memory: str
    transformer: Mapping[str, Any]
    start_from: str
    word_vectors: str


SECTIONS = {
    "clip": ClipSettings,
    "dataset": DatasetSettings,
    "input": InputSettings,
    "loss": LossSettings,
    "optimiser": OptimiserSettings,
    "train": TrainSettings,
    "sharding": ShardingSettings,
    "eval": EvalSettings,
}
SHARED = {"seed": int, "dtype": str}  # fields outside the sections


def read_section(kind: type, section: Mapping[str, Any]) -> Any:
    """Returns a section of a config as a value of its dataclass; lists become tuples.

    Raises:
        UserError: The section's fields are not those of the dataclass, or have other types.
    """
    values = _checked(kind.__name__, section, typing.get_type_hints(kind))
    return kind(**values)


def check(config: ConfigDict) -> None:
    """Checks that a config has all sections, and that each has all fields in their types.

    Raises:
        UserError: A field is missing, unknown or of another type; it is named.
    """
    for name, kind in SECTIONS.items():
        read_section(kind, config[name])
    _checked("config", {x: config[x] for x in SHARED}, SHARED)
    model = read_section(ModelSettings, config.model)
    modules = PARTS | {"backbone": find_backbone(model.backbone.get("name")).module}
    for name, module in modules.items():
        hints = typing.get_type_hints(module)
        fields = {x.name for x in dataclasses.fields(module)}.difference(NOT_FIELDS)
        fields |= {"name"} if name == "backbone" else set()
        _checked(f"model.{name}", getattr(model, name), {x: hints[x] for x in fields})


def _checked(where: str, section: Any, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a section's plain values, if they are those of the annotated fields."""
    if not isinstance(section, Mapping | ConfigDict):
        raise UserError(f"{where}: expected fields, got {section!r}")
    values = {name: _plain(section[name]) for name in section}
    differing = sorted(hints.keys() ^ values.keys())
    if differing:
        verb = "lacks" if differing[0] in hints else "has an unknown"
        raise UserError(
            f"{where}: the config {verb} field '{differing[0]}'; configs/base.py has "
            "every field, and a workdir's own config is of the code that wrote it"
        )
    for name, hint in hints.items():
        if not _fits(values[name], hint):
            shown = hint.__name__ if isinstance(hint, type) else hint
            raise UserError(f"{where}: {name} is {values[name]!r}; its type is {shown}")
    return values


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value has an annotated type; a whole number is a float, too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin in (tuple, Sequence):
        if not isinstance(value, tuple):
            return False
        if origin is Sequence or arguments[-1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, int) and hint is float:
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, origin or hint)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value.to_dict() if hasattr(value, "to_dict") else value
