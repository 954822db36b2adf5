"""Compares this implementation with the published system's numbers, quantity by quantity.

    python tests/check_golden.py DIRECTORY

DIRECTORY is laid out as `tests/golden/small`; files that are missing are left out. Prints a
table and exits with 1 where anything misses its tolerance.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parent / "support"), str(Path(__file__).parents[1])]

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_case import CLASSIFIER_PROMPTS, GoldenCase
from semantic_maps import semantic_maps

from zegformer_jax.evaluation.metrics.confusion import scores_from_confusion
from zegformer_jax.models.clip.model import CLIP, CLIP_MEAN, CLIP_STD
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.zegformer_names import table
from zegformer_jax.segmentation import class_scores, segments
from zegformer_jax.segmentation.augmentation import View
from zegformer_jax.segmentation.classifiers.crops import (
    STYLES,
    Crops,
    segment_features,
    segment_images,
)
from zegformer_jax.segmentation.label_maps import ClassScores
from zegformer_jax.segmentation.resize import upsample_masks
from zegformer_jax.segmentation.zegformer import Question, TextEmbeddings, Weights, ZegFormer
from zegformer_jax.text.tokenizer import Tokenizer
from zegformer_jax.training import losses, matching
from zegformer_jax.training.optim import make_optimiser
from zegformer_jax.training.targets import targets_from_labels

MASK_WEIGHT, DICE_WEIGHT = 20.0, 1.0  # ALGORITHM: section 2
LEARNING_RATE, SCHEDULE_STEPS, CLIP_NORM = 1e-4, 10, 0.01
GROUPS = (
    ("backbone/.*", {"learning_rate": 0.1}),
    (".*norm.*", {"weight_decay": 0.0}),
    ("transformer/query_embedding", {"weight_decay": 0.0}),
)
GAMMA = 0.1  # of the calibrated variant, the published value
PER_PIXEL_GAMMA = 0.2
# Variant: crop style, scores, gamma.
VARIANTS = {
    "no_clip": (None, "grouper", 0.0),
    "clip_only_cropmask": ("cropmask", "clip", 0.0),
    "ensemble_crop": ("crop", "ensemble", 0.0),
    "ensemble_mask": ("mask", "ensemble", 0.0),
    "ensemble_cropmask_calibrated": ("cropmask", "ensemble", GAMMA),
    "ensemble_all_classes": ("cropmask", "ensemble_all", 0.0),
}
CHUNK = 8  # segments that CLIP encodes at once


class Row(NamedTuple):
    """One comparison.

    Attributes:
        quantity: what is compared.
        absolute: largest difference.
        relative: the same, over the largest expected number.
        tolerance: what is allowed, in words.
        ok: whether it is kept.
    """

    quantity: str
    absolute: float
    relative: float
    tolerance: str
    ok: bool


def compare(quantity: str, actual, expected, *, relative=None, absolute=None) -> Row:
    """Compares arrays; where no tolerance is given they must be identical."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        return Row(f"{quantity}: {actual.shape}, not {expected.shape}", np.nan, np.nan, "", False)
    same_nan = np.isnan(actual) & np.isnan(expected)
    difference = np.where(same_nan, 0.0, np.abs(actual - expected)).max(initial=0.0)
    scale = np.nanmax(np.abs(expected), initial=0.0)
    error = difference / scale if scale else float(difference > 0)
    if relative is not None:
        return Row(quantity, difference, error, f"relative {relative:g}", error <= relative)
    if absolute is not None:
        return Row(quantity, difference, error, f"absolute {absolute:g}", difference <= absolute)
    return Row(quantity, difference, error, "identical", difference == 0)


