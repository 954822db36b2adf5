"""Random parameters for measurements, without compiling a model's own initialisation."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of norms, linear layers and CLIP (section 2.5).
CONSTANT = {"scale": 1.0, "var": 1.0, "bias": 0.0, "mean": 0.0, "logit_scale": math.log(1 / 0.07)}


def random_variables(init: Callable[..., Any], *arguments: Any) -> Any:
    """Returns variables of the shapes that `init` makes, of a size that keeps activations finite.

    Args:
        init: Makes a model's variables.
        *arguments: Its arguments, or their shapes.
    """
    rng = np.random.default_rng(0)

    def fill(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = str(getattr(path[-1], "key", ""))
        if name in CONSTANT:
            return jnp.full(shape.shape, CONSTANT[name], shape.dtype)
        spread = 1 / math.sqrt(max(math.prod(shape.shape[:-1]), 1))
        return jnp.asarray(spread * rng.standard_normal(shape.shape, np.float32), shape.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(init, *arguments))
