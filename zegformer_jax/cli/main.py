"""The commands: demo, train, evaluate, predict, prepare and convert."""

import argparse
import contextlib
import csv
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zegformer_jax.runtime.assets import ROOT

USER_ERRORS = (ValueError, OSError, FloatingPointError, KeyError, AttributeError)
DEFAULT_WORKDIR = "runs/openmoji"
INTERRUPTED = 130  # a shell's exit status for it
MOST_LINES = 100  # of a list of bad records
TRAIN_FLAGS = {"change_config": (False, "go on with another config than the run began with")}
EVALUATE_FLAGS = {
    "datasets": (
        "",
        "NAME=DIR by commas, in place of the experiment's own data set where it lies; NAME alone "
        "is that one, or the directory NAME beside it",
    ),
    "checkpoint": ("", "in place of --workdir: WORKDIR/checkpoints/STEP, or the authors' file"),
    "output": ("", "folder for the tables; default: WORKDIR/evaluation, or by the checkpoint"),
    "predictions": ("", "also write label maps: png, rle, or both by a comma"),
}
CONVERSIONS = """what SOURCE is, its content tells:
  a checkpoint of the authors (.pth)            DESTINATION: a workdir, with CLIP if it is inside
  CLIP: a directory, a name on the Hub, .pt     DESTINATION: a directory
  a backbone: detectron2, torchvision, Swin     DESTINATION: a file, .safetensors or .npz
  a workdir with a trained model                DESTINATION: a checkpoint in the authors' layout,
                                                .safetensors, .npz, or by PyTorch .pth
"""


