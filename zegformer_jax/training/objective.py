"""The protocol of what can be trained."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Variables = dict[str, Any]


class Objective(Protocol):
    """A model, its loss and its batches.

    `init`, `totals` and `loss` are pure functions that the training loop compiles; arrays that
    they read are arguments, never parts of the compiled program. A class that derives from this
    one inherits the defaults.

    Attributes:
        metrics: Names of the metrics that `loss` returns.
        constants: Arrays by name, such as text embeddings, that join the model's own constants
            in `loss`; no checkpoint holds them.
        adds_up: True if the loss and metrics of a batch are the sums of its parts', given the
            totals of the whole batch.
    """

    metrics: tuple[str, ...]
    constants: Mapping[str, Any] = MappingProxyType({})
    adds_up: bool = False

    def init(self, key: jax.Array) -> Variables:
        """Returns the variables of a new model: `params` and, with frozen norms, `constants`."""

    def totals(self, batch: Batch) -> Any:
        """Returns what the loss of a whole batch is divided by."""

    def loss(
        self, params: Any, constants: Any, batch: Batch, totals: Any, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss and the metrics, all scalars.

        Args:
            params: Trained parameters.
            constants: The model's constants, and the objective's by their names.
            batch: A batch of `batches` without its `index`, or a part of it.
            totals: The whole batch's `totals`.
            key: Random key.
        """

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's part of each batch, from a step up to the last.

        An array `index`, which names the examples in messages, stays on the host.
        """

    def name_examples(self, index: np.ndarray) -> list[str]:
        """Returns the names of examples of a batch, for messages."""
        return []

    def facts(self) -> list[str]:
        """Returns lines on the data and the text embeddings, for the start of a run."""
        return []

    def finish(self, params: Any) -> None:
        """Writes files for other programs, in addition to the checkpoints.

        Args:
            params: Trained parameters, or their averages, on the host.
        """
