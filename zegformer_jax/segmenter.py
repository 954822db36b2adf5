"""The Python API: a trained model that segments any image into any classes."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from zegformer_jax.drawing import overlay
from zegformer_jax.experiment import Experiment
from zegformer_jax.input import transforms
from zegformer_jax.input.photographs import Photograph, Source, read_reduced
from zegformer_jax.runtime.compiled import keep_programs
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.segmentation.augmentation import View, make_views
from zegformer_jax.segmentation.tiles import Window, blend_tiles, place_tiles
from zegformer_jax.segmentation.zegformer import (
    Prediction,
    Queries,
    Question,
    TextEmbeddings,
    Weights,
    predict,
)
from zegformer_jax.text.vocabulary import Vocabulary, mark_seen

PROGRAMS_KEPT = 8  # compiled programs in memory, of tens of megabytes each: one for each size
# An image that is read at a reduced size keeps this many times the sides that the model sees.
SIDES_KEPT = 2


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A segmented image.

    Attributes:
        image: uint8 RGB [H, W, 3]; smaller if it was read at a reduced size.
        labels: int32 [H, W] at the image's whole size, indices of classes in `vocabulary`.
        vocabulary: The requested classes; `seen` marks those that the grouper was trained on.
    """

    image: np.ndarray
    labels: np.ndarray
    vocabulary: Vocabulary

    def overlay(self, max_pixels: int = overlay.SCREEN) -> Image.Image:
        """Draws classes and their names over the image, at most at `max_pixels` pixels."""
        names, seen, labels = self.vocabulary.names, self.vocabulary.seen, self.labels
        if labels.shape != self.image.shape[:2]:
            labels = transforms.resize_label(labels, self.image.shape[:2])
        return overlay.overlay(self.image, labels, names, seen=seen, max_pixels=max_pixels)

    def label_image(self) -> Image.Image:
        """Returns the label map as an 8-bit image, or 16-bit for more than 256 classes."""
        small = len(self.vocabulary) <= 256
        return Image.fromarray(self.labels.astype(np.uint8 if small else np.uint16))

    def areas(self) -> dict[str, float]:
        """Returns the share of pixels of every class in the label map, largest first."""
        # Row by row, as `bincount` makes a copy in 64 bits.
        counts = sum(np.bincount(row, minlength=len(self.vocabulary)) for row in self.labels)
        order = np.argsort(-counts, kind="stable")
        names = self.vocabulary.names
        return {names[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}


class Segmenter:
    """A trained model. Call it with an image and class names."""

    def __init__(self, experiment: Experiment, say: Callable[[str], None] | None = None):
        """Loads the model of an experiment: the checkpoint of its workdir, and its CLIP.

        Args:
            experiment: The experiment.
            say: Takes a line before each compilation, which can take a minute, and one on tiles.

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
        self._say = say
        self._program = lru_cache(maxsize=PROGRAMS_KEPT)(self._make_program)
        keep_programs()

    def vocabulary(self, classes: Sequence[str]) -> Vocabulary:
        """Returns the vocabulary of class names; commas in a name separate synonyms.

        A class counts as seen if a synonym of it names a class that the grouper was trained on.

        Raises:
            UserError: There is no class, or one is empty or listed twice.
        """
        return mark_seen(Vocabulary.from_names(classes), self._experiment.vocabulary)

    def __call__(
        self, image: Source, classes: Sequence[str], max_pixels: int | None = None
    ) -> Segmentation:
        """Segments an image: every pixel gets one of the classes.

        Args:
            image: A path, the bytes of a file, an open file, an image of Pillow, uint8 RGB
                [H, W, 3], or what `read` returned; see `input.photographs`.
            classes: Class names, any words; commas in a name separate synonyms.
            max_pixels: Most pixels of a file; None: Pillow's limit, 178,956,970.

        Raises:
            MissingFile: There is no such file.
            UserError: The image cannot be read or has too many pixels, or the classes are not a
                vocabulary.
        """
        vocabulary = self.vocabulary(classes)
        photograph = self.read(image, max_pixels)
        if self._settings.tile and max(photograph.size) > self._settings.tile:
            labels = self._label_tiles(photograph.pixels, vocabulary)
        else:
            prediction = self._run_on(photograph, vocabulary)
            height, width = photograph.size
            labels = np.asarray(prediction.maps[0])[0, 0, :height, :width]
        return Segmentation(photograph.pixels, labels, vocabulary)

    def queries(self, image: Source, classes: Sequence[str]) -> Queries:
        """Returns the per-query outputs of both halves of the method for the plain view.

        Args:
            image: A path, the bytes of a file, an open file, an image of Pillow, or uint8 RGB
                [H, W, 3]; see `input.photographs`.
            classes: Class names, any words; commas in a name separate synonyms.
        """
        return self._run_on(self.read(image), self.vocabulary(classes)).outputs[0]

    def read(self, image: Source, max_pixels: int | None = None) -> Photograph:
        """Reads an image, without `eval.tile` no larger than the model needs, see `read_reduced`.

        Args:
            image: The image, as a call takes it.
            max_pixels: Most pixels of a file; None: Pillow's limit.

        Raises:
            MissingFile: There is no such file.
            UserError: The image cannot be read or has too many pixels.
        """
        side = max(self._settings.short_side, *self._settings.more_short_sides, 0)
        kept = None if self._settings.tile else SIDES_KEPT * side
        return read_reduced(image, kept, max_pixels)

    def _label_tiles(self, image_hw3: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Segments an image tile by tile: int32 [H, W]."""
        rows, columns = (place_tiles(side, self._settings.tile) for side in image_hw3.shape[:2])
        tile, cell = (rows.tile, columns.tile), (rows.longest, columns.longest)
        text, seen_c = self._embed(vocabulary.names), np.asarray(vocabulary.seen, bool)
        if self._say is not None:
            count = len(rows.starts) * len(columns.starts)
            self._say(f"{count:,} tiles of {tile[0]} x {tile[1]} pixels")

        def run(rows: slice, columns: slice) -> list[Queries]:
            images = self._resized(Photograph(image_hw3[rows, columns], tile))
            program = self._program(self._run_tile, _shapes(images), len(vocabulary))
            return program(self._weights, text, seen_c, images)

        def blend(outputs: list[list[Queries]], windows: list[Window]) -> np.ndarray:
            program = self._program(
                self._blend_cell, tile, len(vocabulary), tile_size=tile, out_size=cell
            )
            return program(outputs, windows, seen_c)

        return blend_tiles(rows, columns, run, blend)

    def _run_on(self, photograph: Photograph, vocabulary: Vocabulary) -> Prediction:
        images, out_size = self._resized(photograph), transforms.label_sides(*photograph.size)
        program = self._program(self._predict, _shapes(images), len(vocabulary), out_size=out_size)
        return program(
            self._weights,
            self._embed(vocabulary.names),
            np.asarray(vocabulary.seen, bool),
            images,
            np.array(photograph.size),
        )

    def _make_program(
        self,
        function: Callable[..., Any],
        shapes: tuple[tuple[int, ...], ...],
        classes: int,
        **static: tuple[int, int],
    ) -> Callable[..., Any]:
        """Returns a function that is compiled at its first call, and forgotten with its program.

        Args:
            function: What is compiled.
            shapes: Shapes of the images, for which alone the program is called.
            classes: Number of classes of all calls.
            **static: Arguments of the function that are the same for all calls.
        """
        del shapes, classes  # keys of the cache
        if self._say is not None:
            self._say("compiling ...")
        return jax.jit(partial(function, **static))

    def _resized(self, photograph: Photograph) -> list[tuple[np.ndarray, np.ndarray]]:
        """Resizes and pads an image to each of the views' sizes, as `make_views` takes them."""
        images = []
        for size in self._view_sizes(photograph.size):
            padded = np.zeros((*transforms.padded_sides(*size), 3), np.uint8)
            padded[: size[0], : size[1]] = transforms.resize_image(photograph.pixels, size)
            images.append((padded, np.array(size)))
        return images

    def _view_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Returns height and width of each view of an image, mirrored ones left out."""
        sides = (self._settings.short_side, *self._settings.more_short_sides)
        limit = self._settings.max_long_side
        return [transforms.resized_sides(*size, side, limit) for side in sides]

    def _question(self, seen_c: Any) -> Question:
        return Question(seen_c, (self._settings.scores,), (self._settings.gamma,))

    def _predict(
        self,
        weights: Weights,
        text: TextEmbeddings,
        seen_c: jax.Array,
        images: list[tuple[jax.Array, jax.Array]],
        original_size: jax.Array,
        out_size: tuple[int, int],
    ) -> Prediction:
        """Segments one image."""
        return predict(
            self._model,
            weights,
            text,
            make_views(images, self._settings.flip),
            [self._question(seen_c)],
            original_size=original_size,
            out_size=out_size,
        )

    def _run_tile(
        self,
        weights: Weights,
        text: TextEmbeddings,
        seen_c: jax.Array,
        images: list[tuple[jax.Array, jax.Array]],
    ) -> list[Queries]:
        """Runs the networks on each view of a tile."""
        question = self._question(seen_c)
        views = make_views(images, self._settings.flip)
        return [self._model.run(weights, text, view, [question]) for view in views]

    def _blend_cell(
        self,
        outputs: list[list[Queries]],
        windows: list[Window],
        seen_c: jax.Array,
        tile_size: tuple[int, int],
        out_size: tuple[int, int],
    ) -> jax.Array:
        """Makes the label map of a cell, int32 [y, x], from the outputs of four tiles."""
        mirrored, sizes = (False, True)[: 1 + self._settings.flip], self._view_sizes(tile_size)
        views = [View(None, jnp.array(size), mirror) for mirror in mirrored for size in sizes]
        (maps,) = self._model.label_maps(
            [output for of_tile in outputs for output in of_tile],
            views * len(outputs),
            [self._question(seen_c)],
            original_size=tile_size,
            out_size=out_size,
            windows=windows,
        )
        return maps[0, 0]


def _shapes(images: list[tuple[np.ndarray, np.ndarray]]) -> tuple[tuple[int, ...], ...]:
    return tuple(image.shape for image, _ in images)


def load(workdir: str | Path) -> Segmenter:
    """Loads the trained model of a workdir.

    Args:
        workdir: Folder of a run, local or remote, or of converted weights.

    Raises:
        MissingFile: The workdir holds no trained model.
    """
    return Segmenter(Experiment.open(None, workdir))
