"""Turns a benchmark's files, or a user's folder, into prepared records. No jax here."""

import collections
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow as tf
from tqdm import tqdm

from zegformer_jax.input.benchmarks.benchmark import Benchmark
from zegformer_jax.input.records import plan as plans
from zegformer_jax.input.records import processes, read, storage, summary
from zegformer_jax.input.records.bad_records import BadRecords, summarise
from zegformer_jax.input.records.plan import PARTIAL, Plan
from zegformer_jax.input.records.shard import (
    BadRecord,
    Contents,
    Shard,
    fingerprint_of,
    write_shard,
)
from zegformer_jax.input.records.storage import join
from zegformer_jax.input.records.summary import Report, SplitCounts
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import Vocabulary

SHEET_FILE = "sheet.png"
BAD_FILE = "bad_records.txt"


def prepare(
    benchmark: Benchmark,
    source: str | Path,
    destination: str | Path,
    *,
    splits: Sequence[str] = (),
    subset: bool = False,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Writes a data set's records; the package's docstring lists the files.

    The same source gives the same bytes with any number of processes. An interrupted preparation
    resumes after the shards that are written; a complete one is only reported.

    Args:
        benchmark: The data set.
        source: Folder that holds the data set.
        destination: Directory to make, local or gs://..., for this data set alone.
        splits: Names of the splits; empty: all of the benchmark's.
        subset: Accepts another number of records than the benchmark has.
        skip_bad: Leaves bad records out.
        workers: Number of processes; None: one per core.
        progress: Shows a progress bar.

    Raises:
        MissingFile: The source is not complete. Nothing is written.
        BadRecords: Some records cannot be used; the exception lists those of the whole data set.
            The other shards are kept for the next run, and the directory cannot be opened.
        UserError: The source has another number of records than the benchmark, or the destination
            holds other files.
        OSError: The destination cannot be written.
    """
    directory, source = str(destination), Path(source)
    vocabulary = benchmark.load_vocabulary()
    workers = processes.count_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"prepare: {workers} workers; at least 1 is needed")
    examples = plans.list_splits(benchmark, source, splits or tuple(benchmark.counts), subset)
    plan = plans.make_plan(benchmark.name, vocabulary, examples)
    with _os_errors(directory):
        if read.is_prepared(directory):
            plans.check_finished(directory, plan, examples, skip_bad)
        else:
            plans.begin(directory, plan)
            with _local_folder(directory) as folder:
                shards = plans.make_shards(benchmark, vocabulary, examples, folder)
                _remove_other_shards(shards, directory)
                _write_shards(shards, directory, skip_bad, workers, progress)
            _finish(_collect(shards, directory, skip_bad), plan, vocabulary, directory)
        _tidy(benchmark, directory)
    return _read_report(benchmark, directory)


def _read_report(benchmark: Benchmark, directory: str) -> Report:
    info = read.read_info(directory)
    return Report(
        name=info["name"],
        directory=directory,
        vocabulary=benchmark.label_vocabulary(),
        splits={split: SplitCounts.from_json(x) for split, x in info["contents"].items()},
        left_out=[BadRecord(*record) for record in info["left_out"]],
    )


def _remove_other_shards(shards: Sequence[Shard], directory: str) -> None:
    """Removes the shards of an earlier, unfinished preparation of more or fewer records."""
    names = {shard.name for shard in shards}
    for name in tf.io.gfile.listdir(directory):
        if ".array_record-" in name and name not in names:
            tf.io.gfile.remove(join(directory, name))


def _contents_path(directory: str, shard: Shard) -> str:
    return join(directory, f"{PARTIAL}/{shard.name}.json")


def _find_contents(directory: str, shard: Shard, skip_bad: bool) -> Contents | None:
    """Reads the summary of a shard that was written from the same files, else None.

    A shard without its bad records is accepted only if they may be left out.
    """
    path, contents_path = join(directory, shard.name), _contents_path(directory, shard)
    if not tf.io.gfile.exists(contents_path) or not tf.io.gfile.exists(path):
        return None
    try:
        contents = Contents.from_json(storage.read_bytes(contents_path))
    except (ValueError, TypeError):  # damaged
        return None
    is_whole = tf.io.gfile.stat(path).length == contents.size and (skip_bad or not contents.bad)
    return contents if is_whole and contents.fingerprint == fingerprint_of(shard) else None


def _publish(directory: str, shard: Shard, contents: Contents) -> None:
    """Moves a written shard to its place in one step, then writes its summary."""
    path = join(directory, shard.name)
    if storage.is_remote(directory):  # in a bucket, a file appears when it is complete
        tf.io.gfile.copy(shard.partial, path, overwrite=True)
    else:
        os.replace(shard.partial, path)
    storage.write_bytes(_contents_path(directory, shard), contents.to_json().encode())


def _write_shards(
    shards: Sequence[Shard], directory: str, skip_bad: bool, workers: int, progress: bool
) -> None:
    """Writes the shards that are missing.

    Raises:
        BadRecords: Some shards have bad records, and `skip_bad` is false.
    """
    missing = [shard for shard in shards if _find_contents(directory, shard, skip_bad) is None]
    total = sum(len(shard.examples) for shard in shards)
    done = total - sum(len(shard.examples) for shard in missing)
    bad: dict[str, Sequence[BadRecord]] = {}
    with tqdm(total=total, initial=done, desc="prepare", unit="image", disable=not progress) as bar:
        for shard, contents in processes.run(write_shard, missing, min(workers, len(missing))):
            bad[shard.name] = contents.bad
            if skip_bad or not contents.bad:
                _publish(directory, shard, contents)
            with contextlib.suppress(FileNotFoundError):
                os.remove(shard.partial)
            bar.update(len(shard.examples))
    records = [record for shard in missing for record in bad[shard.name]]
    if records and not skip_bad:
        path = join(directory, f"{PARTIAL}/{BAD_FILE}")
        storage.write_bytes(path, os.fsencode("".join(f"{record}\n" for record in records)))
        lines = summarise(records, total, shards[0].benchmark.advise)
        raise BadRecords(records, lines, path, _is_some_left(shards, records))


def _is_some_left(shards: Sequence[Shard], bad: Sequence[BadRecord]) -> bool:
    """Returns True if every split has good records."""
    left = collections.Counter(shard.split for shard in shards for _ in shard.examples)
    left.subtract(record.split for record in bad)
    return all(left.values())


def _collect(shards: Sequence[Shard], directory: str, skip_bad: bool) -> dict[str, list[Contents]]:
    """Reads the summaries of each split's shards, and checks all shards again.

    Raises:
        OSError: A shard, or one of its source files, changed since it was written.
        UserError: All records of a split are bad.
    """
    found: dict[str, list[Contents]] = {}
    for shard in shards:
        contents = _find_contents(directory, shard, skip_bad)
        if contents is None or len(contents.ids) + len(contents.bad) != len(shard.examples):
            path = join(directory, shard.name)
            raise OSError(f"{path}: changed since it was written; run the same command again")
        found.setdefault(shard.split, []).append(contents)
    for split, parts in found.items():
        if not any(part.ids for part in parts):
            raise UserError(f"{directory}: all records of {split} are bad")
    return found


def _finish(
    found: Mapping[str, Sequence[Contents]], plan: Plan, vocabulary: Vocabulary, directory: str
) -> None:
    """Writes the other files of the directory, `prepared.json` last."""
    digests = {}
    for split, parts in found.items():
        ids = [id_ for part in parts for id_ in part.ids]
        index = {"ids": ids, "classes": [shown for part in parts for shown in part.classes]}
        storage.write_bytes(join(directory, read.index_name(split)), json.dumps(index).encode())
        digests[split] = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
    _write_tfds_metadata(directory, plan["name"], vocabulary, found)
    classes_path = join(directory, read.CLASSES_FILE)
    storage.write_bytes(classes_path, vocabulary.to_json().encode())
    held = {split: SplitCounts.of(parts).to_json() for split, parts in found.items()}
    left_out = [record for parts in found.values() for part in parts for record in part.bad]
    info = {**plan, "digests": digests, "contents": held, "left_out": left_out}
    storage.write_bytes(join(directory, read.INFO_FILE), json.dumps(info).encode())


def _write_tfds_metadata(
    directory: str, name: str, vocabulary: Vocabulary, found: Mapping[str, Sequence[Contents]]
) -> None:
    """Writes the metadata that `tfds.builder_from_directory` needs."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, filetype_suffix="array_record"
    )
    label = tfds.features.Image(
        shape=(None, None, 1), dtype=vocabulary.label_dtype.type, encoding_format="png"
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features={
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": label,
            "id": tfds.features.Text(),
        },
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(part.ids) for part in parts],
                num_bytes=sum(part.size for part in parts),
                filename_template=template.replace(split=split),
            )
            for split, parts in found.items()
        ],
        filename_template=template,
        check_data=False,  # through tf.data, which does not read ArrayRecord
    )


