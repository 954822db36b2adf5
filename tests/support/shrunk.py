"""The experiment `configs/openmoji.py` shrunk: every part of it, in seconds. Also a config file."""

from pathlib import Path

from ml_collections import ConfigDict

from configs import openmoji

SIDE = 64
SHORT_SIDE = 48  # of scenes: square, wide and tall ones are padded to the same 64 x 64 pixels
TRAIN_SCENES, VALIDATION_SCENES = 16, 5
STEPS = {"clip": 2, "classifier": 2, "per_pixel": 2, "zegformer": 3}


def get_config(kind: str = "zegformer") -> ConfigDict:
    """Returns the config of one of the four trainings with tiny sizes and a few steps."""
    config = openmoji.get_config(kind).unlock()
    config.model.backbone.update(
        blocks=(1, 1, 1, 1), stem_width=8, bottleneck_width=8, stage_width=16, norm_groups=4
    )
    config.model.pixel_decoder.update(width=16, mask_width=16, norm_groups=4)
    config.model.transformer.update(queries=8, width=16, layers=2, heads=2, mlp_width=16)
    config.clip.update(
        image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2,
        text_width=16, text_layers=1, text_heads=2, embed_dim=16,
    )  # fmt: skip
    config.dataset.options.update(
        train_scenes=TRAIN_SCENES, validation_scenes=VALIDATION_SCENES, side=SHORT_SIDE
    )
    config.input.update(batch_size=4, crop_size=SIDE, short_sides=(56, 64, 72))
    config.optimiser.warmup_steps = 0
    config.train.update(steps=STEPS[kind], log_every=1, checkpoint_every=100)
    config.eval.update(batch_size=2, short_side=SHORT_SIDE, clip_chunk=8)
    return config.lock()


def configs() -> dict[str, ConfigDict]:
    """The trainings, as `run_stages` takes them."""
    return {kind: get_config(kind) for kind in STEPS}


def beside(workdir, kind: str = "zegformer", **train) -> ConfigDict:
    """A training in another folder that reads data, CLIP and start of a finished workdir."""
    config = get_config(kind).unlock()
    config.clip.source = str(workdir / "clip")
    config.dataset.directory = str(workdir / "records")
    if config.model.start_from:
        config.model.start_from = str(workdir / Path(config.model.start_from).name)
    config.train.update(**train)
    return config.lock()
