"""What can be trained."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Variables = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A model's loss, and where its batches come from.

    Attributes:
        init: a random key to the variables: `params` and, with frozen norms, `constants`.
        loss: (params, constants, context, batch, totals, random key) to the scalar loss and the
            `metrics`. Where it `adds_up`, loss and metrics of a batch are the sums of its parts',
            given the totals of the whole.
        metrics: names of what the loss gives besides.
        context: arrays that the loss reads besides (text embeddings).
        batches: the first step to this host's part of the batches from there on.
        totals: (context, batch) to what the whole batch's losses are divided by.
        adds_up: see `loss`.
        finish: called with the trained parameters; writes what others read besides checkpoints.
        name: the `index` of a batch to names of its examples, for messages.
    """

    init: Callable[[jax.Array], Variables]
    loss: Callable[[Any, Any, Any, Batch, Any, jax.Array], tuple[jax.Array, Metrics]]
    metrics: tuple[str, ...]
    context: Any
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    totals: Callable[[Any, Batch], Any] = lambda context, batch: None
    adds_up: bool = False
    finish: Callable[[Any], None] = lambda params: None
    name: Callable[[np.ndarray], list[str]] = lambda index: []
