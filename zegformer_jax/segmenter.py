"""The Python API: a trained model that segments any picture into any classes."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps, UnidentifiedImageError

from zegformer_jax.drawing import overlay
from zegformer_jax.experiment.data import dataset_vocabulary
from zegformer_jax.experiment.models import (
    build_model,
    embed_vocabulary,
    load_clip_of,
    make_economy,
)
from zegformer_jax.experiment.workdir import load_config, load_variables
from zegformer_jax.input import transforms
from zegformer_jax.segmentation import label_maps
from zegformer_jax.segmentation.augmentation import Version, make_versions
from zegformer_jax.segmentation.class_scores import class_scores
from zegformer_jax.segmentation.zegformer import Queries, TextEmbeddings, run_models
from zegformer_jax.vocabulary import Vocabulary, mark_seen

SHARE_OF_16_BITS = 257  # 65535 / 255

Picture = str | Path | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A picture's classes.

    Attributes:
        image: uint8 RGB [H, W, 3].
        labels: int32 [H, W], places in `vocabulary`.
        vocabulary: the classes that were asked for; `seen` says which the grouper was trained on.
    """

    image: np.ndarray
    labels: np.ndarray
    vocabulary: Vocabulary

    def overlay(self) -> Image.Image:
        """Draws classes and their names over the picture."""
        names, seen = self.vocabulary.names, self.vocabulary.seen
        return overlay.overlay(self.image, self.labels, names, seen=seen)

    def label_image(self) -> Image.Image:
        """Gives the label map as an 8-bit picture, 16-bit for more than 256 classes."""
        small = len(self.vocabulary) <= 256
        return Image.fromarray(self.labels.astype(np.uint8 if small else np.uint16))

    def areas(self) -> dict[str, float]:
        """Gives the share of the pixels of every class that is there, largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.vocabulary))
        order = np.argsort(-counts, kind="stable")
        names = self.vocabulary.names
        return {names[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}


def read_picture(picture: Picture) -> np.ndarray:
    """Reads a picture as uint8 RGB [H, W, 3].

    Takes a path, a PIL image of any mode (transparent pixels become white, 16 bits become 8, EXIF
    orientation is applied) or an array [H, W, 3] uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a whole picture, or the array has another shape or type.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"image is {picture.dtype} {picture.shape}: uint8 [H, W, 3] is needed")
        if not picture.size:
            raise ValueError(f"image is {picture.shape}: it has no pixels")
        return picture
    if isinstance(picture, Image.Image):
        return _to_rgb(picture)
    if not Path(picture).is_file():
        raise FileNotFoundError(f"{picture}: no such picture")
    try:
        with Image.open(picture) as file:
            return _to_rgb(file)
    except UnidentifiedImageError:
        raise ValueError(f"{picture}: not a picture that Pillow can read") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture}: damaged or cut off ({error}): get a whole copy") from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, np.float64)
        wide = image.mode.startswith("I;16") or grey.max(initial=0) > 255
        grey = np.clip(grey / (SHARE_OF_16_BITS if wide else 1), 0, 255)
        image = Image.fromarray(np.round(grey).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


class Segmenter:
    """A trained model. Call it with a picture and class names."""

    def __init__(self, config: ConfigDict, workdir: str | Path):
        """Loads the newest checkpoint of a workdir, and its CLIP.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a grouper's.
        """
        workdir = Path(workdir)
        if config.model.kind != "zegformer":
            raise ValueError(
                f"{workdir}: holds a model of kind '{config.model.kind}', a Segmenter needs "
                "'zegformer'"
            )
        self.config = config
        self._workdir = workdir
        self._clip = load_clip_of(config, workdir)
        self._clip_module = self._clip.module(config.eval.dtype)
        self._model = build_model(config, self._clip.config.embed_dim, config.eval.dtype)
        self._variables = load_variables(workdir)
        self._trained = dataset_vocabulary(config, workdir)
        self._embed = lru_cache(maxsize=16)(self._embed_names)
        self._run = jax.jit(self._label_map, static_argnames="out_size")
        self._run_models = jax.jit(self._query_models)

    def vocabulary(self, classes: Sequence[str]) -> Vocabulary:
        """Makes a vocabulary of class names; commas in a name separate synonyms.

        A class counts as seen if a synonym of it names a class that the grouper was trained on.

        Raises:
            ValueError: there is no class, or one is empty or there twice.
        """
        return mark_seen(Vocabulary.from_names(classes), self._trained)

    def __call__(self, image: Picture, classes: Sequence[str]) -> Segmentation:
        """Segments a picture: every pixel gets one of the classes.

        Args:
            image: a path, a PIL image or uint8 RGB [H, W, 3].
            classes: class names, any words; commas in a name separate synonyms.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the picture cannot be read, or the classes are not a vocabulary.
        """
        vocabulary = self.vocabulary(classes)
        pixels = read_picture(image)
        original = pixels.shape[:2]
        labels = self._run(
            *self._arrays(vocabulary),
            jnp.asarray(vocabulary.seen),
            self._pad(pixels),
            np.array(original),
            out_size=transforms.label_sides(*original),
        )
        labels = np.asarray(labels)[: original[0], : original[1]]
        return Segmentation(pixels, labels, vocabulary)

    def queries(self, image: Picture, classes: Sequence[str]) -> Queries:
        """What both halves of the method say of every query of a picture.

        Args:
            image: as for a call.
            classes: as for a call.
        """
        vocabulary = self.vocabulary(classes)
        seen_c = jnp.asarray(vocabulary.seen)
        return self._run_models(*self._arrays(vocabulary), seen_c, self._pad(read_picture(image)))

    def _arrays(self, vocabulary: Vocabulary) -> tuple:
        return self._variables, self._clip.params, self._embed(vocabulary.names)

    def _pad(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Resizes a picture and pads it, as `halves.make_versions` takes it."""
        settings, picture = self.config.eval, {}
        for place, side in enumerate((settings.short_side, *settings.more_short_sides)):
            number = f"_{place}" if place else ""
            size = transforms.resized_sides(*pixels.shape[:2], side, settings.max_long_side)
            padded = np.zeros((*transforms.padded_sides(*size), 3), np.uint8)
            padded[: size[0], : size[1]] = transforms.resize_image(pixels, size)
            picture[f"image{number}"] = padded
            picture[f"size{number}"] = np.array(size)
        return picture

    def _embed_names(self, names: tuple[str, ...]) -> TextEmbeddings:
        return embed_vocabulary(self.config, self._workdir, self._clip, names)

    def _query_models(self, variables, clip_params, text, seen_c, picture) -> Queries:
        plain = make_versions(picture, False)[0]
        return self._queries(variables, clip_params, text, seen_c, plain)

    def _queries(self, variables, clip_params, text, seen_c, version: Version) -> Queries:
        settings = self.config.eval
        return run_models(
            self._model, self._clip_module, variables, clip_params, text, version,
            crop_style=settings.crop_style, clip_chunk=settings.clip_chunk,
            one_pass_layers=settings.one_pass_layers,
            economy=make_economy(
                self.config, (settings.scores,), [(range(len(seen_c)), seen_c)]
            ),
        )  # fmt: skip

    def _label_map(
        self, variables, clip_params, text, seen_c, picture, original_size, out_size
    ) -> jax.Array:
        """Classes [out_size] of one picture."""
        settings, views, scores = self.config.eval, [], []
        for version in make_versions(picture, settings.flip):
            queries = self._queries(variables, clip_params, text, seen_c, version)
            scores_qc = class_scores(
                queries.class_logits_qc,
                queries.clip_logits_qc,
                seen_c,
                mode=settings.scores,
                weight=settings.ensemble_weight,
                named_q=queries.named_q,
            )
            scores.append(scores_qc[None])
            views.append(label_maps.View(queries.mask_logits_qhw, version.size, version.mirrored))
        ((labels,),) = label_maps.label_maps(
            views,
            [label_maps.Question(scores, seen_c, (settings.gamma,))],
            original_size=original_size,
            out_size=out_size,
            resize=settings.resize,
        )[0]
        return labels


def load(workdir: str | Path) -> Segmenter:
    """Loads the trained model of a workdir.

    Raises:
        FileNotFoundError: there is none.
    """
    return Segmenter(load_config(workdir), workdir)
