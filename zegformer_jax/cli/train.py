r"""Trains a model.

Writes checkpoints, metrics and the config into the workdir. Run the same command to resume an
interrupted training; on the same devices the result is bit-identical.

Examples:
  %(prog)s --config=configs/pascal_voc.py:r101 --workdir=runs/voc \
      --config.dataset.directory=records/pascal_voc
  %(prog)s --config=configs/folder.py:tiny --workdir=runs/mine
  %(prog)s --config=configs/coco_stuff.py:r101 --workdir=gs://bucket/coco \
      --config.dataset.directory=gs://bucket/coco_stuff --config.train.validate_every=5000
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from zegformer_jax.cli import config

TERMINATED = 143  # exit status of a process that SIGTERM ended, as a shell gives it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    config.add_arguments(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--change-config",
        action="store_true",
        help="resume with another config than the run began with",
    )


def run(options: argparse.Namespace) -> None:
    """Trains, and says that the training is finished."""
    fields = config.read(options)
    from zegformer_jax.experiment import Experiment
    from zegformer_jax.runtime.processes import join
    from zegformer_jax.training.loop import train

    join()
    with stopping(options.workdir):
        experiment = Experiment.open(fields, options.workdir)
        history = train(experiment, change_config=options.change_config)
    loss = f", loss {history[-1]['loss']:.4f}" if history else ""
    print(f"{options.workdir}: finished, {experiment.train.steps:,} steps{loss}")


@contextlib.contextmanager
def stopping(workdir: str) -> Iterator[None]:
    """Ends the program as SIGTERM does after a training that it stopped."""
    from zegformer_jax.training.loop import Preempted

    try:
        yield
    except Preempted as stopped:
        print(f"{workdir}: {stopped}; run the same command to resume")
        sys.exit(TERMINATED)
