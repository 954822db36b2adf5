"""The compiled evaluation of one model: what it counts on a batch of pictures."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from zegformer_jax.evaluation.counts import OVERLAP, RIGHT_NAMES, RIGHT_SEGMENTS
from zegformer_jax.evaluation.metrics import segment_fit
from zegformer_jax.evaluation.metrics.confusion import confusion_counts
from zegformer_jax.evaluation.metrics.oracles import (
    largest_regions,
    right_names_counts,
    right_segments_counts,
)
from zegformer_jax.evaluation.subsets import Subset, load_subsets
from zegformer_jax.experiment import Experiment, LoadedClip
from zegformer_jax.runtime.checkpoints import sum_bits
from zegformer_jax.runtime.mesh import make_local_mesh, replicate, to_devices
from zegformer_jax.segmentation.augmentation import make_views
from zegformer_jax.segmentation.zegformer import Queries, Question, Weights, predict
from zegformer_jax.text.vocabulary import Vocabulary, mark_seen

METHODS = {
    "zegformer": ("grouper", "clip", "ensemble", "ensemble_all"),
    "per_pixel": ("per_pixel",),
}


def choose_methods(config: ConfigDict) -> tuple[str, ...]:
    """The ways of scoring that the config asks for; all of its model's where it names none.

    Raises:
        ValueError: it names another.
    """
    known = METHODS[config.model.kind]
    wrong = [method for method in config.eval.methods if method not in known]
    if wrong:
        raise ValueError(f"eval.methods '{wrong[0]}': choose some of {', '.join(known)}")
    return tuple(config.eval.methods) or known


def parse_sweep(text: str) -> tuple[float, ...]:
    """Reads `first:last:step`; none of an empty text.

    Raises:
        ValueError: it is not three such numbers, or there is nothing from the first to the last.
    """
    if not text:
        return ()
    try:
        first, last, step = (float(part) for part in text.split(":"))
        count = math.floor((last - first) / step + 1e-6) + 1 if step > 0 else 0
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ValueError(f"eval.sweep_gamma '{text}': give first:last:step, as 0:0.3:0.05")
    return tuple(round(first + step * place, 6) for place in range(count))


def sweep_name(method: str, gamma: float) -> str:
    """The name of a method with a gamma of the sweep, among the confusion counts."""
    return f"{method}, gamma {gamma:g}"


class Evaluator:
    """The jitted evaluation of one model in one data set's vocabulary."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        variables: Any = None,
        trained: Vocabulary | None = None,
        clip: LoadedClip | None = None,
    ):
        """Loads the models and the vocabularies of an experiment.

        Args:
            config: the experiment.
            workdir: where its checkpoints are.
            variables: of the grouper or the baseline, on the host; None reads a checkpoint.
            trained: the vocabulary of the training, if the config's data set is another.
            clip: names the segments; None reads the config's.
        """
        experiment = Experiment(config, workdir)
        if clip is not None:
            experiment.clip = clip
        self.settings = experiment.eval
        self.methods = choose_methods(config)
        self.shown = config.eval.scores if config.model.kind == "zegformer" else config.model.kind
        if self.shown not in self.methods:
            raise ValueError(f"eval.scores '{self.shown}': choose one of {', '.join(self.methods)}")
        self.vocabulary = experiment.vocabulary
        if trained is not None:
            self.vocabulary = mark_seen(self.vocabulary, trained)
        self.subsets = load_subsets(config.eval.vocabularies, self.vocabulary, config.dataset.name)
        self.sweep = parse_sweep(config.eval.sweep_gamma)
        self.model = experiment.segmentation_model
        weights = experiment.weights(variables)
        # Each process works on its own images; their shapes differ, so its devices are alone.
        self.mesh = mesh = make_local_mesh()
        text = experiment.text_embeddings(self.vocabulary.names)
        self.fixed = replicate((weights.classifier, text), mesh)
        self.set_variables(weights.model)
        split, whole = PartitionSpec("data"), PartitionSpec()
        self.step = jax.jit(
            jax.shard_map(
                self._device_step,
                mesh=mesh,
                in_specs=(whole, split),
                out_specs=(whole, split),
                check_vma=False,
            )
        )

    def identity(self, config: ConfigDict) -> str:
        """Stands for the numbers of both models, the vocabulary and the settings."""
        bits = sum_bits((self.variables, self.fixed))
        parts = (config.to_json_best_effort(), bits, self.vocabulary)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def set_variables(self, variables: Any) -> None:
        """Evaluates other variables from here on."""
        self.variables = replicate(variables, self.mesh)

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[dict[Any, np.ndarray], np.ndarray]:
        """Gives a batch's counts, and label maps by `eval.scores` in the headline vocabulary."""
        arrays = {name: array for name, array in batch.items() if name not in ("id", "index")}
        models = (self.variables, *self.fixed)
        return jax.device_get(self.step(models, to_devices(arrays, self.mesh)))

    def _device_step(self, arrays: Any, batch: Any) -> tuple[dict[Any, jax.Array], jax.Array]:
        """Works on one device's rows, picture by picture, and sums over devices.

        A row that only fills the batch is not worked on.
        """

        def count(example: Any) -> tuple[dict[Any, jax.Array], jax.Array]:
            return self._count_image(*arrays, example)

        first = jax.tree.map(lambda rows: rows[0], batch)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(count, first))

        def add(total: Any, example: Any) -> tuple[Any, jax.Array]:
            counts, prediction = jax.lax.cond(example["valid"], count, lambda _: nothing, example)
            return jax.tree.map(jnp.add, total, counts), prediction

        total, predictions = jax.lax.scan(add, nothing[0], batch)
        return jax.lax.psum(total, "data"), predictions

    def _count_image(
        self, variables: Any, clip_params: Any, text: Any, example: Any
    ) -> tuple[dict[Any, jax.Array], jax.Array]:
        """Compares one image's label maps with the truth, by method and vocabulary."""
        asked = self._questions()
        outputs, answers = predict(
            self.model,
            Weights(variables, clip_params),
            text,
            make_views(example["views"], self.settings.flip),
            [question for _, question, _ in asked],
            original_size=example["original_size"],
            out_size=example["label"].shape,
        )
        ignore = self.vocabulary.ignore_label
        label, counts, prediction = example["label"].astype(jnp.int32), {}, None
        for (subset, _, names), labels_ngyx in zip(asked, answers, strict=True):
            truth = jnp.asarray(subset.table(ignore))[label]
            flat = labels_ngyx.reshape(-1, *labels_ngyx.shape[2:])
            for name, labels in zip(names, flat, strict=True):
                counts[name, subset.name] = confusion_counts(
                    labels, truth, len(subset.indices), ignore
                )
                if prediction is None and name == self.shown:
                    prediction = labels
        if isinstance(outputs[0], Queries):
            counts |= self._count_segments(outputs[0], example, label)
        return counts, prediction

    def _question(self, subset: Subset, methods: Sequence[str], gammas: Sequence[float]):
        seen_c = jnp.asarray(subset.vocabulary.seen)
        return Question(seen_c, methods, gammas, tuple(subset.indices.tolist()))

    def _questions(self) -> list[tuple[Subset, Question, Sequence[str]]]:
        """Subsets, questions and names of the maps; the headline's come first."""
        gammas = (self.settings.gamma,)
        asked = [(x, self._question(x, self.methods, gammas), self.methods) for x in self.subsets]
        if self.sweep:
            names = [sweep_name(self.shown, gamma) for gamma in self.sweep]
            question = self._question(self.subsets[0], (self.shown,), self.sweep)
            asked.append((self.subsets[0], question, names))
        return asked

    def _count_segments(self, queries: Queries, example: Any, label: jax.Array) -> dict:
        """The two halves of the method apart: how segments fit, and oracles in the headline.

        Segments are compared at the resized size, with the nearest labels.
        """
        masks_qhw, headline = queries.mask_logits_qhw, self.subsets[0]
        sampled = self._nearest_labels(example, label)
        overlap = segment_fit.overlap(masks_qhw, sampled, len(self.vocabulary))
        iou_c, present_c = segment_fit.best_overlap_iou(overlap)
        boundary_c = jnp.zeros(len(self.vocabulary))
        counts = {}
        if self.settings.oracles:
            boundary_c, _ = segment_fit.best_overlap_boundary_f(
                masks_qhw, sampled, overlap, example["views"][0][1]
            )
            chosen = overlap.select(headline.indices)
            truth = jnp.asarray(headline.table(self.vocabulary.ignore_label))[sampled]
            counts[RIGHT_NAMES, headline.name] = right_names_counts(masks_qhw, truth, chosen)
            classes_n = largest_regions(chosen.labelled_c, len(headline.indices))
            counts[RIGHT_SEGMENTS, headline.name] = right_segments_counts(
                self._region_scores(queries, chosen)[classes_n], classes_n, chosen.labelled_c
            )
        counts[OVERLAP] = jnp.stack([iou_c, boundary_c, present_c.astype(jnp.float32)])
        return counts

    def _region_scores(self, queries: Queries, overlap: segment_fit.Overlap) -> jax.Array:
        """The scores of the labelled region of each of the headline's classes, [C, C].

        They are the best-fitting query's; where no segment touches it, the mean of all queries'.
        """
        headline, iou_qc = self.subsets[0], overlap.iou_qc()
        question = self._question(headline, (self.shown,), (0.0,))
        scores_qc = self.model.class_scores(queries, question, self.shown)
        scores_qc -= self.settings.gamma * jnp.asarray(headline.vocabulary.seen, jnp.float32)[None]
        touched_c1 = (iou_qc.max(0) > 0)[:, None]
        return jnp.where(touched_c1, scores_qc[iou_qc.argmax(0)], scores_qc.mean(0)[None])

    def _nearest_labels(self, example: Any, label: jax.Array) -> jax.Array:
        """One picture's labels at the resized and padded size, ignored in the padding."""
        height, width = example["views"][0][0].shape[:2]

        def nearest(axis: int, length: int) -> tuple[jax.Array, jax.Array]:
            size, original = example["views"][0][1][axis], example["original_size"][axis]
            index = (2 * jnp.arange(length) + 1) * original // (2 * size)
            return jnp.minimum(index, original - 1), jnp.arange(length) < size

        (rows, in_rows), (columns, in_columns) = nearest(0, height), nearest(1, width)
        inside = in_rows[:, None] & in_columns[None]
        return jnp.where(inside, label[rows[:, None], columns[None]], self.vocabulary.ignore_label)
