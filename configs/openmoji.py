"""OpenMoji-VOC: the whole method on a laptop.

`configs/openmoji.py` trains the grouper and `:clip` the small CLIP that classifies its segments.
`:classifier` trains the initial backbone, in place of pretraining on ImageNet. `:per_pixel` trains
the baseline from this backbone; the grouper starts from its backbone and pixel decoder. `./run.sh`
trains CLIP, classifier, baseline and grouper in this order.
"""

from ml_collections import ConfigDict

from configs import base
from zegformer_jax.runtime.errors import UserError


def get_config(kind: str = "zegformer") -> ConfigDict:
    """Returns the config of one of the four trainings."""
    config = base.get_config().unlock()
    config.model.kind = kind
    # ResNet and FPN for scenes of 96 pixels: 2.6 million parameters with the transformer.
    config.model.backbone.update(
        blocks=(1, 1, 2, 1), stem_width=32, bottleneck_width=32, stage_width=64, norm="group",
        norm_groups=4,
    )  # fmt: skip
    config.model.pixel_decoder.update(width=64, mask_width=64, norm_groups=4)
    config.model.transformer.update(
        queries=16, width=128, layers=3, heads=4, mlp_width=256, dropout=0.0
    )
    # 12 x 12 pixels: res5 has 3 x 3 for up to five objects, too few to tell their names apart.
    config.model.memory = "res3"
    config.clip.update(source="clip", patch_size=12)
    config.dataset.name = config.dataset.vocabulary = "openmoji_voc"
    config.dataset.options = ConfigDict(
        {"train_scenes": 8000, "validation_scenes": 300, "side": 96, "seed": 0}
    )
    config.input.update(
        batch_size=8, crop_size=96, short_sides=(80, 88, 96, 104, 112, 120, 128), max_long_side=384
    )
    # With the published weights of 1 the masks of a short training are ragged, and its names rough.
    config.loss.update(class_weight=3.0, dice_weight=5.0, max_targets=5)
    config.optimiser.update(learning_rate=5e-4, clip_norm=0.1, warmup_steps=100)
    config.optimiser.groups = base.get_config().optimiser.groups[1:]  # the backbone trains fully
    config.train.update(steps=3500, log_every=25, checkpoint_every=875)
    config.eval.update(
        vocabularies=("pascal_voc_20", "openmoji_voc"),
        batch_size=10,
        short_side=96,
        max_long_side=384,
        clip_chunk=16,
    )
    if kind == "zegformer":
        config.model.start_from = "per_pixel"
    elif kind == "per_pixel":
        config.model.start_from = "../classifier"
        config.clip.source = "../clip"
        config.dataset.directory = "../records"
        config.train.steps = 300
        config.optimiser.learning_rate = 7e-4
    elif kind == "classifier":
        config.clip.source = "../clip"
        config.dataset.directory = "../records"
        config.input.batch_size = 32
        config.train.steps = 600
        config.optimiser.update(learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0)
    elif kind == "clip":
        config.dataset.directory = "../records"
        config.input.batch_size = 128
        config.train.steps = 900
        config.optimiser.update(learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0, power=1.0)
        # 100 is the final value of the released CLIPs: the grouper's fixed temperature expects
        # text embeddings that are as close to each other as theirs.
        config.clip.initial_logit_scale = 100.0
        config.optimiser.groups = (
            (".*(ln_|bias|embedding).*", {"weight_decay": 0.0}),
            ("logit_scale", {"weight_decay": 0.0, "learning_rate": 0.0}),
        )
    else:
        raise UserError(
            f"configs/openmoji.py:{kind}: choose clip, classifier, per_pixel or zegformer"
        )
    return config.lock()
