"""Parts of inference, for `inference.py`: synthetic images, this project's pipeline, memory."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from parameters import random_variables

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for configs.base

from flops import count_flops  # noqa: E402

from configs import base  # noqa: E402
from zegformer_jax.experiment import Experiment  # noqa: E402
from zegformer_jax.models.clip.model import CLIP, ClipConfig  # noqa: E402
from zegformer_jax.models.grouper import GrouperOutput  # noqa: E402
from zegformer_jax.models.normalise import normalise_images  # noqa: E402
from zegformer_jax.runtime.target import compiling_for  # noqa: E402
from zegformer_jax.segmentation import label_maps  # noqa: E402
from zegformer_jax.segmentation.augmentation import View  # noqa: E402
from zegformer_jax.segmentation.class_scores import score_bounds  # noqa: E402
from zegformer_jax.segmentation.classifiers.crops import (  # noqa: E402
    CHUNK_ON,
    Crops,
    segment_features,
)
from zegformer_jax.segmentation.classifiers.one_pass import OnePass  # noqa: E402
from zegformer_jax.segmentation.skipping import Skipping  # noqa: E402
from zegformer_jax.segmentation.zegformer import (  # noqa: E402
    Question,
    TextEmbeddings,
    Weights,
    ZegFormer,
    predict,
)

VIT_B16 = ClipConfig()
NONE_SKIPPED = Skipping()
MULTIPLE, STRIDE = 32, 4  # padding of images; stride of the mask logits
RADII = (0.05, 0.5)  # of the synthetic segments, relative to the image's side
PEAK_LOGIT, LEAST_LOGIT = 4.0, -10.0  # of a synthetic mask, at its centre and far from it
CLASS_LOGIT_STD = 3.0  # of synthetic class logits
CLEAR_PEAK = "5"  # resets VmHWM; Linux, proc(5), clear_refs


class Case(NamedTuple):
    """Case to measure: sizes of the image, and queries, classes, dtype and CLIP's chunk."""

    size: tuple[int, int] = (512, 683)
    original: tuple[int, int] = (480, 640)
    queries: int = 100
    classes: int = 171
    dtype: str = "float32"
    chunk: int = CHUNK_ON["cpu"]

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return tuple(-(-side // MULTIPLE) * MULTIPLE for side in self.size)


class Made(NamedTuple):
    """A synthetic image, and outputs of a trained grouper for it."""

    image_hwc: np.ndarray
    class_logits_qc: np.ndarray
    mask_logits_qhw: np.ndarray
    text_cd: np.ndarray
    seen_c: np.ndarray


def make(case: Case) -> Made:
    """Makes an image and class logits of noise, and segments that are ellipses of all sizes."""
    rng = np.random.default_rng(0)
    padded, size = case.padded, case.size
    image = np.zeros((*padded, 3), np.uint8)
    image[: size[0], : size[1]] = rng.integers(0, 256, (*size, 3))
    places = [np.arange(side // STRIDE) / (side // STRIDE) for side in padded]
    centres_2q = rng.uniform(0.1, 0.9, (2, case.queries, 1, 1))
    radii_2q = np.exp(rng.uniform(*np.log(RADII), (2, case.queries, 1, 1)))
    down = (places[0][:, None] - centres_2q[0]) / radii_2q[0]
    right = (places[1][None] - centres_2q[1]) / radii_2q[1]
    masks = np.maximum(PEAK_LOGIT * (1 - down**2 - right**2), LEAST_LOGIT)
    text = rng.normal(size=(case.classes, VIT_B16.embed_dim))
    return Made(
        image,
        rng.normal(0, CLASS_LOGIT_STD, (case.queries, case.classes + 1)).astype(np.float32),
        masks.astype(np.float32),
        (text / np.linalg.norm(text, axis=-1, keepdims=True)).astype(np.float32),
        np.arange(case.classes) < math.ceil(0.9 * case.classes),
    )


def keep_segments(masks_qhw: np.ndarray, count: int) -> np.ndarray:
    """Returns the masks with all but the first `count` segments empty."""
    kept = np.arange(len(masks_qhw)) < count
    return np.where(kept[:, None, None], masks_qhw, LEAST_LOGIT)


class MadeGrouper(NamedTuple):
    """Runs a grouper, and returns the synthetic logits plus a share of its own.

    The share is 0, but an argument, so that the compiler cannot remove the grouper.
    """

    grouper: Any

    def apply(
        self, variables: Any, images: jax.Array, text: jax.Array, all_layers: bool
    ) -> GrouperOutput:
        """Replaces the grouper's; `variables` are its own, the synthetic logits and the share."""
        variables, made, share = variables
        output = self.grouper.apply(variables, images, text, all_layers=all_layers)
        mixed = (x[None, None] + share * own[-1:] for x, own in zip(made, output, strict=True))
        return GrouperOutput(*mixed)


def config_of(case: Case) -> Any:
    """Returns the published model's config with the case's sizes, unlocked."""
    config = base.get_config().unlock()
    config.model.transformer.queries = case.queries
    config.eval.dtype = case.dtype
    return config


class Pipeline:
    """This project's inference on a synthetic image, whole and by its parts."""

    def __init__(self, case: Case):
        """Makes the models with random parameters, and the arrays."""
        self.case, self.made = case, make(case)
        self.grouper = MadeGrouper(
            Experiment(config_of(case), "").build_model(VIT_B16.embed_dim, case.dtype)
        )
        self.clip = CLIP(VIT_B16, jnp.dtype(case.dtype))
        self.image = jnp.asarray(self.made.image_hwc)[None]
        self.size = jnp.array([case.size])
        self.text = TextEmbeddings(*[jnp.asarray(self.made.text_cd)] * 2)
        small = jnp.zeros((1, MULTIPLE, MULTIPLE, 3))
        init = self.grouper.grouper.init
        variables = random_variables(init, jax.random.key(0), small, self.text[0])
        self.variables = (variables, self._logits(self.made.mask_logits_qhw), jnp.float32(0))
        init = partial(self.clip.init, method=CLIP.encode_image)
        self.clip_params = random_variables(init, jax.random.key(1), self._crops(1))["params"]
        self.clip_hwc = normalise_images(self.image, self.size)[0]
        rng = np.random.default_rng(1)
        self.scores = jnp.asarray(rng.random((case.queries, case.classes), np.float32))

    @property
    def chunks(self) -> int:
        """Number of chunks of all queries."""
        return -(-self.case.queries // self.case.chunk)

    def _logits(self, masks_qhw: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.made.class_logits_qc), jnp.asarray(masks_qhw)

    def _crops(self, count: int) -> jax.Array:
        side = VIT_B16.image_size
        return jax.random.normal(jax.random.key(2), (count, side, side, 3))

    def run_grouper(self) -> Callable[[], Any]:
        """Compiles the grouper; returns the call that runs it."""

        @jax.jit
        def group(variables: Any, image: jax.Array, size: jax.Array, text: jax.Array) -> Any:
            images = normalise_images(image, size)
            return self.grouper.apply(variables, images, text, all_layers=False)

        return _bind(group, self.variables, self.image, self.size, self.text.grouper_cd)

    def run_crops(self) -> Callable[[], Any]:
        """Compiles the crops, chunk by chunk; returns the call that runs them.

        Their maxima replace CLIP, so that the compiler cannot remove them.
        """

        @jax.jit
        def crop(image_hwc: jax.Array, masks_qhw: jax.Array) -> jax.Array:
            return segment_features(
                lambda crops: crops.max((1, 2)), image_hwc, masks_qhw,
                side=VIT_B16.image_size, chunk=self.case.chunk,
            )  # fmt: skip

        return _bind(crop, self.clip_hwc, jnp.asarray(self.made.mask_logits_qhw))

    def encoder(self, count: int) -> Callable[[], Any]:
        """Compiles CLIP on a batch of `count` crops; returns the call that runs it."""
        return _bind(self._encode, self.clip_params, self._crops(count))

    @property
    def _encode(self) -> Any:
        return jax.jit(
            lambda params, crops: self.clip.apply(
                {"params": params}, crops, method=CLIP.encode_image
            )
        )

    def flops(self) -> float:
        """Returns the operations of CLIP for one crop."""
        shapes = jax.eval_shape(lambda: (self.clip_params, self._crops(1)))
        with compiling_for(jax.local_devices(backend="cpu")[0]):  # without fused kernels
            return count_flops(self._encode.lower(*shapes))

    def run_map(self) -> Callable[[], Any]:
        """Compiles the label map from scores and mask logits; returns the call that runs it."""
        function = jax.jit(self._label_map)
        return _bind(function, self.scores, jnp.asarray(self.made.mask_logits_qhw))

    def _label_map(self, scores_qc: jax.Array, masks_qhw: jax.Array) -> jax.Array:
        view = View(self.image[0], self.size[0])
        scores = label_maps.ClassScores([scores_qc[None]], jnp.asarray(self.made.seen_c))
        original = {"original_size": jnp.array(self.case.original), "out_size": self.case.original}
        return label_maps.label_maps([masks_qhw], [view], [scores], **original)[0]

    def whole(
        self,
        skipping: Skipping = NONE_SKIPPED,
        kept: int | None = None,
        classifier: Any = None,
    ) -> Callable[[], Any]:
        """Compiles everything from the image to the label map; returns the call that runs it.

        Args:
            skipping: Rules for the segments that CLIP does not see.
            kept: Number of segments that are not empty; None keeps all.
            classifier: The segment classifier; None takes crops.
        """
        classifier = classifier or Crops(self.clip, clip_chunk=self.case.chunk)
        model = ZegFormer(self.grouper, classifier, skipping=skipping)
        question = Question(jnp.asarray(self.made.seen_c), ("ensemble",))

        @jax.jit
        def segment(weights: Weights, text: TextEmbeddings, image: Any, size: Any) -> Any:
            return predict(
                model,
                weights,
                text,
                [View(image[0], size[0])],
                [question],
                original_size=jnp.array(self.case.original),
                out_size=self.case.original,
            ).maps

        variables = self.variables
        if kept is not None:
            masks = keep_segments(self.made.mask_logits_qhw, kept)
            variables = (variables[0], self._logits(masks), variables[2])
        return _bind(
            segment, Weights(variables, self.clip_params), self.text, self.image, self.size
        )

    def batch(self, images: int) -> Callable[[], Any]:
        """Compiles the exact mode for images that go through the networks together."""
        classifier = Crops(self.clip, clip_chunk=self.case.chunk)
        model = ZegFormer(self.grouper, classifier)
        questions = [Question(jnp.asarray(self.made.seen_c), ("ensemble",))]
        original = {"original_size": jnp.array(self.case.original), "out_size": self.case.original}

        @jax.jit
        def segment(weights: Weights, text: TextEmbeddings, images: Any, sizes: Any) -> Any:
            def run(image: jax.Array, size: jax.Array) -> Any:
                return model.run(weights, text, View(image, size), questions)

            def label_map(row: Any) -> jax.Array:
                image, size, outputs = row
                return model.label_maps([outputs], [View(image, size)], questions, **original)[0]

            return jax.lax.map(label_map, (images, sizes, jax.vmap(run)(images, sizes)))

        weights = Weights(self.variables, self.clip_params)
        repeated = (jnp.repeat(x, images, 0) for x in (self.image, self.size))
        return _bind(segment, weights, self.text, *repeated)

    def one_pass(self) -> OnePass:
        """Returns the segment classifier that needs no crops."""
        return OnePass(self.clip)

    def threshold(self, left: int) -> float:
        """Returns the `eval.skip_below` with which CLIP sees `left` segments."""
        bounds_q = score_bounds(
            self.made.class_logits_qc, self.made.seen_c, self.clip_params["logit_scale"]
        )
        opacity_q = jax.nn.sigmoid(self.made.mask_logits_qhw).max((1, 2))
        bounds = np.sort(np.asarray(bounds_q * opacity_q))
        left = min(left, len(bounds) - 1)
        return float(bounds[-left - 1 : len(bounds) - left + 1].mean())


def _bind(function: Any, *arguments: Any) -> Callable[[], Any]:
    """Compiles for the arguments; the call runs and waits, and has XLA's bytes as `allocated`."""
    compiled = function.lower(*arguments).compile()

    def call() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    memory = compiled.memory_analysis()
    call.allocated = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return call


def peak_bytes(run: Callable[[], Any]) -> float:
    """Returns the growth of memory at the peak of a call; once per process, as peaks remain.

    It is the device's count on an accelerator, else Linux' count of resident memory.
    """
    if stats := jax.devices()[0].memory_stats():
        run()
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] - stats["bytes_in_use"]
    return resident_peak(run)


def resident_peak(run: Callable[[], Any]) -> float:
    """Returns the growth of resident memory at the peak of a call; NaN if not on Linux."""
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():
        return float("nan")
    (process / "clear_refs").write_text(CLEAR_PEAK)
    held = _status("VmRSS")
    run()
    return _status("VmHWM") - held


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def in_process(program: str, case: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Measures a case in a separate process; returns the JSON of its last line."""
    command = [sys.executable, program, "--case", json.dumps(case)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise RuntimeError(f"{case} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])
