"""PASCAL VOC 2012 validation with background as one class, for cross-dataset evaluation."""

import dataclasses
from functools import cached_property

import numpy as np

from zegformer_jax.input.benchmarks import files
from zegformer_jax.input.benchmarks.pascal_voc import BACKGROUND, BORDER, VOC_2012, PascalVoc
from zegformer_jax.input.benchmarks.published import VALIDATION
from zegformer_jax.text.vocabulary import Vocabulary

NUM_OBJECTS = 20  # VOC's classes; the other classes are kinds of background


@dataclasses.dataclass(frozen=True, eq=False)
class PascalVoc20b(PascalVoc):
    """VOC's validation images; background has label 20, the first of the other classes.

    The vocabulary names 59 classes: VOC's 20, then the 39 of PASCAL-Context outside them. The
    annotation does not distinguish the 39, so evaluation merges them: `merge_table`.
    """

    @property
    def merged_names(self) -> tuple[str, ...]:
        """The 21 classes that are evaluated: VOC's 20, then "background"."""
        return (*self.load_vocabulary().names[:NUM_OBJECTS], "background")

    def label_vocabulary(self) -> Vocabulary:
        """Returns the 21 classes; see `Benchmark.label_vocabulary`."""
        return Vocabulary.from_names(self.merged_names)

    def merge_table(self) -> np.ndarray:
        """Returns the table from predictions or labels to the 21 classes that are evaluated.

        Returns:
            uint8 [256]: 0..19 stay, 20..58 become 20; 255, the ignore label, and the unused values
            below it become 255.
        """
        vocabulary = self.load_vocabulary()
        table = np.full(vocabulary.ignore_label + 1, vocabulary.ignore_label, np.uint8)
        table[: len(vocabulary)] = np.minimum(np.arange(len(vocabulary)), NUM_OBJECTS)
        return table

    @cached_property
    def _table(self) -> np.ndarray:
        ids = (*range(1, NUM_OBJECTS + 1), BACKGROUND)
        return files.label_table(ids, (BORDER,), self.load_vocabulary().ignore_label)


BENCHMARK = PascalVoc20b(
    name="pascal_voc_20b",
    vocabulary="pascal_voc_20b",
    counts={VALIDATION: 1449},
    category_offset=1,
    archives=(VOC_2012,),
    advice="Label 0 (background) is a class here; 255 (border) is ignored.",
)
