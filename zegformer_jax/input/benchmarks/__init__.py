"""Registry of the data sets: a new one is a module, its vocabulary and a line in `BENCHMARKS`."""

import importlib
from typing import TYPE_CHECKING

from zegformer_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from zegformer_jax.input.benchmarks.benchmark import Benchmark

FOLDER = "folder"  # a user's own data set
GENERATED = "openmoji_voc"  # the built-in benchmark, which is generated and never prepared

# Modules by the data set's name; the constant `BENCHMARK` of a module reads the data set's files.
BENCHMARKS = {
    "pascal_voc": "zegformer_jax.input.benchmarks.pascal_voc",
    "coco_stuff": "zegformer_jax.input.benchmarks.coco_stuff",
    "ade20k_full": "zegformer_jax.input.benchmarks.ade20k_full",
    "ade20k_150": "zegformer_jax.input.benchmarks.ade20k_150",
    "pascal_context_59": "zegformer_jax.input.benchmarks.pascal_context_59",
    "pascal_context_459": "zegformer_jax.input.benchmarks.pascal_context_459",
    "pascal_voc_20b": "zegformer_jax.input.benchmarks.pascal_voc_20b",
}


def names() -> tuple[str, ...]:
    """Returns the names of all data sets."""
    return (FOLDER, GENERATED, *BENCHMARKS)


def find(name: str) -> "Benchmark":
    """Returns a registered benchmark.

    Raises:
        UserError: There is no such benchmark; the message lists all of them.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[name]).BENCHMARK


def vocabulary_name(name: str) -> str:
    """Returns the name of a data set's vocabulary; empty for a folder, which has its own."""
    if name == FOLDER:
        return ""
    return GENERATED if name == GENERATED else find(name).vocabulary
