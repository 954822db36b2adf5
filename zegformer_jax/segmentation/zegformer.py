"""ZegFormer: group pixels, classify segments, combine the scores, make the label map.

Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022. A class-agnostic *grouper*
turns an image into segments; a *segment classifier* names each with CLIP. Whoever segments an image
calls `predict`, or its two halves, a model's `run` and `label_maps`.

Axes: v view, q query, c class, n way of scoring, g calibration, h w pixels at stride 4, y x pixels
of the label map, d joint embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.segmentation import label_maps
from zegformer_jax.segmentation.augmentation import View
from zegformer_jax.segmentation.class_scores import (
    ENSEMBLE_WEIGHT,
    class_scores,
    select_classes,
)
from zegformer_jax.segmentation.classifiers.protocol import SegmentClassifier
from zegformer_jax.segmentation.skipping import Skipping
from zegformer_jax.segmentation.tiles import Window


class TextEmbeddings(NamedTuple):
    """Text embeddings of a vocabulary, float32 [c, d], one row of unit length per class.

    Attributes:
        grouper_cd: What the grouper, or the per-pixel baseline, compares with.
        classifier_cd: What the segment classifier compares with; None for the baseline.
    """

    grouper_cd: jax.Array
    classifier_cd: jax.Array | None = None


class Weights(NamedTuple):
    """Arrays of a model.

    Attributes:
        model: Variables of the grouper or of the baseline, `params` and `constants`.
        classifier: Parameters of the segment classifier; None for the baseline.
    """

    model: Any
    classifier: Any = None


class Question(NamedTuple):
    """Label maps to make in one vocabulary: one for each of n methods and g gammas.

    Attributes:
        seen_c: bool [c], whether each class was seen in training.
        methods: The n ways of scoring, of the model's `methods`.
        gammas: The g calibrations; gamma is subtracted from the scores of seen classes.
        indices: The c classes' indices among the text embeddings; None for all of them.
    """

    seen_c: jax.Array
    methods: Sequence[str]
    gammas: Sequence[float | jax.Array] = (0.0,)
    indices: Sequence[int] | None = None


class Prediction(NamedTuple):
    """Result of `predict`.

    Attributes:
        outputs: The model's output for each view, `Queries` or the baseline's logits.
        maps: For each question int32 [n, g, y, x] in 0..c-1.
    """

    outputs: list[Any]
    maps: list[jax.Array]


class Model(Protocol):
    """A model that segments images: `ZegFormer` or `PerPixelBaseline`. Static, without arrays."""

    methods: ClassVar[tuple[str, ...]]

    def run(
        self, weights: Weights, text: TextEmbeddings, view: View, questions: Sequence[Question]
    ) -> Any:
        """Runs the networks on one view."""

    def label_maps(
        self,
        outputs: Sequence[Any],
        views: Sequence[View],
        questions: Sequence[Question],
        *,
        original_size: jax.Array,
        out_size: tuple[int, int],
        windows: Sequence[Window] | None = None,
    ) -> list[jax.Array]:
        """Makes label maps of the outputs for all views; see `segmentation.label_maps`."""


def predict(
    model: Model,
    weights: Weights,
    text: TextEmbeddings,
    views: Sequence[View],
    questions: Sequence[Question],
    *,
    original_size: jax.Array,
    out_size: tuple[int, int],
) -> Prediction:
    """Segments one image.

    Takes one image, so the result never depends on the rest of a batch.

    Args:
        model: The networks and settings.
        weights: The networks' arrays.
        text: Text embeddings of all classes; `Question.indices` selects among them.
        views: The image, see `augmentation.make_views`; the views' scores are averaged.
        questions: Which label maps to make.
        original_size: int [2], rows and columns of the label map; may be traced.
        out_size: Static rows and columns of the result, at least `original_size`; pixels beyond
            `original_size` are undefined.
    """
    outputs = [model.run(weights, text, view, questions) for view in views]
    sizes = {"original_size": original_size, "out_size": out_size}
    return Prediction(outputs, model.label_maps(outputs, views, questions, **sizes))


class Queries(NamedTuple):
    """Per-query outputs of the grouper and the segment classifier.

    Attributes:
        class_logits_qc: Class logits of the grouper, float32 [q, c + 1], "no object" last.
        mask_logits_qhw: Mask logits, float32 [q, h, w].
        clip_logits_qc: Class logits of the segment classifier, float32 [q, c].
        named_q: bool [q]; False: the grouper alone scores this query.
    """

    class_logits_qc: jax.Array
    mask_logits_qhw: jax.Array
    clip_logits_qc: jax.Array
    named_q: jax.Array


@dataclass(frozen=True)
class ZegFormer:
    """The grouper and the segment classifier, without their arrays.

    Attributes:
        grouper: Flax module, see `models.grouper.Grouper`.
        classifier: Classifies the segments, see `classifiers`.
        ensemble_weight: Weight of the grouper on seen classes, lambda in the paper.
        skipping: Which segments the classifier does not see.
        resize: When maps are resized: "after" or "before" the sum over queries.
    """

    grouper: nn.Module
    classifier: SegmentClassifier
    ensemble_weight: float = ENSEMBLE_WEIGHT
    skipping: Skipping = Skipping()
    resize: str = label_maps.RESIZE[0]

    methods: ClassVar[tuple[str, ...]] = ("grouper", "clip", "ensemble", "ensemble_all")

    def run(
        self, weights: Weights, text: TextEmbeddings, view: View, questions: Sequence[Question]
    ) -> Queries:
        """Groups the pixels of a view and classifies every segment."""
        images_bhwc = normalise_images(view.image_hwc[None], view.size[None])
        output = self.grouper.apply(weights.model, images_bhwc, text.grouper_cd, all_layers=False)
        class_logits_qc = output.class_logits_lbqc[0, 0]
        mask_logits_qhw = output.mask_logits_lbqhw[0, 0]
        wanted_q, named_q = self.skipping.choose(
            class_logits_qc,
            mask_logits_qhw,
            self.classifier.logit_scale(weights.classifier),
            [(x.indices, x.seen_c, method) for x in questions for method in x.methods],
            self.ensemble_weight,
        )
        clip_logits_qc = self.classifier(
            weights.classifier, view, mask_logits_qhw, text.classifier_cd, wanted_q
        )
        return Queries(class_logits_qc, mask_logits_qhw, clip_logits_qc, named_q)

    def class_scores(self, queries: Queries, question: Question, method: str) -> jax.Array:
        """Returns the score of every query for every class of a question, float32 [q, c]."""
        clip_logits_qc = queries.clip_logits_qc
        if question.indices is not None:
            clip_logits_qc = clip_logits_qc[:, jnp.asarray(question.indices)]
        return class_scores(
            select_classes(queries.class_logits_qc, question.indices),
            clip_logits_qc,
            question.seen_c,
            mode=method,
            weight=self.ensemble_weight,
            named_q=queries.named_q,
        )

    def label_maps(
        self,
        outputs: Sequence[Queries],
        views: Sequence[View],
        questions: Sequence[Question],
        *,
        original_size: jax.Array,
        out_size: tuple[int, int],
        windows: Sequence[Window] | None = None,
    ) -> list[jax.Array]:
        """Returns for each question int32 [n, g, y, x], every pixel's class."""

        def scores_nqc(queries: Queries, question: Question) -> jax.Array:
            return jnp.stack([self.class_scores(queries, question, x) for x in question.methods])

        return label_maps.label_maps(
            [queries.mask_logits_qhw for queries in outputs],
            views,
            [
                label_maps.ClassScores(
                    [scores_nqc(queries, question) for queries in outputs],
                    question.seen_c,
                    question.gammas,
                )
                for question in questions
            ],
            original_size=original_size,
            out_size=out_size,
            resize=self.resize,
            windows=windows,
        )


