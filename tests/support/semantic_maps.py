"""Maps of class scores before the argmax, which the package never holds."""

import jax

from zegformer_jax.segmentation import label_maps


def semantic_maps(logits_vqhw, views, scores, **options) -> list[jax.Array]:
    """Returns the maps of class scores for each of `scores`, float32 [n, g, c, y, x]."""
    return label_maps.map_strips(
        lambda scores_cyx: scores_cyx, logits_vqhw, views, scores, **options
    )
