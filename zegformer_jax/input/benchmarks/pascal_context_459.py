"""PASCAL-Context, all 459 classes."""

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np

from zegformer_jax.input.benchmarks import files
from zegformer_jax.input.benchmarks.pascal_context import (
    LABEL_MAPS,
    UNLABELLED,
    VOC_2010,
    PascalContext,
)
from zegformer_jax.input.benchmarks.published import TRAIN, VALIDATION


@dataclasses.dataclass(frozen=True, eq=False)
class PascalContext459(PascalContext):
    """`LabelMap` of the MATLAB files: id 1..459 is class 0..458, 0 is ignored."""

    def _read_ids(self, path: Path) -> np.ndarray:
        return files.read_matlab(path, "LabelMap")

    @cached_property
    def _table(self) -> np.ndarray:
        vocabulary = self.load_vocabulary()
        ids = range(1, len(vocabulary) + 1)
        return files.label_table(ids, (UNLABELLED,), vocabulary.ignore_label)


BENCHMARK = PascalContext459(
    name="pascal_context_459",
    vocabulary="pascal_context_459",
    counts={TRAIN: 4998, VALIDATION: 5104},
    category_offset=1,
    archives=(VOC_2010, LABEL_MAPS),
    advice="Label 0 is ignored; label i is class i - 1. Labels have 16 bits.",
)
