"""An experiment without networks: the colours of its images are their classes."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import shrunk
from array_source import ArraySource

from zegformer_jax.experiment import settings
from zegformer_jax.experiment.origins import Origin
from zegformer_jax.segmentation.zegformer import TextEmbeddings, Weights
from zegformer_jax.text.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_names(["a", "b", "c"], [True, True, False])
IGNORE = VOCABULARY.ignore_label
LEVELS = 50  # of red from one class to the next
HEIGHT, WIDTH = 8, 9


class Records(ArraySource):
    """Images whose red is the class of every pixel, also of those with an ignored label."""

    def __init__(self, count: int = 5, prefix: str = "r"):
        rng = np.random.default_rng(0)
        classes = [rng.integers(0, 3, (HEIGHT, WIDTH + i)).astype(np.uint8) for i in range(count)]
        super().__init__(
            images=[np.stack([LEVELS * c, 0 * c, 0 * c], -1) for c in classes],
            labels=[np.where(rng.random(c.shape) < 0.2, np.uint8(IGNORE), c) for c in classes],
            ids=[f"{prefix}{i}" for i in range(count)],
        )


@dataclass(frozen=True)
class Shift:
    """Takes every class for the one that is `weights.model` places after it; or for itself."""

    methods: ClassVar[tuple[str, ...]] = ("shift", "stay")

    def run(self, weights, text, view, questions):
        classes_yx = view.image_hwc[..., 0].astype(jnp.int32) // LEVELS
        return jnp.stack([(classes_yx + weights.model["shift"]) % 3, classes_yx])

    def label_maps(self, outputs, views, questions, *, original_size, out_size):
        return [self._answer(outputs[0], question, out_size) for question in questions]

    def _answer(self, classes_nyx, question, out_size):
        chosen_nyx = classes_nyx[jnp.array([self.methods.index(x) for x in question.methods])]
        scores_nyxc = jax.nn.one_hot(chosen_nyx, 3)[..., jnp.array(question.indices)]
        seen_c = jnp.asarray(question.seen_c, jnp.float32)[None, None, None]
        maps = [(scores_nyxc - gamma * seen_c).argmax(-1) for gamma in question.gammas]
        maps_ngyx = jnp.stack(maps, 1)[..., : out_size[0], : out_size[1]]
        sides = zip(out_size, maps_ngyx.shape[2:], strict=True)
        missing = [(0, most - side) for most, side in sides]
        return jnp.pad(maps_ngyx, [(0, 0), (0, 0), *missing]).astype(jnp.int32)


class ToyExperiment:
    """Experiment without a folder: it has the attributes that an evaluation reads."""

    kind, vocabulary = "toy", VOCABULARY
    dataset = SimpleNamespace(name="words")
    input = SimpleNamespace(threads=1, prefetch=1)
    segmentation_model = Shift()
    dataset_directory, origin = "words", Origin("toy")

    def __init__(self, source: Records | None = None, shift: int = 1, **fields):
        evaluation = settings.read_section(settings.EvalSettings, shrunk.get_config().eval)
        fields = {"vocabularies": (), "short_side": HEIGHT, "scores": "shift"} | fields
        self.eval = dataclasses.replace(evaluation, **fields)
        self.source, self.shift = Records() if source is None else source, shift
        self.config_json = repr(self.eval)

    def open_split(self, split):
        return self.source

    def facts(self, split, images):
        return [f"{images} images ({split})"]

    def weights(self, variables=None):
        return Weights(variables or {"shift": np.int32(self.shift)})

    def text_embeddings(self, names):
        return TextEmbeddings(np.zeros((len(names), 2), np.float32))
