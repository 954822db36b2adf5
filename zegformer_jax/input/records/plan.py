"""Plan of a preparation: the records of each split, their shards, and the plan on disk."""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from zegformer_jax.input.benchmarks.benchmark import Benchmark, Example
from zegformer_jax.input.records import read, storage
from zegformer_jax.input.records.shard import Shard
from zegformer_jax.input.records.storage import join
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.vocabulary import Vocabulary

RECORDS_PER_SHARD = 256  # about 30 MB of photographs of 640x480
MAX_SHARDS = 512  # of a split: its reader keeps all shards open, often at most 1024 files
NANOSECONDS = 10**9  # in a second
PARTIAL = "partial"  # folder of the files needed until all shards are written
PLAN_FILE = "plan.json"
Examples = Mapping[str, Sequence[Example]]
Plan = dict[str, Any]


def list_splits(
    benchmark: Benchmark, source: Path, splits: Sequence[str], subset: bool
) -> dict[str, Sequence[Example]]:
    """Lists the records of all splits.

    Args:
        benchmark: The data set.
        source: Folder that holds the data set.
        splits: Names of the splits.
        subset: Accepts another number of records than the benchmark has.

    Returns:
        Examples by split.

    Raises:
        MissingFile: Parts of the source are missing; the message names all of them.
        UserError: A split does not exist, has another number of records, or an id twice.
    """
    if not source.is_dir():
        raise MissingFile(f"{source}: no such folder")
    examples, missing = {}, []
    for split in splits:
        try:
            examples[split] = _list_examples(benchmark, source, split, subset)
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        needed = f"data/README.md lists what '{benchmark.name}' needs"
        raise MissingFile("; ".join([*dict.fromkeys(missing), needed]))
    return examples


def _list_examples(
    benchmark: Benchmark, source: Path, split: str, subset: bool
) -> Sequence[Example]:
    if split not in benchmark.counts:
        there = ", ".join(benchmark.counts)
        raise UserError(f"{benchmark.name}: no split '{split}'; there are {there}")
    examples = benchmark.examples(source, split)
    if not examples:
        raise MissingFile(f"{source}: no records of the split {split}")
    if len(examples) != benchmark.counts[split] and not subset:
        raise UserError(
            f"{source}: {split} has {len(examples)} records, {benchmark.name} has "
            f"{benchmark.counts[split]}: complete it, or take these with --subset"
        )
    twice = [one.id for one, other in itertools.pairwise(examples) if one.id == other.id]
    if twice:
        raise UserError(f"{source}: {split} has {twice[0]} twice ({len(twice)} such ids)")
    return examples


def make_plan(name: str, vocabulary: Vocabulary, examples: Examples) -> Plan:
    """Makes the plan, which is equal for preparations of the same data.

    Args:
        name: Name of the data set.
        vocabulary: Vocabulary of the labels.
        examples: Examples by split.

    Returns:
        `name`, and hashes and numbers under `classes`, `ignored` and `splits`; fit for JSON.
    """
    splits = {}
    for split, records in examples.items():
        ids = hashlib.sha256(os.fsencode("\n".join(example.id for example in records)))
        count = _count_shards(len(records))
        splits[split] = {"records": len(records), "shards": count, "ids": ids.hexdigest()}
    values = [vocabulary.names, vocabulary.ids, *vocabulary.colours]
    classes = hashlib.sha256(json.dumps(values).encode())
    ignored = [vocabulary.ignore_label, *vocabulary.ignored_ids]
    ignored += map(list, vocabulary.ignored_colours)
    ignored += vocabulary.ignored_names
    return {"name": name, "classes": classes.hexdigest(), "ignored": ignored, "splits": splits}


def _count_shards(records: int) -> int:
    return min(-(-records // RECORDS_PER_SHARD), MAX_SHARDS)


def begin(directory: str, plan: Plan) -> None:
    """Writes the plan; the plan of shards that are there must be of the same data set and splits.

    Its records and classes may differ: bad records may have been repaired or removed. The shards'
    fingerprints tell which shards are kept.

    Raises:
        UserError: The directory holds other files.
    """
    path = join(directory, f"{PARTIAL}/{PLAN_FILE}")
    if tf.io.gfile.exists(path):
        found = storage.read_json(path)
        differs = found["name"] != plan["name"] or found["splits"].keys() != plan["splits"].keys()
        if differs and any(".array_record-" in name for name in tf.io.gfile.listdir(directory)):
            raise UserError(
                f"{directory}: holds a part of the data set '{found['name']}', of "
                f"{', '.join(found['splits'])}: name another --destination, or remove this one"
            )
    else:
        there = tf.io.gfile.listdir(directory) if tf.io.gfile.isdir(directory) else []
        strangers = sorted({name.rstrip("/") for name in there} - {PARTIAL})
        if strangers:
            raise UserError(
                f"{directory}: holds '{strangers[0]}' and so on; name a new or empty --destination"
            )
        tf.io.gfile.makedirs(join(directory, PARTIAL))
    storage.write_bytes(path, json.dumps(plan, indent=1).encode())


def check_finished(directory: str, plan: Plan, examples: Examples, skip_bad: bool) -> None:
    """Checks that a prepared directory equals the result of the preparation.

    Raises:
        UserError: The directory has other data, a file changed since, or bad records were left
            out without --skip-bad.
    """
    info = read.read_info(directory)
    words = {
        "name": "another data set",
        "classes": "labels of other classes or ids",
        "ignored": "labels with other ignored ids or names",
        "splits": "other records or splits",
    }
    for field, what in words.items():
        if info[field] != plan[field]:
            raise UserError(
                f"{directory}: holds {what}, of the data set '{info['name']}': name another "
                "--destination, or remove this one"
            )
    end = tf.io.gfile.stat(join(directory, read.INFO_FILE)).mtime_nsec // NANOSECONDS
    changed = _find_newer(end, examples)
    if changed:
        raise UserError(
            f"{changed}: changed since the records in {directory} were made: remove them to "
            "prepare the data set again"
        )
    if info["left_out"] and not skip_bad:
        raise UserError(
            f"{directory}: is complete but for {len(info['left_out'])} bad records that were left "
            "out: remove it to prepare the data set again"
        )


def _find_newer(second: int, examples: Examples) -> Path | None:
    """Finds a source file newer than the given time (whole seconds: TensorFlow's resolution)."""
    for example in itertools.chain.from_iterable(examples.values()):
        for path in (example.image, example.label):
            with contextlib.suppress(OSError):  # a missing file's record was left out
                if path.stat().st_mtime_ns // NANOSECONDS > second:
                    return path
    return None


def make_shards(
    benchmark: Benchmark, vocabulary: Vocabulary, examples: Examples, folder: str
) -> list[Shard]:
    """Divides the records into shards of nearly the same number, in their order.

    Args:
        benchmark: The data set.
        vocabulary: Vocabulary of the labels.
        examples: Examples by split.
        folder: Local folder in which shards are written.
    """
    shards = []
    for split, records in examples.items():
        count = _count_shards(len(records))
        bounds = [len(records) * number // count for number in range(count + 1)]
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            name = f"{benchmark.name}-{split}.array_record-{number:05d}-of-{count:05d}"
            partial = os.path.join(folder, f"{name}.{os.getpid()}")
            part = tuple(records[start:end])
            shards.append(Shard(benchmark, vocabulary, split, part, name, partial))
    return shards
