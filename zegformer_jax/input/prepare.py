"""Turns a benchmark's files, or a folder of one's own, into prepared records. No jax here."""

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from tqdm import tqdm

from zegformer_jax.input import contents, metadata, prepared, processes, shards
from zegformer_jax.input.benchmarks.benchmark import Benchmark, Example
from zegformer_jax.input.contents import Report, SplitCounts
from zegformer_jax.input.shards import BadRecord, Job, Note
from zegformer_jax.vocabulary import Vocabulary

RECORDS_PER_SHARD = 256  # about 30 MB of photographs of 640x480
NANOSECONDS = 10**9  # in a second
SHEET_FILE = "sheet.png"
PARTIAL = "partial"  # the folder of what is needed until all shards are there
PLAN_FILE, BAD_FILE = "plan.json", "bad_records.txt"
Examples = Mapping[str, Sequence[Example]]


class BadRecords(ValueError):
    """Records that cannot be used.

    Attributes:
      records: all of them, in the data set's order.
    """

    def __init__(self, records: Sequence[BadRecord], list_file: str):
        """Takes the records, and the file that lists them."""
        self.records = tuple(records)
        super().__init__(
            f"{len(records)} bad records, listed in {list_file}: mend them and run the same "
            "command again, or leave them out with --skip-bad"
        )


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
    """Writes a data set's records; `prepared` says what lies in the directory then.

    The same files give the same bytes, whatever the number of processes. What was interrupted goes
    on where it stopped, and what is complete is only reported.

    Args:
      benchmark: the data set.
      source: the folder that holds it.
      destination: the directory to be made, local or gs://..., for this data set alone.
      splits: which ones; none means all that the benchmark has.
      subset: take the records that are there, though the benchmark has another number of them.
      skip_bad: leave bad records out.
      workers: number of processes; None means one a core.
      progress: whether to show a progress bar.

    Raises:
      FileNotFoundError: the source is not complete. Nothing is written.
      BadRecords: some records cannot be used; it holds those of the whole data set. The other
        shards are kept for the next time, and nothing that could be opened is there.
      ValueError: the source has another number of records than the benchmark, or the destination
        holds something else.
      OSError: the destination cannot be written.
    """
    directory, source = str(destination), Path(source)
    vocabulary = benchmark.load_vocabulary()
    workers = processes.count_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"prepare: {workers} workers; at least 1 is needed")
    examples = _list_splits(benchmark, source, splits or tuple(benchmark.counts), subset)
    plan = _make_plan(benchmark.name, vocabulary, examples)
    with _os_errors(directory):
        if prepared.is_prepared(directory):
            _check_finished(directory, plan, examples, skip_bad)
        else:
            _begin(directory, plan)
            with _local_folder(directory) as folder:
                jobs = _make_jobs(benchmark, vocabulary, examples, folder)
                _remove_other_shards(jobs, directory)
                _write_shards(jobs, directory, skip_bad, workers, progress)
            notes = _collect(jobs, directory, skip_bad)
            _finish(notes, plan, vocabulary, directory)
        _tidy(benchmark, directory)
    return _read_report(benchmark, directory)


def _read_report(benchmark: Benchmark, directory: str) -> Report:
    info = prepared.read_info(directory)
    return Report(
        name=info["name"],
        directory=directory,
        vocabulary=benchmark.label_vocabulary(),
        splits={split: SplitCounts.from_json(x) for split, x in info["contents"].items()},
        left_out=[BadRecord(*record) for record in info["left_out"]],
    )


