"""Trains and evaluates the whole method on the built-in benchmark.

Nothing is downloaded. Writes report.md, scenes.png and losses.png into the workdir. Run the same
command to resume: finished stages are not repeated.

Examples:
  %(prog)s
  %(prog)s --seed=1 --workdir=runs/seed_1
"""

import argparse

from zegformer_jax.cli import config
from zegformer_jax.cli.train import stopping

WORKDIR = "runs/openmoji"
CONFIG = "configs/openmoji.py"  # a variant for each training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--workdir", default=WORKDIR, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of every training; default: 0")


def run(options: argparse.Namespace) -> None:
    """Runs all stages and prints a summary."""
    from zegformer_jax.cli.demo_stages import KINDS, run_stages
    from zegformer_jax.evaluation.report.tables import summary

    configs = {
        kind: config.override(config.load(f"{CONFIG}:{kind}"), [f"--config.seed={options.seed}"])
        for kind in KINDS
    }
    with stopping(options.workdir):
        report = run_stages(configs, options.workdir)
    print(f"\n{summary(report)}\nreport: {options.workdir}/report.md, scenes.png, losses.png")
