"""ADE20K-Full, 572 seen and 275 unseen classes.

`configs/ade20k_full.py:r50` is the paper's model; the variants of the backbones select others;
`per_pixel` is the baseline on ResNet-50.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "r50") -> ConfigDict:
    """Returns the config of a model on one of the backbones, or of the baseline."""
    config = base.get_config().unlock()
    base.set_variant(config, variant, baseline_backbone="r50")
    config.dataset.update(name="ade20k_full", vocabulary="ade20k_full_847")
    config.train.steps = 60_000
    config.eval.update(vocabularies=("ade20k_full_847",), gamma=0.0)
    return config.lock()
