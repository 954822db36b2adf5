r"""Compiles a training and an evaluation for TPUs that this machine lacks.

Reads neither data nor weights. Prints the memory that a chip needs, the time that the compiler
estimates and the costliest lines of the code. Exit status 1 if a program does not fit.

Examples:
  %(prog)s --config=configs/coco_stuff.py:r101 --topology=v5e:4x4
  %(prog)s --config=configs/pascal_voc.py:r50 --topology=v4:2x2x1 --what=train \
      --config.train.remat=True --json
"""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from zegformer_jax.cli import config
from zegformer_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from zegformer_jax.experiment import Experiment
    from zegformer_jax.runtime.cloud_tpu import Topology

PROGRAMS = ("train", "evaluate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    config.add_arguments(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="a slice of TPUs by libtpu's name: v5e:2x2, v5e:4x4, v4:2x2x1, v5p:2x2x1, v6e:2x4",
    )
    parser.add_argument(
        "--what",
        default=",".join(PROGRAMS),
        metavar="PROGRAMS",
        help="train, evaluate or train,evaluate (the default)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Compiles each program and prints its costs."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu compiles; no device is opened
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # no device would read a program back
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "-1"  # whole stacks, for the source lines
    names = options.what.split(",")
    for name in names:
        if name not in PROGRAMS:
            raise UserError(f"--what={options.what}: choose among {', '.join(PROGRAMS)}")
    fields = config.read(options)
    from zegformer_jax.compilation.report import describe
    from zegformer_jax.experiment import Experiment
    from zegformer_jax.runtime.cloud_tpu import open_topology

    topology = open_topology(options.topology)
    experiment = Experiment.open(fields, "")
    for name in names:
        found = compile_program(name, experiment, topology)
        print(json.dumps(found.as_json()) if options.json else f"{describe(found)}\n", flush=True)


def compile_program(name: str, experiment: "Experiment", topology: "Topology") -> Any:
    """Returns the estimate of one program.

    Args:
        name: `train` or `evaluate`.
        experiment: The experiment.
        topology: The slice to compile for.

    Raises:
        UserError: The program does not fit; the message says what makes it fit.
    """
    from zegformer_jax.compilation.estimate import DoesNotFit, estimate
    from zegformer_jax.compilation.programs import lower_evaluation, lower_training
    from zegformer_jax.compilation.report import advise

    try:
        if name == "train":
            lowered, chips = lower_training(experiment, topology), len(topology.devices)
            return estimate(name, lowered, topology, chips, experiment.input.batch_size)
        lowered, chips = lower_evaluation(experiment, topology), len(topology.host_devices)
        return estimate(name, lowered, topology, chips, experiment.eval.batch_size)
    except DoesNotFit as problem:
        raise UserError(advise(name, experiment, problem)) from problem
