"""Errors of a trained model in bfloat16, compared with float32.

    python benchmarks/precision.py WORKDIR --classes-file=classes.json IMAGE...

Prints for each image the relative error (root mean square over root mean square) of class logits,
mask logits and CLIP's logits, and the share of pixels whose class changes.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package, if not installed

from zegformer_jax.cli.predict import read_classes
from zegformer_jax.experiment import Experiment
from zegformer_jax.experiment.workdir import load_config
from zegformer_jax.input.photographs import read_photograph
from zegformer_jax.segmenter import Segmenter


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the root mean square of the difference over that of the expected values."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def main(arguments: list[str]) -> None:
    """Segments images in both dtypes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--classes")
    parser.add_argument("--classes-file")
    options = parser.parse_args(arguments)
    classes = read_classes(options)
    segmenters = {}
    for dtype in ("float32", "bfloat16"):
        config = load_config(options.workdir).unlock()
        config.eval.dtype = dtype
        segmenters[dtype] = Segmenter(Experiment(config.lock(), options.workdir))
    print(f"device: {jax.devices()[0].device_kind}; {len(classes)} classes")
    print(f"{'image':<40}{'class':>9}{'mask':>9}{'CLIP':>9}{'pixels changed':>16}")
    for path in options.images:
        image = read_photograph(path)
        exact, rough = (segmenters[x].queries(image, classes) for x in ("float32", "bfloat16"))
        errors = [relative_error(b, a) for a, b in zip(exact, rough, strict=True)]
        labels = [segmenters[x](image, classes).labels for x in ("float32", "bfloat16")]
        changed = np.mean(labels[0] != labels[1])
        cells = "".join(f"{error:>9.1e}" for error in errors)
        print(f"{path[-38:]:<40}{cells}{100 * changed:>14.2f} %", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
