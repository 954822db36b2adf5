"""Your own images and label maps in a folder, see docs/datasets.md.

`configs/folder.py:tiny` trains in minutes on a laptop, from the models that `./run.sh demo` trains
in `runs/openmoji`: their CLIP knows drawings and few words. `r50`, `swin_b` and the other backbones
start from ImageNet and use the published CLIP, on a GPU or TPU; `per_pixel` is the baseline on
ResNet-50. The folder is `mine`, unless `--config.dataset.directory` names another.
"""

from ml_collections import ConfigDict

from configs import base, openmoji
from zegformer_jax.models.backbones import backbone_variants
from zegformer_jax.runtime.errors import UserError

BUILT_IN = "runs/openmoji"  # workdir of the demo
SIDE = 128  # pixels of a training crop of `tiny`, which has seen scenes of 96


def get_config(variant: str = "tiny") -> ConfigDict:
    """Returns the config of a small model, of one on a published backbone, or of the baseline."""
    names = ("tiny", "per_pixel", *backbone_variants())
    if variant not in names:
        raise UserError(f"configs/folder.py:{variant}: choose {', '.join(names)}")
    config = _tiny() if variant == "tiny" else _published(variant)
    config.dataset.update(name="folder", directory="mine", vocabulary="")
    return config.lock()


def _tiny() -> ConfigDict:
    config = openmoji.get_config().unlock()
    config.model.start_from = BUILT_IN
    config.clip.source = f"{BUILT_IN}/clip"
    config.dataset.options = ConfigDict()
    config.input.update(
        crop_size=SIDE,
        short_sides=tuple(int(SIDE * s / 10 + 0.5) for s in range(7, 16)),
        max_long_side=4 * SIDE,
    )
    config.loss.max_targets = 0
    config.optimiser.warmup_steps = 50
    config.train.update(steps=600, checkpoint_every=200)
    config.eval.update(vocabularies=(), short_side=SIDE, max_long_side=4 * SIDE)
    return config


def _published(variant: str) -> ConfigDict:
    config = base.get_config().unlock()
    base.set_variant(config, variant, baseline_backbone="r50")
    config.input.batch_size = 8  # of one accelerator
    config.train.steps = 5000
    return config
