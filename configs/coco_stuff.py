"""COCO-Stuff, 156 seen and 15 unseen classes.

`configs/coco_stuff.py:r101` is the published model; `r50`, `swin_t`, `swin_s`, `swin_b`, `swin_l`
are other backbones; `per_pixel` is the baseline on ResNet-101. `r101,supervised`, and the same
with other backbones, trains on all 171 classes: the paper evaluates it on other data sets.
"""

from ml_collections import ConfigDict

from configs import base
from zegformer_jax.runtime.errors import UserError

SIDE = 640  # pixels of a training crop


def get_config(variant: str = "r101") -> ConfigDict:
    """Returns the config of a model on one of the backbones, or of the baseline."""
    name, _, labels = variant.partition(",")
    if labels not in ("", "supervised"):
        raise UserError(
            f"configs/coco_stuff.py:{variant}: after the comma comes supervised or nothing"
        )
    config = base.get_config().unlock()
    base.set_variant(config, name, baseline_backbone="r101")
    config.dataset.all_seen = bool(labels)
    config.dtype = "bfloat16"
    config.dataset.update(name="coco_stuff", vocabulary="coco_stuff_171")
    config.input.update(
        crop_size=SIDE,
        short_sides=tuple(int(SIDE * s / 10 + 0.5) for s in range(5, 16)),
        max_long_side=4 * SIDE,
    )
    config.train.steps = 60_000
    config.eval.update(
        vocabularies=("coco_stuff_171",),
        short_side=SIDE,
        max_long_side=4 * SIDE,
    )
    if variant == "r101":
        # The published evaluation's prompts differ from the training's; kept for its figures.
        config.eval.grouper_prompts = "single"
    return config.lock()
