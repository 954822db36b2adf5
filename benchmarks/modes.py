"""Speed and accuracy of the modes of evaluation: images per second and mIoU.

    python benchmarks/modes.py --config=configs/openmoji.py --workdir=runs/openmoji
        [--output=FILE.png] [--rounds=2]

Evaluates a trained grouper in every mode once per round, with the method `eval.scores` and the
headline vocabulary. The first batch of each shape compiles and is not timed. Plots unseen mIoU over
speed.
"""

import argparse
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from zegformer_jax.cli import config as config_flags
from zegformer_jax.evaluation.loop import evaluate
from zegformer_jax.experiment import Experiment

logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS logs every file

# Name: fields of `eval` in which the mode differs, and CLIP's input size (0: unchanged).
MODES = {
    "exact": ({}, 0),
    "bfloat16": ({"dtype": "bfloat16"}, 0),
    "skip_below 0.001": ({"skip_below": 1e-3}, 0),
    "skip_below 0.1": ({"skip_below": 0.1}, 0),
    "top_segments 10": ({"top_segments": 10}, 0),
    "top_segments 5": ({"top_segments": 5}, 0),
    "crop": ({"crop_style": "crop"}, 0),
    "mask": ({"crop_style": "mask"}, 0),
    "one_pass": ({"segment_classifier": "one_pass"}, 0),
    "one_pass, input_size 96": ({"segment_classifier": "one_pass"}, 96),
    "one_pass, input_size 192": ({"segment_classifier": "one_pass"}, 192),
    "resize before": ({"resize": "before"}, 0),
    "flip": ({"flip": True}, 0),
    "flip, 3 sizes": ({"flip": True, "more_short_sides": (72, 120)}, 0),
}
MARKERS = "osDv^<>"


def in_mode(config: ConfigDict, fields: dict[str, Any], input_size: int) -> ConfigDict:
    """Returns the config of an evaluation in one mode."""
    other = ConfigDict(config.to_dict()).unlock()
    other.eval.update(methods=(other.eval.scores,), oracles=False, **fields)
    other.eval.vocabularies = other.eval.vocabularies[:1]
    other.clip.input_size = input_size or other.clip.input_size
    return other.lock()


def measure(config: ConfigDict, workdir: str, rounds: int) -> list[dict[str, Any]]:
    """Returns one row of speed and mIoU per mode; the modes take turns."""
    speeds, lines = {name: [] for name in MODES}, {}
    for _ in range(rounds):
        for name, mode in MODES.items():
            experiment = Experiment.open(in_mode(config, *mode), workdir)
            result = evaluate(experiment, progress=False)
            speeds[name].append(1 / result.seconds_per_image)
            lines[name] = result.line()
    return [
        {"mode": name, "images": statistics.median(speeds[name])} | lines[name] for name in MODES
    ]


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Plots unseen mIoU over images per second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        point = row["images"], 100 * row["unseen"]
        axes.plot(*point, MARKERS[place % len(MARKERS)], label=row["mode"], markersize=8, alpha=0.8)
    figure.legend(loc="outside right upper", fontsize=8)
    axes.set(xlabel="images per second", ylabel="mIoU of unseen classes, %")
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def run(arguments: list[str]) -> None:
    """Measures all modes, prints the table and plots it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    config_flags.add_arguments(parser)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--output", help="a PNG of accuracy over speed")
    parser.add_argument("--rounds", type=int, default=2, help="evaluations per mode")
    options = config_flags.parse(parser, arguments)
    rows = measure(config_flags.read(options), options.workdir, options.rounds)
    print(f"{'mode':<26}{'images/s':>11}{'ratio':>7}{'seen':>7}{'unseen':>8}{'harmonic':>10}")
    for row in rows:
        scores = (100 * row[name] for name in ("seen", "unseen", "harmonic"))
        ratio = row["images"] / rows[0]["images"]
        print(
            "{:<26}{:>11.1f}{:>7.2f}{:>7.1f}{:>8.1f}{:>10.1f}".format(
                row["mode"], row["images"], ratio, *scores
            )
        )
    if options.output:
        draw(rows, options.output)


if __name__ == "__main__":
    run(sys.argv[1:])