def check_text(case: GoldenCase) -> Iterator[Row]:
    """Token ids, and text embeddings of all classes and of the seen ones."""
    if case.has("tokens.npz"):
        arrays = case.arrays("tokens")
        tokens = Tokenizer.openai()([str(text) for text in arrays["texts"]])
        yield compare("tokens", tokens, arrays["tokens"])
    ours = {
        "": case.text(case.names, case.prompts),
        "_clip": case.text(case.names, CLASSIFIER_PROMPTS),
    }
    for file, prefix in (("inference", "text/"), ("segments", "")):
        for suffix, embeddings in ours.items():
            name = f"{prefix}text_features_test{suffix}"
            if case.has(f"{file}.npz") and name in case.arrays(file):
                expected = case.arrays(file)[name]
                yield compare(f"{file} {name}", embeddings, expected, relative=1e-4)
    if case.has("training.npz"):
        for suffix, embeddings in ours.items():
            expected = case.arrays("training")[f"text/train_model/text_features{suffix}"]
            name = f"training text_features{suffix}"
            yield compare(name, embeddings[: len(case.seen)], expected, relative=1e-4)


class Training:
    """The training case: one batch, its loss as a function of the parameters."""

    def __init__(self, case: GoldenCase):
        """Reads the batch and the grouper."""
        self.model, self.variables, self.sizes = case.model("segmenter_weights")
        images, sizes, labels = case.training_batch()
        self.images = normalise_images(jnp.asarray(images), jnp.asarray(sizes))
        most = max(len(np.unique(x[x < len(case.seen)])) for x in labels)
        self.targets = targets_from_labels(jnp.asarray(labels), len(case.seen), most)
        self.text = jnp.asarray(case.text(case.seen, case.prompts))

    def loss(self, params) -> tuple[jax.Array, dict]:
        """The total, and the (weighted) parts of every layer by their published names."""
        variables = {"params": params, "constants": self.variables["constants"]}
        output = self.model.apply(variables, self.images, self.text)
        last, parts = len(output.class_logits_lbqc) - 1, {}
        batch, queries = output.class_logits_lbqc.shape[1:3]
        targets = self.targets.valid_bn.sum()
        class_weight = targets + losses.NO_OBJECT_WEIGHT * (batch * queries - targets)
        count = jnp.maximum(targets, 1)
        for layer, (class_logits, mask_logits) in enumerate(zip(*output, strict=True)):
            matched = self.match(class_logits, mask_logits)
            sums = losses.set_loss(class_logits, mask_logits, self.targets, matched)
            suffix = "" if layer == last else f"_{layer}"
            parts[f"loss_ce{suffix}"] = sums.class_sum / class_weight
            parts[f"loss_mask{suffix}"] = MASK_WEIGHT * sums.mask_sum / count
            parts[f"loss_dice{suffix}"] = DICE_WEIGHT * sums.dice_sum / count
        return sum(parts.values()), parts

    def match(self, class_logits, mask_logits) -> jax.Array:
        """The queries that are matched to the targets, [B, N]."""
        return matching.match(class_logits, mask_logits, self.targets, MASK_WEIGHT, DICE_WEIGHT)

    def published(self, params) -> dict[str, np.ndarray]:
        """Parameters or gradients by their published names."""
        flat = tables.flatten({"params": params})
        return tables.write([x for x in table(self.sizes) if x.paths[0] in flat], flat)


