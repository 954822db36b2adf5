r"""Evaluates a trained model on its data set, or on others.

Prints the scores and writes tables. Run the same command to resume an interrupted evaluation.

Examples:
  %(prog)s --workdir=runs/coco
  %(prog)s --workdir=runs/coco --config.eval.flip=True \
      --datasets=coco_stuff,ade20k_150,folder=mine --predictions=png
  %(prog)s --config=configs/coco_stuff.py:r101 --checkpoint=zegformer.pth
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from zegformer_jax.cli import config
from zegformer_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from zegformer_jax.evaluation.checkpoint import Source
    from zegformer_jax.evaluation.evaluation import Evaluation
    from zegformer_jax.evaluation.targets import Target
    from zegformer_jax.experiment.origins import Origin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    config.add_arguments(parser, of_workdir=True, sections=("clip", "dataset", "eval"))
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", default="", metavar="DIR", help="folder of a training")
    model.add_argument(
        "--checkpoint",
        default="",
        metavar="PATH",
        help="WORKDIR/checkpoints/STEP, or a checkpoint in the authors' layout",
    )
    parser.add_argument(
        "--datasets",
        default="",
        metavar="NAME[=DIR],...",
        help="data sets to evaluate on instead of the experiment's own; without DIR: the "
        "directory NAME beside the experiment's own data set",
    )
    parser.add_argument(
        "--output",
        default="",
        metavar="DIR",
        help="folder for the tables; default: WORKDIR/evaluation, or beside the checkpoint",
    )
    parser.add_argument(
        "--predictions",
        default="",
        metavar="KINDS",
        help="also write label maps: png, rle, instances, panoptic, or several by commas",
    )


def run(options: argparse.Namespace) -> None:
    """Evaluates on every data set in turn."""
    fields = read_config(options)
    from etils import epath

    from zegformer_jax.evaluation.checkpoint import open_source
    from zegformer_jax.evaluation.report.predictions import parse_kinds
    from zegformer_jax.evaluation.targets import choose
    from zegformer_jax.experiment import Experiment
    from zegformer_jax.runtime.processes import join

    kinds = parse_kinds(options.predictions)
    join()
    open_experiment = partial(Experiment.open, fields)
    source = open_source(options.workdir, options.checkpoint, open_experiment)
    results = epath.Path(options.output or source.results)
    targets = choose(options.datasets, source.experiment)
    for target in targets:
        target.check_results(results / target.results)
    for target in targets:
        evaluate_on(target, source, results / target.results, kinds)


def read_config(options: argparse.Namespace) -> Any:
    """Returns the config of `--config`, else that of the workdir, with the fields changed.

    Raises:
        MissingFile: No config is given, and the workdir holds none.
        UserError: No config is given, and the checkpoint is in no workdir.
    """
    if options.config:
        return config.read(options)
    from etils import epath

    from zegformer_jax.experiment.workdir import CONFIG_FILE, load_config

    workdir = options.workdir
    if options.checkpoint:
        workdir = epath.Path(options.checkpoint).parent.parent  # WORKDIR/checkpoints/STEP
        if not (workdir / CONFIG_FILE).exists():
            raise UserError(f"{options.checkpoint}: in no workdir, so give --config, too")
    return config.override(load_config(workdir), options.fields)


def evaluate_on(target: "Target", source: "Source", folder: Any, kinds: Sequence[str]) -> None:
    """Evaluates on one data set; an interrupted evaluation writes its tables, too.

    Args:
        target: The data set.
        source: The model.
        folder: A local or remote folder for the tables and the label maps.
        kinds: Kinds of files of label maps to write, see `report.predictions`.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came.
        UserError: The processes do not share the folder, which COCO's files need.
    """
    from zegformer_jax.evaluation.evaluation import Interrupted
    from zegformer_jax.evaluation.evaluator import Evaluator
    from zegformer_jax.evaluation.loop import evaluate
    from zegformer_jax.evaluation.report.coco import make_categories
    from zegformer_jax.evaluation.report.predictions import LabelMapWriter
    from zegformer_jax.evaluation.resume import ResumeFile
    from zegformer_jax.runtime.processes import is_first, wait_for_all

    origin = target.experiment.origin  # here, as all processes open the checkpoints together
    evaluator = Evaluator(target.experiment, source.variables, target.trained)
    categories = make_categories(evaluator.plan.subsets[0].vocabulary, target.name)
    with ResumeFile(folder, note=",".join(sorted(kinds))) as resume:
        keep = LabelMapWriter(folder, kinds, categories, resume) if kinds else None
        try:
            result = evaluate(target.experiment, evaluator=evaluator, keep=keep, resume=resume)
        except Interrupted as stopped:
            if stopped.evaluation is not None:
                _report(stopped.evaluation, origin, target, source, folder)
            raise
        if keep is not None and is_first():
            keep.finish(result.of)
        _report(result, origin, target, source, folder)
        wait_for_all("tables are written")  # until then another process may have to resume


def _report(
    evaluation: "Evaluation", origin: "Origin", target: "Target", source: "Source", folder: Any
) -> None:
    """Writes the tables and prints the scores, in the first process."""
    from zegformer_jax.evaluation.report import files
    from zegformer_jax.evaluation.report.published import published_lines
    from zegformer_jax.evaluation.report.schema import describe
    from zegformer_jax.runtime.processes import is_first

    if is_first():
        published = published_lines(evaluation.plan.model, source.experiment, target.name)
        report = describe(
            evaluation,
            target.name,
            published=published,
            model=origin.as_json(),
            data=target.place,
            settings=dataclasses.asdict(target.experiment.eval),
        )
        text = files.write_evaluation(folder, evaluation, report)
        print(f"{target.results}: {origin}\n{text}")
