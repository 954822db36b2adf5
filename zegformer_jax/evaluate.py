"""Evaluation: both halves of the method on every picture, several ways of scoring from one pass."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from zegformer_jax import experiment, hosts, inference, metrics, sharding
from zegformer_jax.checkpoints import SCORE
from zegformer_jax.models.clip import CLIP, CLIP_MEAN, CLIP_STD
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.segments import segment_features, upsample_masks
from zegformer_jax.vocabulary import Vocabulary

METHODS = {
    "zegformer": ("grouper", "clip", "ensemble", "ensemble_all"),
    "per_pixel": ("per_pixel",),
}
OVERLAP = ("segments", "overlap")  # beside the (method, vocabulary) of the confusion counts


class Queries(NamedTuple):
    """What both halves of the method say of every query of a batch.

    Attributes:
        class_logits_bqc: the grouper's, float32 [B, Q, C + 1], "no object" last.
        mask_logits_bqhw: float32 [B, Q, H/4, W/4].
        clip_logits_bqc: the segment classifier's, float32 [B, Q, C].
    """

    class_logits_bqc: jax.Array
    mask_logits_bqhw: jax.Array
    clip_logits_bqc: jax.Array


class TextEmbeddings(NamedTuple):
    """A vocabulary as the two halves of the method see it, float32 [C, D] each.

    The second is None in the baseline, which has one half.
    """

    grouper_cd: jax.Array
    classifier_cd: jax.Array | None


def embed_vocabulary(
    config: ConfigDict,
    workdir: epath.Path,
    clip: experiment.LoadedClip | None,
    names: tuple[str, ...],
) -> TextEmbeddings:
    """Embeds class names for both halves of the method."""
    grouper_cd = jnp.asarray(
        experiment.embed_classes(config, workdir, clip, names, config.eval.grouper_prompts)
    )
    if config.model.kind == "per_pixel":
        return TextEmbeddings(grouper_cd, None)
    prompts = config.clip.classifier_prompts
    return TextEmbeddings(grouper_cd, jnp.asarray(experiment.embed_names(clip, names, prompts)))


def run_models(
    grouper: Grouper,
    clip: CLIP,
    variables: Any,
    clip_params: Any,
    text: TextEmbeddings,
    images_bhwc: jax.Array,
    sizes_b2: jax.Array,
    *,
    crop_style: str,
    clip_chunk: int,
) -> Queries:
    """Groups the pixels of a batch and lets CLIP name every segment.

    Args:
        grouper: and `clip`, the modules.
        clip: see there.
        variables: the grouper's.
        clip_params: CLIP's.
        text: embeddings of the vocabulary.
        images_bhwc: RGB 0..255 [B, H, W, 3], padded at the bottom and right to multiples of 32.
        sizes_b2: int [B, 2], height and width before padding.
        crop_style: see `segments.segment_images`.
        clip_chunk: segments that CLIP encodes at once.
    """
    output = grouper.apply(variables, normalise_images(images_bhwc, sizes_b2), text.grouper_cd)
    mask_logits_bqhw = output.mask_logits_lbqhw[-1]
    clip_images_bhwc = normalise_images(images_bhwc, sizes_b2, CLIP_MEAN, CLIP_STD)

    def features_of(image_and_masks: tuple[jax.Array, jax.Array]) -> jax.Array:
        return segment_features(
            lambda crops: clip.apply({"params": clip_params}, crops, method=CLIP.encode_image),
            *image_and_masks,
            style=crop_style,
            side=clip.config.image_size,
            chunk=clip_chunk,
        )

    features_bqd = jax.lax.map(features_of, (clip_images_bhwc, mask_logits_bqhw))
    name = partial(
        inference.clip_logits, text_cd=text.classifier_cd, logit_scale=clip_params["logit_scale"]
    )
    return Queries(output.class_logits_lbqc[-1], mask_logits_bqhw, jax.vmap(name)(features_bqd))


@dataclass(frozen=True)
class Subset:
    """The classes of the data set's vocabulary that are reported together.

    Attributes:
        name: of the vocabulary file.
        vocabulary: the classes.
        indices: their places in the data set's vocabulary.
    """

    name: str
    vocabulary: Vocabulary
    indices: np.ndarray

    def table(self, ignore: int) -> np.ndarray:
        """Maps the data set's labels to this vocabulary's, other classes to the ignore label."""
        table = np.full(ignore + 1, ignore, np.int32)
        table[self.indices] = np.arange(len(self.indices))
        return table


def load_subset(name: str, vocabulary: Vocabulary) -> Subset:
    """Finds a vocabulary file's classes in the data set's vocabulary.

    Raises:
        ValueError: a class is not there; the message names it.
    """
    wanted = experiment.load_vocabulary(name)
    missing = [x for x in wanted.names if x not in vocabulary.names]
    if missing:
        raise ValueError(f"eval.vocabularies: '{name}' has '{missing[0]}', the data set has not")
    indices = np.array([vocabulary.names.index(x) for x in wanted.names])
    return Subset(name, vocabulary.select(indices), indices)


@dataclass
class Evaluation:
    """Sums over a data set, and what is reported from them.

    Attributes:
        subsets: the vocabularies, the headline first.
        vocabulary: of the data set.
        shown: the method whose label maps are kept and whose scores come first.
        confusion: int64 [C, C] (label, prediction) by (method, vocabulary's name).
        overlap: summed best-overlap IoU of each class of the data set, and how often it occurs.
        seconds: of the steps, compilation apart.
        images: evaluated in these seconds.
        examples: a few (image, truth, prediction) by `eval.scores`, in the headline vocabulary.
    """

    subsets: tuple[Subset, ...]
    vocabulary: Vocabulary
    shown: str
    confusion: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    overlap: np.ndarray | None = None
    seconds: float = 0.0
    images: int = 0
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def scores(self, method: str, subset: Subset) -> metrics.Scores:
        """The scores of a method in a vocabulary."""
        return metrics.scores_from_confusion(
            self.confusion[method, subset.name], subset.vocabulary.seen
        )

    def segment_fit(self, subset: Subset) -> tuple[float, float]:
        """Mean best-overlap IoU of the seen and of the unseen classes' regions."""
        total, count = self.overlap[:, subset.indices]
        seen = np.asarray(subset.vocabulary.seen)
        return tuple(float(total[m].sum() / max(count[m].sum(), 1)) for m in (seen, ~seen))

    def line(self) -> dict[str, float]:
        """The headline's scores by `shown`, for a training's log."""
        scores = self.scores(self.shown, self.subsets[0])
        values = (scores.seen_iou, scores.unseen_iou, scores.harmonic_iou, scores.pixel_accuracy)
        return dict(zip(("seen", "unseen", SCORE, "pixel_accuracy"), values, strict=True))

    def add_hosts(self) -> None:
        """Adds what the other processes counted on their pictures."""
        if jax.process_count() == 1:
            return
        counts = dict(self.confusion)
        if self.overlap is not None:
            counts[OVERLAP] = self.overlap
        keys = sorted(counts)  # alike on all processes
        # As bytes: the devices have no 64-bit numbers.
        parts = [np.ascontiguousarray(counts[key]) for key in keys]
        gathered = multihost_utils.process_allgather([x.view(np.uint8) for x in parts])
        for key, part, all_bytes in zip(keys, parts, gathered, strict=True):
            total = np.ascontiguousarray(all_bytes).view(part.dtype).sum(0)
            if key == OVERLAP:
                self.overlap = total
            else:
                self.confusion[key] = total

    def add(self, sums: dict[Any, np.ndarray]) -> None:
        """Adds a step's counts."""
        for key, counts in sums.items():
            if key == OVERLAP:
                self.overlap = counts + (0 if self.overlap is None else self.overlap)
            else:
                self.confusion[key] = counts.astype(np.int64) + self.confusion.get(key, 0)


class Evaluator:
    """The jitted evaluation of one model in one data set's vocabulary."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, variables: Any = None):
        """Loads the models and the vocabularies of an experiment.

        Args:
            config: the experiment.
            workdir: where its checkpoints are.
            variables: of the grouper or the baseline, on the host; None reads a checkpoint.
        """
        self.settings = config.eval
        self.kind = config.model.kind
        self.methods = METHODS[self.kind]
        self.shown = config.eval.scores if self.kind == "zegformer" else self.kind
        if self.shown not in self.methods:
            raise ValueError(f"eval.scores '{self.shown}': choose one of {', '.join(self.methods)}")
        self.vocabulary = experiment.dataset_vocabulary(config, workdir)
        self.subsets = tuple(
            load_subset(name, self.vocabulary) for name in config.eval.vocabularies
        )
        if variables is None:
            variables = experiment.load_variables(workdir, config.eval.checkpoint)
        clip = experiment.load_clip_of(config, workdir)
        text = embed_vocabulary(config, workdir, clip, self.vocabulary.names)
        self.clip = clip and clip.module(config.eval.dtype)
        self.model = experiment.build_model(config, text.grouper_cd.shape[1], config.eval.dtype)
        # Each process works on its own pictures; their shapes differ, so its devices are alone.
        self.mesh = mesh = sharding.make_local_mesh()
        self.fixed = sharding.replicate((clip and clip.params, text), mesh)
        self.set_variables(variables)
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

    def set_variables(self, variables: Any) -> None:
        """Evaluates other variables from here on."""
        self.variables = sharding.replicate(variables, self.mesh)

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[dict[Any, np.ndarray], np.ndarray]:
        """Gives a batch's counts, and label maps by `eval.scores` in the headline vocabulary."""
        arrays = {name: array for name, array in batch.items() if name != "id"}
        models = (self.variables, *self.fixed)
        sums, predictions = self.step(models, sharding.to_devices(arrays, self.mesh))
        return jax.device_get(sums), np.concatenate(
            [np.asarray(shard.data) for shard in predictions.addressable_shards]
        )

    def _device_step(self, arrays: Any, batch: Any) -> tuple[dict[Any, jax.Array], jax.Array]:
        """Works on one device's part of a batch, picture by picture, and sums over devices."""
        variables, clip_params, text = arrays
        if self.kind == "per_pixel":
            images = normalise_images(batch["image"], batch["size"])
            queries = self.model.apply(variables, images, text.grouper_cd)
        else:
            queries = run_models(
                self.model, self.clip, variables, clip_params, text, batch["image"], batch["size"],
                crop_style=self.settings.crop_style, clip_chunk=self.settings.clip_chunk,
            )  # fmt: skip
        counts, predictions = jax.lax.map(self._count_picture, (queries, batch))
        total = jax.tree.map(lambda x: jax.lax.psum(x.sum(0), "data"), counts)
        return total, predictions

    def _count_picture(self, picture: Any) -> tuple[dict[Any, jax.Array], jax.Array]:
        """Compares one picture's label maps with the truth, by method and vocabulary."""
        queries, example = picture
        ignore = self.vocabulary.ignore_label
        label = jnp.where(example["valid"], example["label"].astype(jnp.int32), ignore)
        counts, prediction = {}, None
        for method in self.methods:
            for subset in self.subsets:
                labels = self._label_map(queries, example, method, subset)
                truth = jnp.asarray(subset.table(ignore))[label]
                counts[method, subset.name] = metrics.confusion_counts(
                    labels, truth, len(subset.indices), ignore
                )
                if method == self.shown and subset is self.subsets[0]:
                    prediction = labels
        if self.kind == "zegformer":
            counts[OVERLAP] = self._overlap(queries.mask_logits_bqhw, example, label)
        return counts, prediction

    def _label_map(self, queries: Any, example: Any, method: str, subset: Subset) -> jax.Array:
        """One picture's classes by one method, [H, W] at the label's padded size."""
        sizes = {
            "padded_size": example["image"].shape[:2],
            "size": example["size"],
            "original_size": example["original_size"],
            "out_size": example["label"].shape,
            "gamma": self.settings.gamma,
            "seen_c": jnp.asarray(subset.vocabulary.seen),
        }
        if method == "per_pixel":
            logits_chw = queries[..., subset.indices].transpose(2, 0, 1)
            return inference.per_pixel_map(logits_chw, **sizes).argmax(0)
        scores_qc = inference.class_scores(
            inference.select_classes(queries.class_logits_bqc, subset.indices),
            queries.clip_logits_bqc[:, subset.indices],
            jnp.asarray(subset.vocabulary.seen),
            mode=method,
            weight=self.settings.ensemble_weight,
        )
        return inference.label_map(scores_qc, queries.mask_logits_bqhw, **sizes)

    def _overlap(self, mask_logits_qhw: jax.Array, example: Any, label: jax.Array) -> jax.Array:
        """Best-overlap IoU and occurrence of every class, [2, C].

        Segments are compared at the resized size, with the nearest labels.
        """
        height, width = example["image"].shape[:2]
        masks = jax.nn.sigmoid(upsample_masks(mask_logits_qhw, height, width)) > 0.5

        def nearest(axis: int, length: int) -> tuple[jax.Array, jax.Array]:
            size, original = example["size"][axis], example["original_size"][axis]
            index = (2 * jnp.arange(length) + 1) * original // (2 * size)
            return jnp.minimum(index, original - 1), jnp.arange(length) < size

        (rows, in_rows), (columns, in_columns) = nearest(0, height), nearest(1, width)
        sampled = label[rows[:, None], columns[None]]
        inside = in_rows[:, None] & in_columns[None]
        sampled = jnp.where(inside, sampled, self.vocabulary.ignore_label)
        best_c, present_c = metrics.best_overlap_iou(masks, sampled, len(self.vocabulary))
        return jnp.stack([best_c, present_c.astype(jnp.float32)])


def evaluate(
    config: ConfigDict, workdir: epath.PathLike, examples: int = 0, progress: bool = True
) -> Evaluation:
    """Evaluates the newest checkpoint of a workdir on its data set's validation pictures.

    Args:
        config: the experiment.
        workdir: where its checkpoints are.
        examples: number of pictures whose label maps are kept.
        progress: whether to show a progress bar.
    """
    workdir = epath.Path(workdir)
    return run(config, workdir, Evaluator(config, workdir), examples, progress)


def run(
    config: ConfigDict,
    workdir: epath.Path,
    evaluator: Evaluator,
    examples: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluates on the validation pictures, on several hosts together; see `evaluate`."""
    result = Evaluation(evaluator.subsets, evaluator.vocabulary, evaluator.shown)
    source = experiment.open_split(config, workdir, "validation")
    shapes_seen = set()
    with tqdm(
        total=-(-len(source) // jax.process_count()),
        desc=f"evaluate {config.model.kind}",
        disable=not progress or not hosts.is_first(),
        unit="picture",
    ) as bar:
        for batch in validation_batches(config, source, evaluator.vocabulary):
            start = time.perf_counter()
            sums, predictions = evaluator(batch)
            shape = (batch["image"].shape, batch["label"].shape)
            if shape in shapes_seen:  # the first of a shape compiles
                result.seconds += time.perf_counter() - start
                result.images += int(batch["valid"].sum())
            shapes_seen.add(shape)
            result.add(sums)
            for row in range(min(int(batch["valid"].sum()), examples - len(result.examples))):
                result.examples.append(example_of(batch, predictions, row, evaluator))
            bar.update(int(batch["valid"].sum()))
    result.add_hosts()
    return result


def validation_batches(
    config: ConfigDict, source: Any, vocabulary: Vocabulary
) -> Iterator[dict[str, np.ndarray]]:
    """This host's batches of a source's pictures."""
    from zegformer_jax.input import pipeline

    return pipeline.eval_batches(
        source,
        vocabulary,
        batch_size=config.eval.batch_size,
        short_side=config.eval.short_side,
        max_long_side=config.eval.max_long_side,
        num_threads=config.input.threads,
        prefetch=config.input.prefetch * config.eval.batch_size,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )


def example_of(
    batch: dict[str, np.ndarray], predictions: np.ndarray, row: int, evaluator: Evaluator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts one picture, its truth and its prediction out of a batch, in the headline vocabulary."""
    height, width = batch["size"][row]
    label_height, label_width = batch["original_size"][row]
    headline = evaluator.subsets[0]
    table = headline.table(evaluator.vocabulary.ignore_label)
    truth = table[batch["label"][row, :label_height, :label_width]]
    return (
        batch["image"][row, :height, :width],
        truth,
        predictions[row, :label_height, :label_width],
    )
