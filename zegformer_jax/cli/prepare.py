"""Converts a data set's files to records, which training and evaluation read faster.

With NAME alone, prints where to get the data set and how to unpack it.

Examples:
  %(prog)s pascal_voc
  %(prog)s pascal_voc --source=archives --destination=records/pascal_voc
  %(prog)s folder --source=mine --destination=gs://bucket/mine --skip-bad
"""

import argparse
import sys

from zegformer_jax.input import benchmarks
from zegformer_jax.runtime.errors import UserError

MOST_LINES = 100  # of a list of bad records


def data_sets() -> tuple[str, ...]:
    """Returns the names of the data sets that can be prepared."""
    return (benchmarks.FOLDER, *benchmarks.BENCHMARKS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.set_defaults(command=parser.prog)
    parser.add_argument("name", metavar="NAME", help=", ".join(data_sets()))
    parser.add_argument("--source", metavar="DIR", help="folder with the unpacked archives")
    parser.add_argument("--destination", metavar="DIR", help="a new directory, or gs://...")
    parser.add_argument(
        "--splits", default="", metavar="NAMES", help="splits, with commas; default: all"
    )
    parser.add_argument("--subset", action="store_true", help="accept missing records")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")


def run(options: argparse.Namespace) -> None:
    """Writes the records, or prints the data set's guide."""
    if options.name not in data_sets():
        known = ", ".join(data_sets())
        raise UserError(f"prepare: no data set '{options.name}'; there are {known}")
    if not options.source and not options.destination:
        print(_guide(options.name))
        print(f"then: {options.command} {options.name} --source=DIR --destination=RECORDS")
    elif options.source and options.destination:
        _write_records(options)
    else:
        raise UserError(
            "prepare: needs both --source and --destination, or neither, to print what to unpack"
        )


def _guide(name: str) -> str:
    from zegformer_jax.input import folder

    return folder.GUIDE if name == "folder" else benchmarks.find(name).guide


def _write_records(options: argparse.Namespace) -> None:
    from zegformer_jax.input import folder
    from zegformer_jax.input.records import write as records
    from zegformer_jax.input.records.bad_records import summarise

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
        print(*error.lines[:MOST_LINES], sep="\n", file=sys.stderr)
        raise
    print(report.table())
    if report.left_out:
        total = len(report.left_out) + sum(counts.records for counts in report.splits.values())
        lines = summarise(report.left_out, total, advise=lambda values: "")
        print("left out:", *lines[:MOST_LINES], sep="\n  ")
    for fault in report.faults():
        print(f"warning: {fault}", file=sys.stderr)
    print(f"written: {options.destination}; examples are drawn in {records.SHEET_FILE}")
