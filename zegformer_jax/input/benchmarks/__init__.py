"""The data sets' builders: published benchmarks by name, and the embedded one."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zegformer_jax.input.benchmarks.benchmark import Benchmark

BENCHMARKS = (
    "pascal_voc",
    "coco_stuff",
    "ade20k_full",
    "ade20k_150",
    "pascal_context_59",
    "pascal_context_459",
    "pascal_voc_20b",
)


def find(name: str) -> "Benchmark":
    """Gives a published benchmark, the constant `BENCHMARK` of the module of its name.

    Raises:
      ValueError: there is no such benchmark; the message lists those there are.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return importlib.import_module(f"{__name__}.{name}").BENCHMARK
