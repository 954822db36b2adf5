"""Reads a complete model from a checkpoint in the authors' layout."""

from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.zegformer import Checkpoint, from_checkpoint
from zegformer_jax.runtime.errors import UserError


def read_model(tensors: tables.Tensors, where: str, heads: int | None = None) -> Checkpoint:
    """Reads a checkpoint in the authors' layout whose model is complete.

    Args:
        tensors: All that the file holds.
        where: Its name, for messages.
        heads: Attention heads, which nothing in it tells; None: one every 32 channels.

    Raises:
        UserError: A tensor is missing or unknown, or it is MaskFormer's.
    """
    checkpoint = from_checkpoint(tensors, where, heads=heads)
    if checkpoint.summary.new:
        raise UserError(
            f"{where}: MaskFormer's, which cannot name classes it was not trained on: train "
            f"from it with --config.model.start_from={where}"
        )
    return checkpoint