@dataclass(frozen=True)
class PerPixelBaseline:
    """The per-pixel zero-shot baseline (paper, section 3.1), without its arrays.

    Attributes:
        model: Flax module, see `models.per_pixel.PerPixel`.
        resize: When maps are resized: "after" or "before" the softmax.
    """

    model: nn.Module
    resize: str = label_maps.RESIZE[0]

    methods: ClassVar[tuple[str, ...]] = ("per_pixel",)

    def run(
        self, weights: Weights, text: TextEmbeddings, view: View, questions: Sequence[Question]
    ) -> jax.Array:
        """Returns the class logits of a view's pixels at stride 4, float32 [c, h, w]."""
        images_bhwc = normalise_images(view.image_hwc[None], view.size[None])
        return self.model.apply(weights.model, images_bhwc, text.grouper_cd)[0].transpose(2, 0, 1)

    def label_maps(
        self,
        outputs: Sequence[jax.Array],
        views: Sequence[View],
        questions: Sequence[Question],
        *,
        original_size: jax.Array,
        out_size: tuple[int, int],
        windows: Sequence[Window] | None = None,
    ) -> list[jax.Array]:
        """Returns for each question int32 [1, g, y, x], every pixel's class."""

        def answer(question: Question) -> jax.Array:
            chosen = slice(None) if question.indices is None else jnp.asarray(question.indices)
            (maps,) = label_maps.label_maps(
                [logits_chw[chosen] for logits_chw in outputs],
                views,
                [label_maps.ClassScores(None, question.seen_c, question.gammas)],
                original_size=original_size,
                out_size=out_size,
                resize=self.resize,
                windows=windows,
            )
            return maps

        return [answer(question) for question in questions]
