"""The Python API: a trained model that segments any image into any classes."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from zegformer_jax.drawing import overlay
from zegformer_jax.experiment import Experiment
from zegformer_jax.input import transforms
from zegformer_jax.input.photographs import Source, read_photograph
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.segmentation.augmentation import make_views
from zegformer_jax.segmentation.zegformer import Prediction, Queries, Question, predict
from zegformer_jax.text.vocabulary import Vocabulary, mark_seen


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A segmented image.

    Attributes:
        image: uint8 RGB [H, W, 3].
        labels: int32 [H, W], indices of classes in `vocabulary`.
        vocabulary: The requested classes; `seen` marks those that the grouper was trained on.
    """

    image: np.ndarray
    labels: np.ndarray
    vocabulary: Vocabulary

    def overlay(self) -> Image.Image:
        """Draws classes and their names over the image."""
        names, seen = self.vocabulary.names, self.vocabulary.seen
        return overlay.overlay(self.image, self.labels, names, seen=seen)

    def label_image(self) -> Image.Image:
        """Returns the label map as an 8-bit image, or 16-bit for more than 256 classes."""
        small = len(self.vocabulary) <= 256
        return Image.fromarray(self.labels.astype(np.uint8 if small else np.uint16))

    def areas(self) -> dict[str, float]:
        """Returns the share of pixels of every class in the label map, largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.vocabulary))
        order = np.argsort(-counts, kind="stable")
        names = self.vocabulary.names
        return {names[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}


class Segmenter:
    """A trained model. Call it with an image and class names."""

    def __init__(self, experiment: Experiment):
        """Loads the model of an experiment: the checkpoint of its workdir, and its CLIP.

        Raises:
            MissingFile: The workdir holds no checkpoint.
            UserError: The model is not a grouper.
        """
        if experiment.kind != "zegformer":
            raise UserError(
                f"{experiment.workdir}: holds a model of kind '{experiment.kind}', a Segmenter "
                "needs 'zegformer'"
            )
        self._experiment = experiment
        self._settings = experiment.eval
        self._model = experiment.segmentation_model
        self._weights = experiment.weights()
        self._embed = lru_cache(maxsize=16)(experiment.text_embeddings)
        self._run = jax.jit(self._predict, static_argnames="out_size")

    def vocabulary(self, classes: Sequence[str]) -> Vocabulary:
        """Returns the vocabulary of class names; commas in a name separate synonyms.

        A class counts as seen if a synonym of it names a class that the grouper was trained on.

        Raises:
            UserError: There is no class, or one is empty or listed twice.
        """
        return mark_seen(Vocabulary.from_names(classes), self._experiment.vocabulary)

    def __call__(self, image: Source, classes: Sequence[str]) -> Segmentation:
        """Segments an image: every pixel gets one of the classes.

        Args:
            image: A path, the bytes of a file, an open file, an image of Pillow, or uint8 RGB
                [H, W, 3]; see `input.photographs`.
            classes: Class names, any words; commas in a name separate synonyms.

        Raises:
            MissingFile: There is no such file.
            UserError: The image cannot be read, or the classes are not a vocabulary.
        """
        vocabulary = self.vocabulary(classes)
        pixels = read_photograph(image)
        prediction = self._run_on(pixels, vocabulary)
        height, width = pixels.shape[:2]
        labels = np.asarray(prediction.maps[0])[0, 0, :height, :width]
        return Segmentation(pixels, labels, vocabulary)

    def queries(self, image: Source, classes: Sequence[str]) -> Queries:
        """Returns the per-query outputs of both halves of the method for the plain view.

        Args:
            image: A path, the bytes of a file, an open file, an image of Pillow, or uint8 RGB
                [H, W, 3]; see `input.photographs`.
            classes: Class names, any words; commas in a name separate synonyms.
        """
        return self._run_on(read_photograph(image), self.vocabulary(classes)).outputs[0]

    def _run_on(self, pixels: np.ndarray, vocabulary: Vocabulary) -> Prediction:
        original = pixels.shape[:2]
        return self._run(
            self._weights,
            self._embed(vocabulary.names),
            jnp.asarray(vocabulary.seen),
            self._resized(pixels),
            np.array(original),
            out_size=transforms.label_sides(*original),
        )

    def _resized(self, pixels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Resizes and pads an image to each of the views' sizes, as `make_views` takes them."""
        images = []
        for side in (self._settings.short_side, *self._settings.more_short_sides):
            size = transforms.resized_sides(*pixels.shape[:2], side, self._settings.max_long_side)
            padded = np.zeros((*transforms.padded_sides(*size), 3), np.uint8)
            padded[: size[0], : size[1]] = transforms.resize_image(pixels, size)
            images.append((padded, np.array(size)))
        return images

    def _predict(self, weights, text, seen_c, images, original_size, out_size) -> Prediction:
        """Segments one image; jitted, so it is compiled once per shape."""
        question = Question(seen_c, (self._settings.scores,), (self._settings.gamma,))
        return predict(
            self._model,
            weights,
            text,
            make_views(images, self._settings.flip),
            [question],
            original_size=original_size,
            out_size=out_size,
        )


def load(workdir: str | Path) -> Segmenter:
    """Loads the trained model of a workdir.

    Args:
        workdir: Folder of a run, local or remote, or of converted weights.

    Raises:
        MissingFile: The workdir holds no trained model.
    """
    return Segmenter(Experiment.open(None, workdir))
