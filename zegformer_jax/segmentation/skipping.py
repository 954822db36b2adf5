"""Finds the segments that cannot change a label map, which the segment classifier skips.

Axes: q query, c class, h w pixels at stride 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zegformer_jax.runtime.errors import UserError
from zegformer_jax.segmentation.class_scores import foreground_weights, score_bounds, select_classes


@dataclass(frozen=True)
class Skipping:
    """The rule by which segments are skipped; the default skips none.

    Attributes:
        skip_below: A segment whose weight in every pixel of the label map is provably below this
            is not shown to the classifier and gets the logits of an empty segment. 0: no such
            test (the classifier itself leaves out empty segments).
        top_segments: The classifier sees only this many segments, those with the most foreground;
            the grouper alone scores the others. 0: all.

    Raises:
        UserError: A field is negative.
    """

    skip_below: float = 0.0
    top_segments: int = 0

    def __post_init__(self):
        """Checks the fields."""
        for name in ("skip_below", "top_segments"):
            if not getattr(self, name) >= 0:
                raise UserError(f"eval.{name} {getattr(self, name)}: give 0 or more")

    def choose(
        self,
        class_logits_qc1: jax.Array,
        mask_logits_qhw: jax.Array,
        logit_scale: jax.Array,
        scorings: Sequence[tuple[Sequence[int] | None, jax.Array, str]],
        ensemble_weight: float,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns which queries to show to the classifier, and whose logits of it are used.

        Args:
            class_logits_qc1: The grouper's class logits [q, c + 1], "no object" last.
            mask_logits_qhw: Mask logits [q, h, w].
            logit_scale: Logarithm of the classifier's largest possible logit, scalar.
            scorings: Every way in which the queries will be scored: the classes' indices (None for
                all), bool [k] whether each is seen, and the mode (see `class_scores`).
            ensemble_weight: Weight of the ensemble.
        """
        named_q = jnp.ones(len(class_logits_qc1), bool)
        if self.top_segments:
            weights_q = foreground_weights(class_logits_qc1, mask_logits_qhw)
            ranks_q = jnp.argsort(jnp.argsort(-weights_q))
            named_q = ranks_q < self.top_segments
        if not self.skip_below:
            return named_q, named_q
        bounds = [
            score_bounds(
                select_classes(class_logits_qc1, indices),
                seen_c,
                logit_scale,
                mode=mode,
                weight=ensemble_weight,
            )
            for indices, seen_c, mode in scorings
        ]
        opacity_q = jax.nn.sigmoid(mask_logits_qhw.astype(jnp.float32)).max((1, 2))
        needed_q = jnp.stack(bounds).max(0) * opacity_q >= self.skip_below
        return named_q & needed_q, named_q
