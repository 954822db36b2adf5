"""The protocol of segment classifiers.

Axes: q query, c class, d joint embedding, h w pixels at stride 4.
"""

from typing import Any, Protocol

import jax

from zegformer_jax.segmentation.augmentation import View


class SegmentClassifier(Protocol):
    """Classifies the segments of an image: a hashable value without arrays.

    Implement it as a frozen dataclass: first `clip`, the Flax module, then settings, each filled
    from the field of that name in the config's section `eval`.
    """

    def __call__(
        self,
        params: Any,
        view: View,
        mask_logits_qhw: jax.Array,
        text_cd: jax.Array,
        wanted_q: jax.Array,
    ) -> jax.Array:
        """Returns class logits, float32 [q, c].

        Args:
            params: CLIP's parameters.
            view: The image.
            mask_logits_qhw: Mask logits [q, h, w].
            text_cd: Text embeddings of unit length [c, d].
            wanted_q: bool [q]; False: the logits of an empty segment will do.
        """

    def logit_scale(self, params: Any) -> jax.Array:
        """Returns the logarithm of the largest possible logit, scalar."""