def _tidy(benchmark: Benchmark, directory: str) -> None:
    """Updates classes.json, writes the preview sheet, deletes temporary files."""
    vocabulary = benchmark.load_vocabulary()
    if read.read_classes(directory) != vocabulary:
        path = join(directory, read.CLASSES_FILE)
        storage.write_bytes(path, vocabulary.to_json().encode())
    sheet_path = join(directory, SHEET_FILE)
    if not tf.io.gfile.exists(sheet_path):
        splits = read.read_info(directory)["splits"]
        sources = [read.PreparedSource(directory, split) for split in splits]
        sheet = summary.draw_sheet(sources, benchmark.label_vocabulary())
        storage.write_bytes(sheet_path, sheet)
    if tf.io.gfile.isdir(join(directory, PARTIAL)):
        tf.io.gfile.rmtree(join(directory, PARTIAL))


@contextlib.contextmanager
def _local_folder(directory: str) -> Iterator[str]:
    """Yields the folder in which shards are written: `partial`, or a temporary one for a bucket."""
    if not storage.is_remote(directory):
        yield join(directory, PARTIAL)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@contextlib.contextmanager
def _os_errors(directory: str) -> Iterator[None]:
    """Turns TensorFlow's errors into the operating system's."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(f"{directory}: {error.message}") from error
