"""Operations of a program's matrix products and convolutions, whatever the device makes of it."""

import jax

from zegformer_jax.compilation.costs import operations
from zegformer_jax.compilation.hlo import parse


def count_flops(lowered: jax.stages.Lowered) -> float:
    """Returns the operations of a program, with loops counted as often as they run.

    They are counted before the compiler replaces them by calls of libraries, whose operations its
    own analysis does not know.

    Args:
        lowered: The program, for any device.
    """
    program = parse(lowered.compiler_ir("hlo").as_hlo_module().to_string())
    return sum(x.flops * x.times for x in operations(program))
