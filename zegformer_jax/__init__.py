"""Zero-shot semantic segmentation in JAX: a class-agnostic grouper, and CLIP that names segments.

segmenter = zegformer_jax.load("runs/openmoji")
segmenter("picture.png", ["sheep", "sofa, couch"]).overlay().save("overlay.png")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zegformer_jax.segmenter import Segmentation, Segmenter, load

__version__ = "0.1.0"
__all__ = ["Segmentation", "Segmenter", "load"]


def __getattr__(name: str) -> Any:
    """Imports the Python API when it is first asked for, so that the import itself is quick."""
    if name in __all__:
        from zegformer_jax import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module 'zegformer_jax' has no attribute '{name}'")
