"""The metrics that are counted: one line for each module that makes some of a plan."""

from zegformer_jax.evaluation.metrics import confusion, oracles, segment_fit

METRICS = (
    confusion.make,
    segment_fit.make,
    oracles.make,
)