def check_stages(case: GoldenCase) -> Iterator[Row]:
    """Backbone, mask features, decoder states, logits and matches of every layer."""
    arrays, training = case.arrays("training"), Training(case)
    apply = jax.jit(partial(training.model.apply, capture_intermediates=True))
    output, state = apply(training.variables, training.images, training.text)
    inner = state["intermediates"]
    for name, actual in inner["backbone"]["__call__"][0].items():
        expected = arrays[f"train/backbone/{name}"].transpose(0, 2, 3, 1)
        yield compare(f"backbone {name}", actual, expected, relative=1e-4)
    decoded = inner["pixel_decoder"]["__call__"][0]
    mask_features = decoded if isinstance(decoded, jax.Array) else decoded[0]
    expected = arrays["train/mask_features"].transpose(0, 2, 3, 1)
    yield compare("mask features", mask_features, expected, relative=1e-4)
    states = inner["transformer"]["__call__"][0]
    yield compare("decoder states", states, arrays["train/decoder_states"], relative=1e-4)
    for layer, (class_logits, mask_logits) in enumerate(zip(*output, strict=True)):
        name = f"train/layer{layer}"
        expected = arrays[f"{name}/class_logits"], arrays[f"{name}/mask_logits"]
        yield compare(f"layer {layer} class logits", class_logits, expected[0], relative=1e-4)
        yield compare(f"layer {layer} mask logits", mask_logits, expected[1], relative=1e-4)
        for source, logits in (("own", (class_logits, mask_logits)), ("published", expected)):
            matched = training.match(*(jnp.asarray(x) for x in logits))
            for image in range(len(matched)):
                queries, positions = arrays[f"{name}/match_image{image}"]
                count = int(training.targets.valid_bn[image].sum())
                ours = np.full(count, -1)
                ours[: len(positions)] = matched[image][positions]
                yield compare(f"layer {layer} match {image}, {source} logits", ours, queries)


def check_gradients(case: GoldenCase) -> Iterator[Row]:
    """Every loss, the gradients that are given, and their global norm."""
    arrays, training = case.arrays("training"), Training(case)
    gradient_of = jax.jit(jax.value_and_grad(training.loss, has_aux=True))
    (total, parts), gradients = gradient_of(training.variables["params"])
    yield compare("total loss", total, arrays["train/loss/total"], relative=1e-5)
    for name, value in parts.items():
        yield compare(name, value, arrays[f"train/loss/{name}"], relative=1e-5)
    norm = optax.tree.norm(gradients)
    yield compare("gradient norm", norm, arrays["train/grad_norm"], relative=1e-3)
    published = training.published(gradients)
    for name in (x for x in arrays if x.startswith("train/grad/")):
        short = name.removeprefix("train/grad/")
        yield compare(f"gradient {short}", published[short], arrays[name], relative=1e-3)


def check_steps(case: GoldenCase) -> Iterator[Row]:
    """Three steps of the optimiser: learning rates, losses, parameters."""
    arrays, training = case.arrays("training"), Training(case)
    params = training.variables["params"]
    optimiser, schedule = make_optimiser(
        learning_rate=LEARNING_RATE, steps=SCHEDULE_STEPS, power=0.9, weight_decay=1e-4,
        clip_norm=CLIP_NORM, groups=GROUPS,
    )  # fmt: skip
    state = optimiser.init(params)

    @jax.jit
    def step(params, state):
        (total, _), gradients = jax.value_and_grad(training.loss, has_aux=True)(params)
        updates, state = optimiser.update(gradients, state, params)
        return total, optax.apply_updates(params, updates), state

    totals = []
    for _ in arrays["steps/lr"]:
        total, params, state = step(params, state)
        totals.append(float(total))
    totals.append(float(step(params, state)[0]))
    rates = [float(schedule(index)) for index in range(len(arrays["steps/lr"]))]
    yield compare("learning rates", rates, arrays["steps/lr"], relative=1e-5)
    yield compare("losses of the steps", totals, arrays["steps/loss"], relative=1e-4)
    published = training.published(params)
    for name in (x for x in arrays if x.startswith("steps/param/")):
        short = name.removeprefix("steps/param/")
        yield compare(f"after steps {short}", published[short], arrays[name], absolute=1e-5)


