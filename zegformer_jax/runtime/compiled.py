"""Compiled programs: where they are kept, and their memory and cost, as XLA states them."""

import contextlib
from typing import Any

import jax

from zegformer_jax.runtime.environment import programs_folder


def keep_programs() -> None:
    """Keeps compiled programs on disk for other processes, unless jax has a folder for them."""
    if jax.config.jax_compilation_cache_dir is None:
        with contextlib.suppress(RuntimeError):  # the user has no home
            jax.config.update("jax_compilation_cache_dir", programs_folder())


def cost_of(compiled: Any) -> str:
    """Describes a compiled function's memory and FLOP on each device."""
    cost = compiled.cost_analysis() or {}
    flops = cost.get("flops", float("nan"))
    return f"{peak_bytes(compiled) / 2**30:.2f} GiB at its peak, {flops / 1e9:.1f} GFLOP a device"


def peak_bytes(compiled: Any) -> float:
    """Returns the memory of a compiled function on each device; NaN if XLA does not tell."""
    memory = compiled.memory_analysis()
    if memory is None:
        return float("nan")
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return arrays - memory.alias_size_in_bytes + memory.temp_size_in_bytes
