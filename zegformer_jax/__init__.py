"""Zero-shot semantic segmentation in JAX: a class-agnostic grouper, and CLIP that names segments.

segmenter = zegformer_jax.load("runs/openmoji")
segmenter("image.png", ["sheep", "sofa, couch"]).overlay().save("overlay.png")
"""

import importlib
from typing import TYPE_CHECKING, Any

from zegformer_jax._version import __version__ as __version__

if TYPE_CHECKING:
    from zegformer_jax.evaluation.loop import evaluate
    from zegformer_jax.segmenter import Segmentation, Segmenter, load
    from zegformer_jax.training.loop import train

__all__ = ["Segmentation", "Segmenter", "evaluate", "load", "train"]
_MODULES = {"evaluate": "evaluation.loop", "train": "training.loop"}  # the others: segmenter


def __getattr__(name: str) -> Any:
    """Imports a part of the API at its first use, so that `import zegformer_jax` is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'zegformer_jax' has no attribute '{name}'")
    module = importlib.import_module(f"zegformer_jax.{_MODULES.get(name, 'segmenter')}")
    return getattr(module, name)