class Picture(NamedTuple):
    """A picture on its way through the segment classifier."""

    clip_hwc: jax.Array
    padded_size: tuple[int, int]
    size: tuple[int, int]
    original_size: tuple[int, int]

    def semantic_map(self, scores, logits, seen_c, gamma=0.0) -> jax.Array:
        """The map at the original size, from scores (None: the baseline's) and mask logits."""
        view = View(jnp.zeros((*self.padded_size, 3)), jnp.array(self.size))
        scores = None if scores is None else [scores[None]]
        scores = ClassScores(scores, seen_c, (gamma,))
        sizes = {"original_size": jnp.array(self.original_size), "out_size": self.original_size}
        return semantic_maps([logits], [view], [scores], **sizes)[0][0, 0]


def open_picture(image_chw: np.ndarray, original_size: tuple[int, int]) -> Picture:
    """Pads a picture to a multiple of 32 and normalises it for CLIP."""
    image_hwc = image_chw.transpose(1, 2, 0)
    size = image_hwc.shape[:2]
    padded = np.pad(image_hwc, [(0, -side % 32) for side in size] + [(0, 0)])
    clip_hwc = normalise_images(padded[None], np.array([size]), CLIP_MEAN, CLIP_STD)[0]
    return Picture(clip_hwc, padded.shape[:2], size, tuple(original_size))


def features_of(case: GoldenCase, picture: Picture, mask_logits, style: str) -> jax.Array:
    """CLIP's features of every segment, [Q, D]."""
    module, params = case.clip

    def encode(crops):
        return module.apply({"params": params}, crops, method=CLIP.encode_image)

    side = module.config.image_size
    arguments = {"style": style, "side": side, "chunk": CHUNK}
    return jax.jit(partial(segment_features, encode, **arguments))(picture.clip_hwc, mask_logits)


def map_of(
    case: GoldenCase, picture: Picture, class_logits, mask_logits, features, variant: str
) -> jax.Array:
    """The semantic map [C, H, W] of a variant."""
    _, mode, gamma = VARIANTS[variant]
    clip_logits = None
    if features is not None:
        text = case.text(case.names, CLASSIFIER_PROMPTS)
        clip_logits = class_scores.clip_logits(features, text, case.clip[1]["logit_scale"])
    scores = class_scores.class_scores(class_logits, clip_logits, case.is_seen, mode=mode)
    return picture.semantic_map(scores, mask_logits, case.is_seen, gamma)


def clip_inputs(case: GoldenCase, picture: Picture, mask_logits, style: str) -> np.ndarray:
    """Returns CLIP's image of every segment, [Q, side, side, 3]."""
    side = case.clip[0].config.image_size
    make = jax.jit(partial(segment_images, style=style, side=side))
    chunks = [
        np.asarray(make(picture.clip_hwc, jnp.asarray(mask_logits[i : i + CHUNK])))
        for i in range(0, len(mask_logits), CHUNK)
    ]
    return np.concatenate(chunks)


def check_inputs(name: str, arrays: dict, prefix: str, inputs: np.ndarray) -> Iterator[Row]:
    """Means, deviations and single CLIP inputs, as far as they are given."""
    for kind, function in (("mean", np.mean), ("std", partial(np.std, ddof=1))):
        key = f"{prefix}_{kind}_per_query"
        if key in arrays:
            actual = [function(x.astype(np.float64)) for x in inputs]
            yield compare(f"{name} CLIP inputs, {kind}", actual, arrays[key], absolute=1e-4)
    for key in (x for x in arrays if x.startswith(f"{prefix}_query")):
        query, expected = int(key.removeprefix(f"{prefix}_query")), arrays[key]
        every = inputs.shape[1] // expected.shape[-1]
        actual = inputs[query, ::every, ::every].transpose(2, 0, 1)
        yield compare(f"{name} CLIP input {query}", actual, expected, absolute=1e-4)


