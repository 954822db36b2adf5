"""Metrics: each counts single images, its counts are summed, and it reports from the sum.

Axes: n way of scoring, g calibration, y x pixels of the label map, h w pixels of the network's
input.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zegformer_jax.segmentation.zegformer import Question

State = Any  # a pytree of arrays; states of several images are added leaf by leaf
States = Mapping[str, State]  # by the metrics' keys, see `by_key`


class Prediction(NamedTuple):
    """Result of the model for one image.

    Attributes:
        outputs: Outputs of the networks for each view, see `segmentation.zegformer`; the first
            view is the plain image.
        question: The question that the label maps answer.
        maps_ngyx: Label maps, int32 [n, g, y, x], indices among the question's classes.
    """

    outputs: Sequence[Any]
    question: Question
    maps_ngyx: jax.Array

    def label_map(self, method: str, gamma: float) -> jax.Array:
        """Returns the label map of one way of scoring and one calibration, int32 [y, x]."""
        methods, gammas = self.question.methods, self.question.gammas
        return self.maps_ngyx[methods.index(method), gammas.index(gamma)]


class Truth(NamedTuple):
    """Labels of one image.

    Attributes:
        label_yx: int32 [y, x] at the original size: indices in the data set's vocabulary or the
            ignore label, which also fills the padding.
        original_size: int32 [2], rows and columns without padding.
        size: int32 [2], rows and columns of the resized image in the network's input.
        padded_size: Static rows and columns of the network's input.
        ignore_label: Static label of pixels that count nowhere.
    """

    label_yx: jax.Array
    original_size: jax.Array
    size: jax.Array
    padded_size: tuple[int, int]
    ignore_label: int

    def resized(self) -> jax.Array:
        """Returns the nearest labels at the network's input, int32 [h, w]."""
        (rows, in_rows), (columns, in_columns) = self._nearest(0), self._nearest(1)
        inside = in_rows[:, None] & in_columns[None]
        return jnp.where(inside, self.label_yx[rows[:, None], columns[None]], self.ignore_label)

    def _nearest(self, axis: int) -> tuple[jax.Array, jax.Array]:
        """Nearest original index of every row or column, and whether it is inside the image."""
        size, original = self.size[axis], self.original_size[axis]
        places = jnp.arange(self.padded_size[axis])
        index = (2 * places + 1) * original // (2 * size)
        return jnp.minimum(index, original - 1), places < size


class Metric(Protocol):
    """Something that is measured; a value that is not changed.

    Attributes:
        name: Name of its row in the report.
        vocabulary: Name of the vocabulary that it is reported for.
        question: The label maps that it reads. Metrics that share a question object share the
            label maps.
    """

    name: str
    vocabulary: str
    question: Question

    def count(self, prediction: Prediction, truth: Truth) -> State:
        """Counts one image, jittable: a pytree of int32 or float32 arrays, 0 for no image."""

    def report(self, state: State) -> Mapping[str, float]:
        """Returns what is reported of summed states: fractions in [0, 1], NaN for none, by name."""


def by_key(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """Returns metrics by the keys of their states.

    Raises:
        ValueError: Two metrics have the same name and vocabulary.
    """
    found: dict[str, Metric] = {}
    for metric in metrics:
        key = f"{metric.vocabulary}/{metric.name}"
        if key in found:
            raise ValueError(f"two metrics are named '{metric.name}' in '{metric.vocabulary}'")
        found[key] = metric
    return found


def zeros(shapes: Any) -> Any:
    """Returns states of no image on the host, in 64 bits.

    Args:
        shapes: States, or their shapes and dtypes.
    """
    return jax.tree.map(
        lambda x: np.zeros(x.shape, np.int64 if x.dtype.kind == "i" else np.float64), shapes
    )


def add(total: Any, more: Any) -> Any:
    """Returns the sum of two states, in the first one's dtypes."""
    return jax.tree.map(lambda x, y: x + np.asarray(y, x.dtype), total, more)
