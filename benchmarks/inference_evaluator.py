"""Step of the real `Evaluator` on synthetic images with small models, for `inference.py`.

CLIP and grouper are tiny, so that the costs that grow with classes and devices dominate.
"""

import dataclasses
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from inference_parts import Case, MadeGrouper, config_of, make

from zegformer_jax.evaluation.evaluator import Evaluator
from zegformer_jax.experiment import Experiment
from zegformer_jax.models.clip.model import CLIP, ClipConfig
from zegformer_jax.pretrained.clip.load import save_clip
from zegformer_jax.segmentation.class_scores import MODES
from zegformer_jax.text.tokenizer import Tokenizer
from zegformer_jax.text.vocabulary import load_vocabulary

VOCABULARIES = {20: "pascal_voc_20", 171: "coco_stuff_171", 847: "ade20k_full_847"}
SMALL_CLIP = ClipConfig(
    image_size=32, vision_width=64, vision_layers=1, vision_heads=1,
    text_width=64, text_layers=1, text_heads=1, embed_dim=64,
)  # fmt: skip


def small_config(case: Case, folder: Path, methods: tuple[str, ...], oracles: bool) -> Any:
    """Returns a config with the case's queries and classes, and small models."""
    config = config_of(case)
    vocabulary = VOCABULARIES[case.classes]
    config.model.backbone.update(
        blocks=(1, 1, 1, 1), stem_width=16, bottleneck_width=16, stage_width=32
    )
    config.model.pixel_decoder.update(width=32, mask_width=32, norm_groups=4)
    config.model.transformer.update(width=32, layers=1, heads=2, mlp_width=32)
    config.clip.update(
        source=str(folder / "clip"), grouper_prompts="single", classifier_prompts="single"
    )
    config.dataset.vocabulary = vocabulary
    config.eval.update(vocabularies=(vocabulary,), methods=methods, oracles=oracles)
    return config.lock()


def make_evaluator(case: Case, methods: tuple[str, ...], oracles: bool) -> Evaluator:
    """Makes the evaluator with random models, whose queries have the synthetic logits."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        init = jax.jit(CLIP(SMALL_CLIP).init)
        side, length = SMALL_CLIP.image_size, SMALL_CLIP.context_length
        images, tokens = jnp.zeros((1, side, side, 3)), jnp.zeros((1, length), jnp.int32)
        params = jax.device_get(init(jax.random.key(0), images, tokens)["params"])
        save_clip(folder / "clip", SMALL_CLIP, params, Tokenizer.openai())
        config = small_config(case, folder, methods, oracles)
        experiment = Experiment(config, folder)
        grouper = experiment.build_model(SMALL_CLIP.embed_dim)
        text = jnp.zeros((case.classes, SMALL_CLIP.embed_dim))
        variables = jax.jit(grouper.init)(jax.random.key(0), images, text)
        evaluator = Evaluator(experiment, variables)
    made = make(case)
    logits = (jnp.asarray(made.class_logits_qc), jnp.asarray(made.mask_logits_qhw))
    grouper = MadeGrouper(evaluator.model.grouper)
    evaluator.model = dataclasses.replace(evaluator.model, grouper=grouper)
    evaluator.set_variables((variables, logits, jnp.float32(0)))
    return evaluator


def make_batch(case: Case, count: int) -> dict[str, np.ndarray]:
    """Makes images and labels of noise, in the layout of `input.pipeline.eval_batches`."""
    rng = np.random.default_rng(2)
    ignore = load_vocabulary(VOCABULARIES[case.classes]).ignore_label
    height, width = case.original
    label = np.full((-(-height // 32) * 32, -(-width // 32) * 32), ignore, np.int32)
    label[:height, :width] = rng.integers(0, case.classes, case.original)
    one = {
        "views": ((make(case).image_hwc, np.array(case.size, np.int32)),),
        "label": label.astype(np.min_scalar_type(ignore)),
        "original_size": np.array(case.original, np.int32),
        "valid": np.array(True),
    }
    return jax.tree.map(lambda array: np.stack([array] * count), one)


def step_seconds(
    case: Case, images: int, repeats: int, methods: tuple[str, ...], oracles: bool
) -> float:
    """Returns the median seconds of the evaluator's step on a batch, over all devices."""
    evaluator, batch = make_evaluator(case, methods, oracles), make_batch(case, images)
    evaluator(batch)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        evaluator(batch)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def classes_row(case: Case, repeats: int) -> list[float]:
    """Returns seconds per image: with the ensemble alone, all methods, and oracles in addition."""
    choices = ((("ensemble",), False), (MODES, False), (MODES, True))
    return [step_seconds(case, 1, repeats, *choice) for choice in choices]