def run_halves(case: GoldenCase, picture: Picture, image_chw: np.ndarray, style: str):
    """Both halves of the method as evaluation and prediction run them, on one picture."""
    model, variables, _ = case.model("segmenter_weights")
    clip, clip_params = case.clip
    text = TextEmbeddings(
        case.text(case.names, case.prompts), case.text(case.names, CLASSIFIER_PROMPTS)
    )
    height, width = picture.size
    padded = np.zeros((*picture.padded_size, 3), np.uint8)
    padded[:height, :width] = image_chw.transpose(1, 2, 0)
    method = ZegFormer(model, Crops(clip, style, CHUNK))
    question = Question(jnp.asarray(case.is_seen), method.methods)
    view = View(jnp.asarray(padded), jnp.array(picture.size))
    run = jax.jit(lambda weights, text, view: method.run(weights, text, view, [question]))
    return run(Weights(variables, clip_params), text, view)


def check_inference(case: GoldenCase) -> Iterator[Row]:
    """Compares the semantic maps of every variant, computed by the whole method."""
    arrays, training = case.arrays("inference"), case.arrays("training")
    count = sum(name.startswith("class_logits") for name in arrays)
    for i in range(count):
        image = training[f"image{i}"]
        picture = open_picture(image, case.output_sizes[i])
        queries = {style: run_halves(case, picture, image, style) for style in STYLES}
        for variant, (style, mode, gamma) in VARIANTS.items():
            name, found = f"picture {i} {variant}", queries[style or STYLES[0]]
            class_logits, mask_logits, clip_logits, _ = found
            for key, actual in (("class_logits", class_logits), ("mask_logits", mask_logits)):
                yield compare(f"{name} {key}", actual, arrays[f"{key}{i}"], relative=1e-4)
            if style is not None and f"{variant}/clip_features{i}" in arrays:
                features = features_of(case, picture, mask_logits, style)
                expected = arrays[f"{variant}/clip_features{i}"]
                yield compare(f"{name} CLIP features", features, expected, absolute=1e-4)
                inputs = clip_inputs(case, picture, mask_logits, style)
                yield from check_inputs(name, arrays, f"{variant}/clip_input{i}", inputs)
            if f"{variant}/sem_seg{i}" in arrays:
                scores = class_scores.class_scores(
                    class_logits, clip_logits, case.is_seen, mode=mode
                )
                result = picture.semantic_map(scores, mask_logits, case.is_seen, gamma)
                expected = arrays[f"{variant}/sem_seg{i}"]
                yield compare(f"{name} semantic map", result, expected, absolute=1e-4)


def check_segments(case: GoldenCase) -> Iterator[Row]:
    """The segment classifier on made-up segments: boxes, inputs, features, maps."""
    arrays = case.arrays("segments")
    variants = [name for name in VARIANTS if f"{name}/sem_seg" in arrays]
    picture = open_picture(arrays["image"], arrays[f"{variants[0]}/sem_seg"].shape[1:])
    mask_logits = jnp.asarray(arrays["mask_logits"])
    masks = upsample_masks(mask_logits, *picture.padded_size) > 0
    boxes = segments.boxes_from_masks(masks)
    yield compare("boxes", boxes, arrays["boxes_xyxy"], absolute=1e-4)
    for variant in variants:
        style, name = VARIANTS[variant][0], f"segments {variant}"
        inputs = clip_inputs(case, picture, mask_logits, style)
        yield from check_inputs(name, arrays, f"{variant}/clip_input", inputs)
        features = features_of(case, picture, mask_logits, style)
        expected = arrays[f"{variant}/clip_features"]
        yield compare(f"{name} CLIP features", features, expected, absolute=1e-4)
        result = map_of(case, picture, arrays["class_logits"], mask_logits, features, variant)
        yield compare(f"{name} semantic map", result, arrays[f"{variant}/sem_seg"], absolute=1e-4)


