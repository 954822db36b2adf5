"""Which segments CLIP need not see."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zegformer_jax.segmentation.class_scores import foreground_weights, score_bounds, select_classes


class Economy(NamedTuple):
    """Which segments CLIP need not see.

    Attributes:
        skip_below: those whose weight in every pixel of the map is provably below this share one
            encoding with the empty ones; 0 changes nothing.
        top_segments: only so many, with the most foreground, are named by CLIP, the others by the
            grouper; 0: all.
        modes: the ways of scoring that the bound is for.
        weight: of the ensemble.
        vocabularies: those that are scored: places among the classes, and which of them are seen.
    """

    skip_below: float
    top_segments: int
    modes: tuple[str, ...]
    weight: float
    vocabularies: tuple[tuple[Sequence[int], jax.Array], ...]

    def choose(self, class_logits_qc: jax.Array, mask_logits_qhw: jax.Array, scale: jax.Array):
        """Tells which queries CLIP shall see, and which it names: bool [q] each."""
        named_q = jnp.ones(len(class_logits_qc), bool)
        if self.top_segments:
            weights_q = foreground_weights(class_logits_qc, mask_logits_qhw)
            ranks_q = jnp.argsort(jnp.argsort(-weights_q))
            named_q = ranks_q < self.top_segments
        if not self.skip_below:
            return named_q, named_q
        bounds = [
            score_bounds(
                select_classes(class_logits_qc, indices),
                seen_c, scale, mode=mode, weight=self.weight,
            )
            for indices, seen_c in self.vocabularies
            for mode in self.modes
        ]  # fmt: skip
        opacity_q = jax.nn.sigmoid(mask_logits_qhw.astype(jnp.float32)).max((1, 2))
        needed_q = jnp.stack(bounds).max(0) * opacity_q >= self.skip_below
        return named_q & needed_q, named_q
