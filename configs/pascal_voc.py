"""PASCAL VOC 2012 with SBD, 15 seen and 5 unseen classes.

`configs/pascal_voc.py:r101` is the published model, `r50,30k` trains three times as long, which
the authors found more stable; `per_pixel` is the baseline.
"""

from ml_collections import ConfigDict

from configs import base
from zegformer_jax.runtime.errors import UserError


def get_config(variant: str = "r101") -> ConfigDict:
    """Returns the config of a backbone's variant or `per_pixel`; `,30k` trains longer."""
    name, _, length = variant.partition(",")
    if length not in ("", "30k"):
        raise UserError(f"configs/pascal_voc.py:{variant}: after the comma comes 30k or nothing")
    config = base.get_config().unlock()
    base.set_variant(config, name, baseline_backbone="r101")
    config.clip.grouper_prompts = "single"
    config.dataset.update(name="pascal_voc", vocabulary="pascal_voc_20")
    config.train.steps = 30_000 if length else 10_000
    config.eval.vocabularies = ("pascal_voc_20",)
    return config.lock()
