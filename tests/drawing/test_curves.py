"""Loss curves, one panel per training."""

import numpy as np

from zegformer_jax.drawing.curves import loss_curves


def test_loss_curves_draws_a_panel_for_each_stage_and_skips_nan():
    history = [(step, {"total": 10.0 / (1 + step), "dice": float("nan")}) for step in range(20)]
    one = loss_curves({"CLIP": history})
    two = loss_curves({"CLIP": history, "grouper": history})
    assert one.mode == "RGB"
    assert two.width == 2 * one.width
    assert len(np.unique(np.asarray(one).reshape(-1, 3), axis=0)) > 10
    assert loss_curves({}).size == one.size
    assert loss_curves({"per-pixel": [], "zero": [(0, {"total": 0.0})]}).width == two.width
