"""The data sets' builders: published benchmarks by name, and the embedded one."""

import importlib
from typing import TYPE_CHECKING

from zegformer_jax.runtime.errors import UserError

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
      UserError: there is no such benchmark; the message lists those there are.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return importlib.import_module(f"{__name__}.{name}").BENCHMARK
