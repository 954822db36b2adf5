"""The sections of a config as typed values; each field is explained in `configs/base.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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


def read_section(kind: type, section: Mapping[str, Any]) -> Any:
    """Returns a section of a config as a value of its dataclass; lists become tuples.

    Raises:
        UserError: The section's fields are not those of the dataclass.
    """
    values = {name: _plain(section[name]) for name in section}
    fields = {field.name for field in dataclasses.fields(kind)}
    differing = sorted(fields ^ values.keys())
    if differing:
        verb = "lacks" if differing[0] in fields else "has an unknown"
        raise UserError(
            f"{kind.__name__}: the config {verb} field '{differing[0]}'; configs/base.py has "
            "every field, and a workdir's own config is of the code that wrote it"
        )
    return kind(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value.to_dict() if hasattr(value, "to_dict") else value
