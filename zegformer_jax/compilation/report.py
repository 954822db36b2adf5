"""Text of what `compile` prints."""

from tabulate import tabulate

from zegformer_jax.compilation.estimate import DoesNotFit, Estimate
from zegformer_jax.experiment import Experiment

NOTE = "These are the compiler's estimates, not measurements."


def describe(estimate: Estimate) -> str:
    """Returns an estimate as text."""
    peak = estimate.peak
    intensity = estimate.flops / max(estimate.bytes, 1)
    balance = peak.flops / peak.bandwidth
    rows = [
        ("memory a chip", f"{_gib(estimate.memory)} of {_gib(estimate.available)}"),
        ("work a chip", f"{estimate.flops / 1e12:.3f} TFLOP"),
        ("memory traffic a chip", _gib(estimate.bytes)),
        ("arithmetic intensity", f"{intensity:.0f} FLOP/byte (the chip's balance: {balance:.0f})"),
        ("estimated time", f"{1e3 * estimate.seconds:.1f} ms"),
        ("of it communication", f"{estimate.communication:.1%}"),
        ("images/s", f"{estimate.images_per_second:.1f}"),
        ("images/s a chip", f"{estimate.images_per_second / estimate.chips:.1f}"),
        ("share of the peak", f"{estimate.share_of_peak:.1%} of {peak.flops / 1e12:.0f} TFLOP/s"),
        *((name, _gib(size)) for name, size in sorted(estimate.collectives.items())),
        ("compiled in", f"{estimate.compile_seconds:.0f} s"),
    ]
    of = f"{estimate.program}: {estimate.images} images on {estimate.chips} chips"
    lines = [f"{of} of {estimate.topology}", tabulate(rows, tablefmt="plain"), ""]
    costly = [
        (f"{1e3 * x.seconds:.2f} ms", f"{x.seconds / estimate.seconds:.1%}", x.opcode, x.source)
        for x in estimate.costliest
    ]
    lines += ["costliest lines", tabulate(costly, tablefmt="plain"), ""]
    if estimate.unbounded:
        lines += ["in loops of unknown length, counted at their bound, or once:"]
        lines += [f"  {line}" for line in estimate.unbounded]
        lines += [""]
    return "\n".join([*lines, NOTE])


def advise(name: str, experiment: Experiment, problem: DoesNotFit) -> str:
    """Returns one line with the changes that make a program fit.

    Args:
        name: `train` or `evaluate`.
        experiment: The experiment.
        problem: What the compiler said.
    """
    if name == "evaluate":
        changes = ["a smaller eval.clip_chunk", "a smaller eval.batch_size"]
    else:
        changes = _of_training(experiment)
    advice = ", ".join(changes)
    return f"{name}: does not fit: {problem} a chip; try {advice}, or a larger slice"


def _of_training(experiment: Experiment) -> list[str]:
    train, batch = experiment.train, experiment.input.batch_size
    changes = []
    if batch % (2 * train.accumulate) == 0:
        changes.append(f"--config.train.accumulate={2 * train.accumulate}")
    if not train.remat:
        changes.append("--config.train.remat=True")
    if not experiment.sharding.params:
        changes.append("--config.sharding.params=data")
    return [*changes, "a smaller input.batch_size"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