def parse_config(
    command: str,
    arguments: Sequence[str],
    more: Mapping[str, tuple[Any, str]] = MappingProxyType({}),
    instead: str = "",
) -> tuple[Any, str, dict[str, Any]]:
    """Reads `--config=FILE[:VARIANT]`, `--config.FIELD=VALUE`, `--workdir=DIR` and further flags.

    Args:
        command: whose arguments they are.
        arguments: of the command line.
        more: further flags: what they are if not given, a switch's False or a text; and what for.
        instead: one of these that may be given in place of the workdir.

    Returns:
        The config, the workdir ("" where it is not given), and the further flags' values.

    Raises:
        ValueError: a flag or field is not known, or one that is needed is missing.
    """
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    arguments = [command, *map(_find_config, arguments)]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    workdir = flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    for name, (default, text) in more.items():
        define = flags.DEFINE_boolean if default is False else flags.DEFINE_string
        define(name, default, text, flag_values=values)
    try:
        rest = values(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        # Of an error inside a config file the text is a traceback, which ends with its message.
        message = str(error).strip().splitlines()[-1]
        raise ValueError(f"{command}: {message}") from None
    if len(rest) > 1:
        raise ValueError(f"{command}: '{rest[1]}' is not understood; flags begin with --")
    found = {name: values[name].value for name in more}
    if config.value is None or bool(workdir.value) == bool(found.get(instead)):
        place = f"either --workdir=DIR or --{instead}=PATH" if instead else "--workdir=DIR"
        raise ValueError(f"{command}: needs --config=configs/NAME.py and {place}")
    return config.value, workdir.value or "", found


def _find_config(argument: str) -> str:
    """Lets `--config=configs/...` mean the project's configs from any folder."""
    flag, _, path = argument.partition("=")
    file = path.split(":")[0]
    if flag == "--config" and not Path(file).exists() and (ROOT / file).is_file():
        return f"{flag}={ROOT / path}"
    if flag == "--config" and path and not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such config file; configs/ has the project's")
    return argument


def demo(arguments: Sequence[str]) -> None:
    """Runs the whole method on the embedded benchmark and prints a summary."""
    parser = argparse.ArgumentParser(prog="run.sh demo", description=demo.__doc__)
    parser.add_argument("--workdir", default=DEFAULT_WORKDIR, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the training; default: 0")
    options = parser.parse_args(arguments)
    from zegformer_jax.cli.demo import load_configs, run
    from zegformer_jax.evaluation.report.tables import summary

    with _stopping(options.workdir):
        result = run(load_configs(options.seed), options.workdir)
    print(f"\n{summary(result)}\nreport: {options.workdir}/report.md, scenes.png, losses.png")


@contextlib.contextmanager
def _stopping(workdir: str) -> Iterator[None]:
    """Ends the program well where a training was asked to stop."""
    from zegformer_jax.training.loop import Preempted

    try:
        yield
    except Preempted as stopped:
        print(f"{workdir}: {stopped}; the same command goes on from there")
        sys.exit(0)


def train(arguments: Sequence[str]) -> None:
    """Trains what a config says."""
    config, workdir, flags = parse_config("train", arguments, TRAIN_FLAGS)
    from zegformer_jax.experiment import Experiment
    from zegformer_jax.runtime.processes import join
    from zegformer_jax.training.loop import train as run

    join()
    with _stopping(workdir):
        experiment = Experiment.open(config, workdir)
        history = run(experiment, change_config=flags["change_config"])
    last = history[-1] if history else {}
    print(f"{workdir}: {last.get('step', 0)} steps, loss {last.get('loss', float('nan')):.4f}")


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluates a trained model on its data set, or on others, and writes tables."""
    config, workdir, flags = parse_config("evaluate", arguments, EVALUATE_FLAGS, "checkpoint")
    from etils import epath

    from zegformer_jax.evaluation.checkpoint import open_source
    from zegformer_jax.evaluation.report.files import parse_kinds
    from zegformer_jax.evaluation.targets import choose
    from zegformer_jax.experiment import Experiment
    from zegformer_jax.runtime.processes import join

    kinds = parse_kinds(flags["predictions"])
    join()
    source = open_source(workdir, flags["checkpoint"], partial(Experiment.open, config))
    for target in choose(flags["datasets"], source.experiment):
        folder = epath.Path(flags["output"] or source.results) / target.results
        _evaluate_on(target, source, folder, kinds)


def _evaluate_on(target: Any, source: Any, folder: Any, kinds: Sequence[str]) -> None:
    """Evaluates on one data set; an interrupted evaluation writes its tables, too."""
    from zegformer_jax.evaluation.evaluation import Interrupted
    from zegformer_jax.evaluation.evaluator import Evaluator
    from zegformer_jax.evaluation.loop import evaluate as run
    from zegformer_jax.evaluation.report.files import LabelMapWriter, write_evaluation
    from zegformer_jax.evaluation.report.published import published_lines
    from zegformer_jax.evaluation.report.schema import describe
    from zegformer_jax.evaluation.resume import ResumeFile
    from zegformer_jax.runtime.processes import is_first, wait_for_all

    def show(evaluation: Any) -> None:
        if is_first():
            published = published_lines(evaluation.plan.model, source.experiment, target.name)
            settings = dataclasses.asdict(target.experiment.eval)
            report = describe(evaluation, target.name, published=published, settings=settings)
            print(f"{target.results}\n{write_evaluation(folder, evaluation, report)}")

    evaluator = Evaluator(target.experiment, source.variables, target.trained)
    keep = LabelMapWriter(folder, kinds) if kinds else None
    with ResumeFile(folder, note=",".join(sorted(kinds))) as resume:
        try:
            result = run(target.experiment, evaluator=evaluator, keep=keep, resume=resume)
        except Interrupted as stopped:
            if stopped.evaluation is not None:
                show(stopped.evaluation)
            raise
        show(result)
        wait_for_all("tables are written")  # until then another process may have to resume


def parse_classes(text: str) -> list[str]:
    """Splits class names at commas; double quotes hold synonyms together, as in CSV.

    `sheep, "sofa, couch", cat` are three classes, the second with two synonyms.
    """
    rows = list(csv.reader([text], skipinitialspace=True))
    return [name.strip() for name in rows[0]] if rows else []


def read_classes(options: argparse.Namespace) -> list[str]:
    """Gives the classes of `--classes` or of `--classes-file`."""
    if options.classes is not None:
        return parse_classes(options.classes)
    path = Path(options.classes_file)
    if path.suffix == ".json":
        from zegformer_jax.text.vocabulary import Vocabulary

        return list(Vocabulary.load(path).names)
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def predict(arguments: Sequence[str]) -> None:
    """Segments a picture into classes in your own words."""
    parser = argparse.ArgumentParser(prog="run.sh predict", description=predict.__doc__)
    parser.add_argument("picture", help="a picture file")
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument(
        "--classes", help="""'sheep, cat, "sofa, couch"': quotes hold synonyms together"""
    )
    words.add_argument(
        "--classes-file", help="one class a line, commas between synonyms; or a vocabulary (.json)"
    )
    parser.add_argument("--workdir", default=DEFAULT_WORKDIR, help="default: %(default)s")
    parser.add_argument("--output", help="folder to write to; default: WORKDIR/predictions")
    options = parser.parse_args(arguments)
    from zegformer_jax.segmenter import load, read_picture

    classes = read_classes(options)
    segmenter = load(options.workdir)
    result = segmenter(read_picture(options.picture), classes)
    folder = Path(options.output or Path(options.workdir) / "predictions")
    folder.mkdir(parents=True, exist_ok=True)
    stem = Path(options.picture).stem
    result.overlay().save(folder / f"{stem}_overlay.png")
    result.label_image().save(folder / f"{stem}_labels.png")
    for name, share in result.areas().items():
        place = result.vocabulary.names.index(name)
        kind = "seen" if result.vocabulary.seen[place] else "unseen"
        print(f"{100 * share:5.1f} %  {name} ({kind}, label {place})")
    print(f"written: {folder}/{stem}_overlay.png, {stem}_labels.png")


def prepare(arguments: Sequence[str]) -> None:
    """Turns a data set's files into records; with NAME alone, says where to get them."""
    from zegformer_jax.input import benchmarks

    names = ("folder", *benchmarks.BENCHMARKS)
    parser = argparse.ArgumentParser(prog="run.sh prepare", description=prepare.__doc__)
    parser.add_argument("name", help=", ".join(names))
    parser.add_argument("--source", help="the folder with the unpacked archives")
    parser.add_argument("--destination", help="a new directory; or gs://...")
    parser.add_argument("--splits", default="", help="some alone, by commas; default: all")
    parser.add_argument("--subset", action="store_true", help="take a part of the records")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    options = parser.parse_args(arguments)
    if options.name not in names:
        raise ValueError(f"prepare: no data set '{options.name}'; there are {', '.join(names)}")
    if not options.source and not options.destination:
        print(_guide(options.name))
        return
    if not options.source or not options.destination:
        parser.error("both --source and --destination are needed; neither: what to unpack where")
    _write_records(options)


def _guide(name: str) -> str:
    """Where a data set's files come from, how they lie, and the command that takes them."""
    from zegformer_jax.input import benchmarks, folder

    text = folder.GUIDE if name == "folder" else benchmarks.find(name).guide
    return f"{text}\nthen: ./run.sh prepare {name} --source=DIR --destination=RECORDS"


def _write_records(options: argparse.Namespace) -> None:
    from zegformer_jax.input import benchmarks, folder
    from zegformer_jax.input.records import write as records

    splits = [split for split in options.splits.split(",") if split]
    published = benchmarks.find(options.name) if options.name in benchmarks.BENCHMARKS else None
    try:
        report = records.prepare(
            published or folder.Folder.open(options.source, splits=splits or folder.SPLITS),
            options.source,
            options.destination,
            splits=splits,
            subset=options.subset,
            skip_bad=options.skip_bad,
            workers=options.workers,
        )
    except records.BadRecords as error:
        print(*error.records[:MOST_LINES], sep="\n", file=sys.stderr)
        raise
    print(report.table())
    if report.left_out:
        print("left out:", *report.left_out[:MOST_LINES], sep="\n  ")
    print(f"written: {options.destination}; a look at it: {records.SHEET_FILE}")


def convert(arguments: Sequence[str]) -> None:
    """Converts published weights, and trained models back to the authors' layout."""
    parser = argparse.ArgumentParser(
        prog="run.sh convert",
        description=convert.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=CONVERSIONS,
    )
    parser.add_argument("source", help="a file, a directory or a name on the Hub")
    parser.add_argument("destination", help="a file or a directory to be made")
    parser.add_argument(
        "--config",
        default="configs/coco_stuff.py",
        help="of a checkpoint's experiment, but for the sizes; default: %(default)s",
    )
    parser.add_argument("--heads", type=int, help="attention heads; default: one in 32 channels")
    parser.add_argument("--with-clip", action="store_true", help="write CLIP into a checkpoint")
    options, fields = parser.parse_known_args(arguments)
    from zegformer_jax.cli.convert import convert as run

    flags = [f"--config={options.config}", f"--workdir={options.destination}", *fields]
    config, _, _ = parse_config("convert", flags)
    print(
        run(
            options.source,
            options.destination,
            config,
            heads=options.heads,
            with_clip=options.with_clip,
        )
    )
    print(f"written: {options.destination}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "prepare": prepare,
    "convert": convert,
}


def main(arguments: Sequence[str]) -> int:
    """Runs a command; an error that the user can mend is one line and exit status 1."""
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None:
        print(f"usage: {'|'.join(COMMANDS)} ...", file=sys.stderr)
        return 2
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS and Orbax tell every file
    try:
        command(arguments[1:])
    except USER_ERRORS as error:
        if os.environ.get("ZEGFORMER_DEBUG"):
            raise
        text = error.args[0] if isinstance(error, KeyError) else error
        print(f"zegformer_jax: {' '.join(str(text).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("zegformer_jax: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