def check_per_pixel(case: GoldenCase) -> Iterator[Row]:
    """The per-pixel baseline: its loss on the first picture and its semantic map."""
    arrays, training = case.arrays("per_pixel"), case.arrays("training")
    model, variables, _ = case.model("per_pixel_weights")
    picture = open_picture(training["image0"], case.output_sizes[0])
    height, width = picture.size
    padded = np.zeros((1, *picture.padded_size, 3), np.uint8)
    padded[0, :height, :width] = training["image0"].transpose(1, 2, 0)
    image = normalise_images(jnp.asarray(padded), jnp.array([picture.size]))
    label = np.full((1, *picture.padded_size), np.iinfo(training["label0"].dtype).max)
    label[0, :height, :width] = training["label0"]
    logits = model.apply(variables, image, case.text(case.seen, case.prompts))
    total, count = losses.per_pixel_loss(logits, jnp.asarray(label))
    yield compare("per-pixel loss", total / count, arrays["loss/loss_sem_seg"], relative=1e-5)
    logits = model.apply(variables, image, case.text(case.names, case.prompts))
    logits_chw = logits[0].transpose(2, 0, 1)
    result = picture.semantic_map(None, logits_chw, case.is_seen, PER_PIXEL_GAMMA)
    yield compare("per-pixel semantic map", result, arrays["sem_seg0"], absolute=1e-4)


def check_evaluation(case: GoldenCase) -> Iterator[Row]:
    """The evaluator's figures, from confusion matrices.

    Where the published evaluator gives NaN because a class is absent, ours gives the mean over
    the present ones: there the figure is left out.
    """
    cases = json.loads((case.directory / "evaluation.json").read_text())
    for name, given in cases.items():
        confusion = np.array(given["confusion[prediction][label]"]).T[:-1, :-1]
        seen = [x not in given["unseen"] for x in given["class_names"]]
        scores = scores_from_confusion(confusion, seen)
        ours = {
            "mIoU": scores.mean_iou_labels_or_predictions,
            "fwIoU": scores.frequency_weighted_iou,
            "mACC": scores.mean_accuracy,
            "pACC": scores.pixel_accuracy,
            "seen_IoU": scores.seen_iou,
            "unseen_IoU": scores.unseen_iou,
            "harmonic mean": scores.harmonic_iou,
        }
        for index, class_name in enumerate(given["class_names"]):
            ours[f"IoU-{class_name}"] = scores.iou_c[index]
            ours[f"ACC-{class_name}"] = scores.accuracy_c[index]
        known = [key for key, value in given["expected"].items() if value is not None]
        actual = [100 * ours[key] for key in known]
        expected = [given["expected"][key] for key in known]
        yield compare(f"evaluation {name}, {len(known)} figures", actual, expected, relative=1e-10)


# What is compared, and the file that it needs.
PARTS = {
    "text": ("clip_weights.npz", check_text),
    "stages": ("training.npz", check_stages),
    "gradients": ("training.npz", check_gradients),
    "steps": ("training.npz", check_steps),
    "inference": ("inference.npz", check_inference),
    "segments": ("segments.npz", check_segments),
    "per_pixel": ("per_pixel.npz", check_per_pixel),
    "evaluation": ("evaluation.json", check_evaluation),
}


def check(directory: str | Path, parts: Iterable[str] = PARTS) -> Iterator[Row]:
    """Runs the comparisons that the files of a directory allow."""
    case = GoldenCase(directory)
    for file, check_part in (PARTS[part] for part in parts):
        if case.has(file):
            yield from check_part(case)


def main(arguments: list[str]) -> int:
    """Prints the table; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="laid out as tests/golden/small")
    options = parser.parse_args(arguments)
    missed = total = 0
    print(f"{'quantity':<72}{'absolute':>10}{'relative':>10}  {'tolerance':<16} ok")
    for row in check(options.directory):
        total, missed = total + 1, missed + (not row.ok)
        verdict = "yes" if row.ok else "NO"
        print(
            f"{row.quantity:<72}{row.absolute:>10.1e}{row.relative:>10.1e}  "
            f"{row.tolerance:<16} {verdict}",
            flush=True,
        )
    print(f"{total} quantities, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
