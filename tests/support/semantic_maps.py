"""Maps of class scores before the argmax, which the package never holds."""

import jax
import jax.numpy as jnp

from zegformer_jax.segmentation import label_maps


def semantic_maps(logits_vqhw, views, scores, **options) -> list[jax.Array]:
    """Returns the maps of calibrated class scores for each of `scores`, float32 [n, g, c, y, x]."""

    def calibrate(scores_cyx, seen_c, gamma):
        return scores_cyx - gamma * jnp.asarray(seen_c, jnp.float32)[:, None, None]

    return label_maps.map_strips(calibrate, logits_vqhw, views, scores, **options)
