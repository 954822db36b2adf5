"""Evaluates, as one of several processes if there are more, and writes all that is counted.

Arguments: kind, workdir, the file to write, and as JSON further fields of `eval`, or `scenes`, the
number of images.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import shrunk

from zegformer_jax.evaluation import loop
from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.processes import is_first, join


def main(kind: str, workdir: str, path: str, fields: str = "{}") -> None:
    join()
    config = shrunk.beside(Path(workdir), kind).unlock()
    fields = json.loads(fields)
    scenes = fields.pop("scenes", shrunk.VALIDATION_SCENES)
    config.dataset.options.validation_scenes = scenes
    config.eval.update(fields)
    folder = workdir if kind == "zegformer" else f"{workdir}/{kind}"
    result = loop.evaluate(Experiment.open(config.lock(), folder))
    if is_first():
        leaves = jax.tree_util.tree_leaves_with_path(result.states)
        states = {jax.tree_util.keystr(path): array for path, array in leaves}
        np.savez(path, **states, images=result.images)


if __name__ == "__main__":
    main(*sys.argv[1:])