def _list_splits(
    benchmark: Benchmark, source: Path, splits: Sequence[str], subset: bool
) -> dict[str, Sequence[Example]]:
    """Lists the records of all splits, or tells what each of them misses."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    examples, missing = {}, []
    for split in splits:
        try:
            examples[split] = _list_examples(benchmark, source, split, subset)
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        needed = f"data/README.md lists what '{benchmark.name}' needs"
        raise FileNotFoundError("; ".join([*dict.fromkeys(missing), needed]))
    return examples


def _list_examples(
    benchmark: Benchmark, source: Path, split: str, subset: bool
) -> Sequence[Example]:
    if split not in benchmark.counts:
        there = ", ".join(benchmark.counts)
        raise ValueError(f"{benchmark.name}: no split '{split}'; there are {there}")
    examples = benchmark.examples(source, split)
    if not examples:
        raise FileNotFoundError(f"{source}: no records of the split {split}")
    if len(examples) != benchmark.counts[split] and not subset:
        raise ValueError(
            f"{source}: {split} has {len(examples)} records, {benchmark.name} has "
            f"{benchmark.counts[split]}: complete it, or take these with --subset"
        )
    twice = [one.id for one, other in itertools.pairwise(examples) if one.id == other.id]
    if twice:
        raise ValueError(f"{source}: {split} has {twice[0]} twice ({len(twice)} such ids)")
    return examples


def _make_plan(name: str, vocabulary: Vocabulary, examples: Examples) -> dict[str, Any]:
    """What two preparations must have in common to be one."""
    splits = {}
    for split, records in examples.items():
        ids = hashlib.sha256(os.fsencode("\n".join(example.id for example in records)))
        count = -(-len(records) // RECORDS_PER_SHARD)
        splits[split] = {"records": len(records), "shards": count, "ids": ids.hexdigest()}
    classes = hashlib.sha256(json.dumps([vocabulary.names, vocabulary.ids]).encode())
    ignored = [vocabulary.ignore_label, *vocabulary.ignored_ids]
    return {"name": name, "classes": classes.hexdigest(), "ignored": ignored, "splits": splits}


def _check_plan(found: Mapping[str, Any], plan: Mapping[str, Any], directory: str) -> None:
    words = {
        "name": "another data set",
        "classes": "labels of other classes or ids",
        "ignored": "labels with other ignored ids",
        "splits": "other records or splits",
    }
    for field, what in words.items():
        if found[field] != plan[field]:
            raise ValueError(
                f"{directory}: holds {what}, of the data set '{found['name']}': name another "
                "--destination, or remove this one"
            )


def _check_finished(
    directory: str, plan: Mapping[str, Any], examples: Examples, skip_bad: bool
) -> None:
    info = prepared.read_info(directory)
    _check_plan(info, plan, directory)
    end = tf.io.gfile.stat(prepared.join(directory, prepared.INFO_FILE)).mtime_nsec // NANOSECONDS
    changed = _changed_since(end, examples)
    if changed:
        raise ValueError(
            f"{changed}: changed since the records in {directory} were made: remove them to "
            "prepare the data set anew"
        )
    if info["left_out"] and not skip_bad:
        raise ValueError(
            f"{directory}: is complete but for {len(info['left_out'])} bad records that were left "
            "out: remove it to prepare the data set anew"
        )


def _changed_since(second: int, examples: Examples) -> Path | None:
    """A file of the records that was changed after a second, as TensorFlow tells no parts of it."""
    for example in itertools.chain.from_iterable(examples.values()):
        for path in (example.image, example.label):
            with contextlib.suppress(OSError):  # one that is missing was left out
                if path.stat().st_mtime_ns // NANOSECONDS > second:
                    return path
    return None


def _begin(directory: str, plan: Mapping[str, Any]) -> None:
    """Writes the plan; one that is there must be of the same data set and splits.

    Bad records may have been mended by other classes, or taken away: the shards' fingerprints tell
    which of them stay.

    Raises:
      ValueError: the directory holds something else.
    """
    plan_path = prepared.join(directory, f"{PARTIAL}/{PLAN_FILE}")
    if tf.io.gfile.exists(plan_path):
        found = json.loads(prepared.read_bytes(plan_path))
        if found["name"] != plan["name"] or found["splits"].keys() != plan["splits"].keys():
            raise ValueError(
                f"{directory}: holds a part of the data set '{found['name']}', of "
                f"{', '.join(found['splits'])}: name another --destination, or remove this one"
            )
        prepared.write_bytes(plan_path, json.dumps(plan, indent=1).encode())
        return
    there = tf.io.gfile.listdir(directory) if tf.io.gfile.isdir(directory) else []
    strangers = sorted({name.rstrip("/") for name in there} - {PARTIAL})
    if strangers:
        raise ValueError(
            f"{directory}: holds '{strangers[0]}' and so on; name a new or empty --destination"
        )
    tf.io.gfile.makedirs(prepared.join(directory, PARTIAL))
    prepared.write_bytes(plan_path, json.dumps(plan, indent=1).encode())


def _make_jobs(
    benchmark: Benchmark, vocabulary: Vocabulary, examples: Examples, folder: str
) -> list[Job]:
    """Divides the records into shards of nearly the same number, in their order."""
    jobs = []
    for split, records in examples.items():
        count = -(-len(records) // RECORDS_PER_SHARD)
        bounds = [len(records) * number // count for number in range(count + 1)]
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            name = prepared.shard_name(benchmark.name, split, number, count)
            partial = os.path.join(folder, f"{name}.{os.getpid()}")
            part = tuple(records[start:end])
            jobs.append(Job(benchmark, vocabulary, split, part, name, partial))
    return jobs


def _remove_other_shards(jobs: Sequence[Job], directory: str) -> None:
    """Removes the shards of an earlier, unfinished preparation of more or fewer records."""
    names = {job.name for job in jobs}
    for name in tf.io.gfile.listdir(directory):
        if ".tfrecord-" in name and name not in names:
            tf.io.gfile.remove(prepared.join(directory, name))


def _note_path(directory: str, job: Job) -> str:
    return prepared.join(directory, f"{PARTIAL}/{job.name}.npz")


def _find_shard(directory: str, job: Job, skip_bad: bool) -> Note | None:
    """Gives the note of a job's shard if it was written, from the same files.

    One that bad records were left out of is taken only where they are to be left out.
    """
    path, note_path = prepared.join(directory, job.name), _note_path(directory, job)
    if not tf.io.gfile.exists(note_path) or not tf.io.gfile.exists(path):
        return None
    try:
        note = Note.unpack(prepared.read_bytes(note_path))
    except Exception:  # cut off; zipfile, zlib and NumPy each have their own
        return None
    is_whole = tf.io.gfile.stat(path).length == note.size and (skip_bad or not note.bad)
    return note if is_whole and note.fingerprint == shards.fingerprint_of(job) else None


def _publish(directory: str, job: Job, note: Note) -> None:
    """Gives a written shard its place and its name at once, and then its note."""
    path = prepared.join(directory, job.name)
    if prepared.is_remote(directory):  # a file appears in a bucket when all of it is there
        tf.io.gfile.copy(job.partial, path, overwrite=True)
    else:
        os.replace(job.partial, path)
    prepared.write_bytes(_note_path(directory, job), note.pack())


def _write_shards(
    jobs: Sequence[Job], directory: str, skip_bad: bool, workers: int, progress: bool
) -> None:
    """Writes the shards that are not there yet.

    Raises:
      BadRecords: some have bad records that are not to be left out.
    """
    missing = [job for job in jobs if _find_shard(directory, job, skip_bad) is None]
    total = sum(len(job.examples) for job in jobs)
    done = total - sum(len(job.examples) for job in missing)
    bad: dict[str, Sequence[BadRecord]] = {}
    with tqdm(
        total=total, initial=done, desc="prepare", unit="picture", disable=not progress
    ) as bar:
        for job, note in processes.run(shards.write_shard, missing, min(workers, len(missing))):
            bad[job.name] = note.bad
            if skip_bad or not note.bad:
                _publish(directory, job, note)
            with contextlib.suppress(FileNotFoundError):
                os.remove(job.partial)
            bar.update(len(job.examples))
    records = [record for job in missing for record in bad[job.name]]
    if records and not skip_bad:
        path = prepared.join(directory, f"{PARTIAL}/{BAD_FILE}")
        prepared.write_bytes(path, os.fsencode("".join(f"{record}\n" for record in records)))
        raise BadRecords(records, path)


def _collect(jobs: Sequence[Job], directory: str, skip_bad: bool) -> dict[str, list[Note]]:
    """Gives the notes of each split's shards, after a last look at all of them.

    Raises:
      OSError: a shard, or a file that it was made from, changed meanwhile.
      ValueError: nothing of a split could be read.
    """
    notes: dict[str, list[Note]] = {}
    for job in jobs:
        note = _find_shard(directory, job, skip_bad)
        if note is None or len(note.length) + len(note.bad) != len(job.examples):
            path = prepared.join(directory, job.name)
            raise OSError(f"{path}: changed since it was written; run the same command again")
        notes.setdefault(job.split, []).append(note)
    for split, parts in notes.items():
        if not any(len(note.length) for note in parts):
            raise ValueError(f"{directory}: all records of {split} are bad")
    return notes


def _finish(
    notes: Mapping[str, Sequence[Note]],
    plan: Mapping[str, Any],
    vocabulary: Vocabulary,
    directory: str,
) -> None:
    """Writes what makes the shards a data set; `prepared.json` last."""
    for split, parts in notes.items():
        path = prepared.join(directory, prepared.index_name(split))
        prepared.write_bytes(path, metadata.pack_index(parts))
    metadata.write_tfds_info(directory, plan["name"], vocabulary, notes)
    path = prepared.join(directory, prepared.CLASSES_FILE)
    prepared.write_bytes(path, vocabulary.to_json().encode())
    held = {split: SplitCounts.of(parts).to_json() for split, parts in notes.items()}
    left_out = [record for parts in notes.values() for note in parts for record in note.bad]
    info = json.dumps({**plan, "left_out": left_out, "contents": held})
    prepared.write_bytes(prepared.join(directory, prepared.INFO_FILE), info.encode())


def _tidy(benchmark: Benchmark, directory: str) -> None:
    """Ends a preparation: what the list of classes says of seen and unseen, the sheet, no rests."""
    vocabulary = benchmark.load_vocabulary()
    if prepared.read_classes(directory) != vocabulary:
        path = prepared.join(directory, prepared.CLASSES_FILE)
        prepared.write_bytes(path, vocabulary.to_json().encode())
    sheet_path = prepared.join(directory, SHEET_FILE)
    if not tf.io.gfile.exists(sheet_path):
        splits = prepared.read_info(directory)["contents"]
        sources = [prepared.PreparedSource(directory, split) for split in splits]
        prepared.write_bytes(sheet_path, contents.draw_sheet(sources, benchmark.label_vocabulary()))
    rests = prepared.join(directory, PARTIAL)
    if tf.io.gfile.isdir(rests):
        tf.io.gfile.rmtree(rests)


@contextlib.contextmanager
def _local_folder(directory: str) -> Iterator[str]:
    """Where shards are written: beside their place, or in a temporary folder if that is remote."""
    if not prepared.is_remote(directory):
        yield prepared.join(directory, PARTIAL)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@contextlib.contextmanager
def _os_errors(directory: str) -> Iterator[None]:
    """Makes TensorFlow's errors the operating system's."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(f"{directory}: {error.message}") from error
