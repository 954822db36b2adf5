"""Segment classifiers by name, as `eval.segment_classifier` chooses one."""

from zegformer_jax.segmentation.classifiers.crops import Crops
from zegformer_jax.segmentation.classifiers.one_pass import OnePass

CLASSIFIERS = {"crops": Crops, "one_pass": OnePass}
