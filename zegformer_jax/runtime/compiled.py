"""Memory and cost of compiled programs, as XLA states them."""

from typing import Any


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
