"""Loss curves."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from zegformer_jax.drawing.palette import palette


def loss_curves(histories: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]) -> Image.Image:
    """Plots training losses, one panel per stage.

    Args:
        histories: For each stage, (step, {name of the loss: value}) in order of the steps. Values
            that are not finite are left out.

    Returns:
        An RGB image; an axis is logarithmic if all its values are positive.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = max(1, len(histories))
    figure = Figure(figsize=(5.2 * panels, 3.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, (stage, history) in zip(axes, histories.items(), strict=False):
        _plot_losses(axis, stage, history)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _plot_losses(axis, stage: str, history) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    losses: dict[str, list[tuple[int, float]]] = {}
    for step, values in history:
        for name, value in values.items():
            if np.isfinite(value):
                losses.setdefault(name, []).append((step, float(value)))
    colours = palette(len(losses)) / 255
    for colour, (name, points) in zip(colours, losses.items(), strict=True):
        axis.plot(*zip(*points, strict=True), label=name, color=colour, linewidth=1.3)
    if losses and all(value > 0 for points in losses.values() for _, value in points):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(title=stage, xlabel="step", ylabel="loss")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if losses:
        axis.legend(fontsize="small", frameon=False, ncols=1 + (len(losses) > 6))
