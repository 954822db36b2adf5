"""The preparation of records: same bytes however it runs, restarts, bad data, refusals."""

import contextlib
import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from folders import IGNORED, add_record, colour_labels, files_of, label_of, make_folder
from PIL import Image

from zegformer_jax.cli import main
from zegformer_jax.input import benchmarks
from zegformer_jax.input.folder import Folder
from zegformer_jax.input.records import plan, read, shard, storage, summary
from zegformer_jax.input.records import write as records
from zegformer_jax.input.records.read import PreparedSource

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(plan, "RECORDS_PER_SHARD", 3)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


def write(root, directory, benchmark=None, **options):
    options = {"workers": 1, "progress": False} | options
    return records.prepare(benchmark or Folder.open(root), root, directory, **options)


def times_of(directory):
    """Times of the shards' last writes."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.array_record-*")}


def test_what_lies_in_the_directory(folder, tmp_path):
    write(folder, tmp_path / "records")
    names = [f"folder-train.array_record-{i:05d}-of-00003" for i in range(3)]
    assert files_of(tmp_path / "records").keys() == {
        *names, "folder-validation.array_record-00000-of-00001", "classes.json",
        "dataset_info.json", "features.json", "prepared.json", "sheet.png", "train.index.json",
        "validation.index.json",
    }  # fmt: skip
    with Image.open(tmp_path / "records/sheet.png") as sheet:
        assert min(sheet.size) > 500


def test_the_report_counts_the_pixels(folder, tmp_path):
    report = write(folder, tmp_path / "records")
    for split, count in (("train", 8), ("validation", 3)):
        labels = [label_of(folder / split, f"{i:03d}") for i in range(count)]
        held = report.splits[split]
        assert held.records == count and not report.left_out
        assert held.pixels.tolist() == [sum((x == c).sum() for x in labels) for c in range(3)]
        assert held.pictures.tolist() == [sum((x == c).any() for x in labels) for c in range(3)]
        assert held.ignored == sum((x == 255).sum() for x in labels)
    rows = {line.split()[0]: line.split()[1:] for line in report.table().splitlines()}
    train = report.splits["train"]
    assert rows["sky"][:3] == ["seen", str(train.pictures[0]), f"{train.pixels[0]:,}"]
    assert rows["road"][:3] == ["unseen", str(train.pictures[1]), f"{train.pixels[1]:,}"]
    assert rows["2"][:3] == ["classes", "seen", f"{train.pixels[0] + train.pixels[2]:,}"]
    assert rows["records"] == ["8", "3"]
    assert len(report.table().splitlines()) == 8


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(folder, tmp_path):
    write(folder, tmp_path / "one")
    write(folder, tmp_path / "two", workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_workers_import_neither_jax_nor_tensorflow():
    code = "import sys, folders; import zegformer_jax.input.records.shard\n"
    code += "print(*sys.modules.keys() & {'jax', 'tensorflow', 'matplotlib'})"
    path = os.pathsep.join(map(str, (ROOT / "tests" / "support", ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == []


SLOW = """
import dataclasses, sys
from folders import SlowFolder
from zegformer_jax.input.folder import Folder
from zegformer_jax.input.records import plan, write
if __name__ == "__main__":
    plan.RECORDS_PER_SHARD = 3
    folder = Folder.open(sys.argv[1])
    slow = SlowFolder(**{x.name: getattr(folder, x.name) for x in dataclasses.fields(folder)})
    write.prepare(slow, sys.argv[1], sys.argv[2], workers=2, progress=False)
"""


def children_of(pid):
    """Process ids of the children; Linux."""
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_killed_preparation_goes_on_where_it_was(tmp_path):
    folder = make_folder(tmp_path / "folder", train=30)
    script, directory = tmp_path / "slow.py", tmp_path / "records"
    script.write_text(SLOW)
    path = os.pathsep.join(map(str, (ROOT / "tests" / "support", ROOT)))
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(directory)],
        env=os.environ | {"PYTHONPATH": path},
    )
    wait_for(lambda: len(list(directory.glob("partial/*-of-*.json"))) >= 2)
    workers = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    wait_for(lambda: not any(map(is_running, workers)), seconds=20)
    written = {path.name.removesuffix(".json") for path in directory.glob("partial/*-of-*.json")}
    before = times_of(directory)
    assert 2 <= len(written) < 11 and written <= before.keys()
    with pytest.raises(FileNotFoundError, match="no records were prepared here"):
        PreparedSource(directory, "train")
    write(folder, directory)
    after = times_of(directory)
    assert all(before[name] == after[name] for name in written)
    write(folder, tmp_path / "whole")
    assert files_of(directory) == files_of(tmp_path / "whole")


def test_a_killed_worker_is_an_error_that_says_so(folder, tmp_path, monkeypatch):
    from zegformer_jax.input.records import processes

    with pytest.raises(OSError, match="a worker was killed"):
        list(processes.run(os._exit, [3, 3], workers=2))


def spoil(folder):
    """Seven bad records in both splits; gives what each line must contain, by record."""
    train, validation = folder / "train", folder / "validation"
    picture = train / "images/000.jpg"
    picture.write_bytes(picture.read_bytes()[:-40])
    Image.fromarray(np.zeros((5, 6), np.uint8) + 3).save(train / "annotations/001.png")
    Image.fromarray(np.full((19, 29), 8, np.uint8)).save(train / "annotations/002.png")
    (train / "annotations/004.png").unlink()
    (train / "images/003.png").write_bytes(b"no picture at all")
    Image.fromarray(np.zeros((17, 31, 3), np.uint8)).save(validation / "annotations/000.png")
    (validation / "images/notes.txt").write_text("to do")
    return {
        "train 000": f"{train}/images/000.jpg: damaged or cut off",
        "train 001": f"{train}/annotations/001.png: expected the image's size: (5, 6), but 001",
        "train 002": f"{train}/annotations/002.png: id 8 at row 0, column 0",
        "train 003": f"{train}/images/003.png: not an image",
        "train 004": f"{train}/annotations/004.png: no such file",
        "validation 000": f"{validation}/annotations/000.png: an image of mode RGB",
        "validation notes": f"{validation}/images/notes.txt: not a .jpg or .png",
    }


def test_bad_records_are_told_all_at_once(folder, tmp_path):
    expected = spoil(folder)
    for workers in (1, 2):
        directory = tmp_path / f"records{workers}"
        with pytest.raises(records.BadRecords, match="^7 bad records, .*--skip-bad$") as error:
            write(folder, directory, workers=workers)
        lines = [str(record) for record in error.value.records]
        assert [line.split(": ")[0] for line in lines] == list(expected)
        for line, (record, words) in zip(lines, expected.items(), strict=True):
            assert line.startswith(f"{record}: {words}")
        assert (directory / "partial/bad_records.txt").read_text().splitlines() == lines
        assert not read.is_prepared(directory)
        assert list(times_of(directory)) == ["folder-train.array_record-00002-of-00003"]


def lines_of(capsys, start=""):
    """The lines of the error output without the progress bar."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x and "prepare: " not in x]
    return [line for line in lines if line.startswith(start)]


def one_error_everywhere(folder, id_):
    """Adds a pixel of an unknown id to every label of the folder of 8 and 3 records."""
    for path in folder.glob("*/annotations/*.png"):
        with Image.open(path) as label:
            label.putpixel((2, 3), id_)
            label.save(path)


def test_one_error_in_every_label_is_one_line(folder, tmp_path, capsys):
    """With what to do about it, which is never to leave every image out."""
    one_error_everywhere(folder, 11)
    flags = f"--source={folder}", f"--destination={tmp_path / 'records'}", "--workers=1"
    assert run("folder", *flags) == 1
    line, last = lines_of(capsys)
    assert line == (
        'id 11 in 11 of 11 annotations; if it means no label, add "ignored_ids": [9, 11] to '
        "classes.json, else list its class there"
    )
    assert last.startswith("zegformer: 11 bad records, listed in ") and "skip" not in last
    listed = (tmp_path / "records/partial/bad_records.txt").read_text().splitlines()
    assert len(listed) == 11 and all("id 11 at row 3, column 2" in line for line in listed)
    classes = json.loads((folder / "classes.json").read_text()) | {"ignored_ids": [9, 11]}
    (folder / "classes.json").write_text(json.dumps(classes))
    assert run("folder", *flags) == 0


def test_several_unknown_ids_are_counted_in_one_line(folder, tmp_path):
    one_error_everywhere(folder, 0)
    one = folder / "validation/annotations/001.png"
    Image.fromarray(np.full((18, 30), 20, np.uint8)).save(one)
    with pytest.raises(records.BadRecords) as error:
        write(folder, tmp_path / "records")
    assert error.value.lines == (
        'id 0 in 10 of 11 annotations, id 20 in 1; if they mean no label, add "ignored_ids": '
        "[0, 9, 20] to classes.json, else list their classes there",
    )


COLOURS = {3: (128, 0, 0), 7: (0, 128, 0), 1: (128, 128, 0), 9: (0, 0, 0), 255: (224, 224, 192)}


def test_labels_in_colour_are_prepared_as_those_of_ids(folder, tmp_path):
    expected = write(folder, tmp_path / "records")
    coloured = colour_labels(make_folder(tmp_path / "coloured"), COLOURS)
    report = write(coloured, tmp_path / "coloured_records")
    assert report.table() == expected.table()
    shards = sorted(path.name for path in (tmp_path / "records").glob("*.array_record*"))
    for name in shards:
        one, two = (tmp_path / place / name for place in ("records", "coloured_records"))
        assert one.read_bytes() == two.read_bytes()
    assert len(shards) == 4
    assert write(coloured, tmp_path / "coloured_records").table() == report.table()
    for field, value in (("colour", [1, 1, 1]), ("ignored_colours", [[0, 0, 0]])):
        content = json.loads((coloured / "classes.json").read_text())
        (content["classes"][0] if field == "colour" else content)[field] = value
        before = (coloured / "classes.json").read_bytes()
        (coloured / "classes.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="holds labels .*--destination"):
            write(coloured, tmp_path / "coloured_records")
        (coloured / "classes.json").write_bytes(before)


def test_one_unknown_colour_in_every_label_is_one_line(folder, tmp_path):
    colour_labels(folder, COLOURS | {IGNORED: (1, 1, 1)})
    content = json.loads((folder / "classes.json").read_text())
    content["ignored_colours"] = [COLOURS[255]]
    (folder / "classes.json").write_text(json.dumps(content))
    with pytest.raises(records.BadRecords) as error:
        write(folder, tmp_path / "records")
    count = len(error.value.records)
    assert 8 <= count <= 11
    assert error.value.lines == (
        f"colour [1, 1, 1] in {count} of 11 annotations; if it means no label, add "
        '"ignored_colours": [[1, 1, 1], [224, 224, 192]] to classes.json, else list its class '
        "there",
    )


def test_any_error_of_many_records_is_one_line(folder, tmp_path, capsys):
    """Also when its text has the sizes and names of the files."""
    for index, path in enumerate(sorted((folder / "train/annotations").iterdir())[:5]):
        Image.fromarray(np.full((9, 10 + index), 3, np.uint8)).save(path)
    (folder / "validation/annotations/001.png").unlink()
    flags = f"--source={folder}", f"--destination={tmp_path / 'records'}", "--workers=1"
    assert run("folder", *flags) == 1
    first, second, last = lines_of(capsys)
    assert first.startswith("train 000: ") and first.endswith(" (and 4 more of this kind)")
    assert "expected the image's size: (9, 10), but 000.jpg is (17, 31)" in first
    assert second.startswith("validation 001: ") and second.endswith("001.png: no such file")
    assert last.endswith("or leave them out with --skip-bad")
    assert run("folder", *flags, "--skip-bad") == 0
    out = capsys.readouterr().out
    assert out.count("expected the image's size") == 1 and "(and 4 more of this kind)" in out


@pytest.mark.slow
def test_after_mending_only_the_bad_shards_are_written(folder, tmp_path):
    whole = make_folder(tmp_path / "whole")
    spoil(folder)
    (folder / "validation/images/notes.txt").unlink()
    with pytest.raises(records.BadRecords, match="^6 bad"):
        write(folder, tmp_path / "records")
    before = times_of(tmp_path / "records")
    for split, count in (("train", 8), ("validation", 3)):
        for index in range(5 if split == "train" else count):
            add_record(folder / split, index)
    write(folder, tmp_path / "records")
    after = times_of(tmp_path / "records")
    assert before and before.items() <= after.items()
    write(whole, tmp_path / "expected")
    assert files_of(tmp_path / "records") == files_of(tmp_path / "expected")


def test_bad_records_are_left_out_on_demand(folder, tmp_path):
    expected = spoil(folder)
    directory = tmp_path / "records"
    with pytest.raises(records.BadRecords):
        write(folder, directory)
    report = write(folder, directory, skip_bad=True)
    assert [f"{x.split} {x.id}" for x in report.left_out] == list(expected)
    assert {split: held.records for split, held in report.splits.items()} == {
        "train": 3,
        "validation": 2,
    }
    source = PreparedSource(directory, "train")
    assert [source[i]["id"] for i in range(len(source))] == ["005", "006", "007"]
    np.testing.assert_array_equal(source[0]["label"], label_of(folder / "train", "005"))
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(directory))  # the first shard is empty
    assert [x["id"] for x in builder.as_data_source("train")] == [b"005", b"006", b"007"]
    with pytest.raises(ValueError, match="7 bad records that were left out: remove it"):
        write(folder, directory)
    assert write(folder, directory, skip_bad=True).left_out == report.left_out


def interrupt(folder, directory, **options):
    """Writes all shards, and stops before the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(folder, directory, **options)


def test_an_interruption_at_any_file_is_mended(tmp_path, monkeypatch):
    """Stops before the first file is written, before the second, and so on until none is left."""
    monkeypatch.setattr(summary, "draw_sheet", lambda *_: b"a sheet")
    folder = make_folder(tmp_path / "folder", train=4)
    write(folder, tmp_path / "whole")
    write_bytes, allowed = storage.write_bytes, iter(())

    def stop(path, data):
        next(allowed)
        write_bytes(path, data)

    monkeypatch.setattr(storage, "write_bytes", stop)
    for count in itertools.count():
        directory, allowed = tmp_path / f"stopped_{count}", iter(range(count))
        with contextlib.suppress(StopIteration):
            write(folder, directory)
            break
        assert not read.is_prepared(directory) or (directory / "dataset_info.json").exists()
        allowed = itertools.count()
        write(folder, directory)
        assert files_of(directory) == files_of(tmp_path / "whole")
    assert count == 9  # plan, 3 shards, 2 indices, classes, prepared.json, sheet


def test_a_split_has_no_more_shards_than_can_be_open(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MAX_SHARDS", 2)
    write(folder, tmp_path / "records")
    shards = [name for name in times_of(tmp_path / "records") if "train" in name]
    assert sorted(shards) == [f"folder-train.array_record-{i:05d}-of-00002" for i in range(2)]
    source = PreparedSource(tmp_path / "records", "train")
    assert [source[i]["id"] for i in range(8)] == [f"{i:03d}" for i in range(8)]


def test_a_split_of_bad_records_alone_is_no_data_set(folder, tmp_path):
    for path in (folder / "validation/annotations").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="records: all records of validation are bad"):
        write(folder, tmp_path / "records", skip_bad=True)
    assert not read.is_prepared(tmp_path / "records")


def test_a_partial_with_records_left_out_is_not_taken_for_a_whole(folder, tmp_path):
    """The kind of restart that would silently lose records."""
    spoil(folder)
    interrupt(folder, tmp_path / "records", skip_bad=True)
    with pytest.raises(records.BadRecords, match="^7 bad"):
        write(folder, tmp_path / "records")


def test_changed_files_are_read_again(folder, tmp_path):
    interrupt(folder, tmp_path / "records")
    before = times_of(tmp_path / "records")
    file = folder / "train/annotations/004.png"
    Image.fromarray(np.full((21, 27), 1, np.uint8)).save(file)
    write(folder, tmp_path / "records")
    after = times_of(tmp_path / "records")
    assert {name for name in after if after[name] != before[name]} == {
        "folder-train.array_record-00001-of-00003"
    }
    assert np.all(PreparedSource(tmp_path / "records", "train")[4]["label"] == 2)


@pytest.mark.slow
def test_a_shard_that_was_cut_off_is_written_anew(folder, tmp_path):
    interrupt(folder, tmp_path / "records")
    shard = tmp_path / "records/folder-train.array_record-00001-of-00003"
    os.truncate(shard, shard.stat().st_size - 1)
    write(folder, tmp_path / "records")
    write(folder, tmp_path / "whole")
    assert files_of(tmp_path / "records") == files_of(tmp_path / "whole")


def test_a_record_that_is_lost_on_the_way_is_noticed(folder, tmp_path, monkeypatch):
    def lose(whole, write_shard=shard.write_shard):
        contents = write_shard(whole._replace(examples=whole.examples[1:]))
        return contents._replace(fingerprint=shard.fingerprint_of(whole))

    monkeypatch.setattr(records, "write_shard", lose)
    with pytest.raises(OSError, match="folder-train.array_record-00000-of-00003: changed since"):
        write(folder, tmp_path / "records")
    assert not read.is_prepared(tmp_path / "records")


def test_a_file_of_other_content_and_the_same_size_is_read_again(folder, tmp_path):
    file, sizes = folder / "train/annotations/004.png", []
    for id_ in (3, 7):
        Image.fromarray(np.full((21, 27), id_, np.uint8)).save(file)
        os.utime(file, (id_, id_))
        sizes.append(file.stat().st_size)
        if id_ == 3:
            interrupt(folder, tmp_path / "records")
    assert sizes[0] == sizes[1]
    write(folder, tmp_path / "records")
    assert np.all(PreparedSource(tmp_path / "records", "train")[4]["label"] == 1)


def test_a_renamed_record_has_its_new_id(folder, tmp_path):
    interrupt(folder, tmp_path / "records")
    for path in list(folder.glob("train/*/004.*")):
        path.rename(path.with_stem("0045"))
    write(folder, tmp_path / "records")
    assert PreparedSource(tmp_path / "records", "train")[4]["id"] == "0045"


def test_a_complete_directory_is_left_alone(folder, tmp_path):
    first = write(folder, tmp_path / "records")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "records").iterdir()}
    second = write(folder, tmp_path / "records")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "records").iterdir()} == before
    assert second.table() == first.table()


def test_what_is_seen_may_change_without_a_new_preparation(folder, tmp_path):
    write(folder, tmp_path / "records")
    classes = json.loads((folder / "classes.json").read_text())
    classes["classes"][0]["seen"] = False
    (folder / "classes.json").write_text(json.dumps(classes))
    before = times_of(tmp_path / "records")
    assert write(folder, tmp_path / "records").vocabulary.seen == (False, False, True)
    assert read.read_classes(tmp_path / "records").seen == (False, False, True)
    assert times_of(tmp_path / "records") == before


def test_a_file_that_changed_since_is_not_passed_over(folder, tmp_path):
    write(folder, tmp_path / "records")
    before, label = files_of(tmp_path / "records"), folder / "validation/annotations/001.png"
    later = (tmp_path / "records/prepared.json").stat().st_mtime_ns + 10**9
    os.utime(label, ns=(later, later))
    with pytest.raises(ValueError, match=f"^{label}: changed since the records in .* remove them"):
        write(folder, tmp_path / "records")
    assert files_of(tmp_path / "records") == before


@pytest.mark.parametrize("added", [0, 10])
def test_an_unfinished_preparation_goes_on_with_other_records(folder, tmp_path, added):
    """Bad files may be taken away, as the message says; new ones change the number of shards."""
    expected = spoil(folder)
    with pytest.raises(records.BadRecords):
        write(folder, tmp_path / "records")
    before = times_of(tmp_path / "records")
    for split, id_ in map(str.split, expected):
        for path in (folder / split).glob(f"*/{id_}.*"):
            path.unlink()
    for index in range(20, 20 + added):
        add_record(folder / "train", index)
    report = write(folder, tmp_path / "records")
    assert report.splits["train"].records == 3 + added
    assert before.keys().isdisjoint(times_of(tmp_path / "records"))
    write(folder, tmp_path / "whole")
    assert files_of(tmp_path / "records") == files_of(tmp_path / "whole")


def test_an_unfinished_split_is_not_lost_to_another(folder, tmp_path):
    spoil(folder)
    with pytest.raises(records.BadRecords):
        write(folder, tmp_path / "records", splits=("train",))
    before = files_of(tmp_path / "records")
    with pytest.raises(ValueError, match="holds a part of the data set 'folder', of train:"):
        write(folder, tmp_path / "records", splits=("validation",))
    assert files_of(tmp_path / "records") == before


def test_a_preparation_that_wrote_no_shard_does_not_block_another(folder, tmp_path):
    """All records of the first command's split are bad."""
    shutil.rmtree(folder / "validation" / "annotations")
    (folder / "validation" / "annotations").mkdir()
    with pytest.raises(records.BadRecords):
        write(folder, tmp_path / "records", splits=("validation",))
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["partial"]
    report = write(folder, tmp_path / "records", splits=("train",))
    assert list(report.splits) == ["train"] and report.splits["train"].records == 8


def test_a_full_disk_is_an_error_that_names_the_file(folder, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"^/.*/partial/folder-train.*: cannot be written: .*File too large"
        ):
            write(folder, tmp_path / "records")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write(folder, tmp_path / "records")


def rename_class(folder):
    text = (folder / "classes.json").read_text()
    (folder / "classes.json").write_text(text.replace('"id": 3', '"id": 4'))


def ignore_more(folder):
    text = (folder / "classes.json").read_text()
    (folder / "classes.json").write_text(text.replace("[9]", "[9, 8]"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: add_record(folder / "train", 20), "other records or splits"),
        (rename_class, "labels of other classes or ids"),
        (ignore_more, "labels with other ignored ids"),
    ],
)
def test_a_directory_of_something_else_is_refused(folder, tmp_path, change, message):
    write(folder, tmp_path / "records")
    before = files_of(tmp_path / "records")
    change(folder)
    with pytest.raises(ValueError, match=f"records: holds {message}.*--destination"):
        write(folder, tmp_path / "records")
    assert files_of(tmp_path / "records") == before


@pytest.mark.slow
def test_bad_records_may_be_mended_by_other_classes(folder, tmp_path):
    """Shards that were written before follow them, too."""
    label = folder / "train/annotations/000.png"
    Image.fromarray(np.full((17, 31), 8, np.uint8)).save(label)
    with pytest.raises(records.BadRecords, match="^1 bad"):
        write(folder, tmp_path / "records")
    assert len(times_of(tmp_path / "records")) == 3
    classes = json.loads((folder / "classes.json").read_text())
    classes["classes"] += [classes["classes"].pop(0), {"id": 8, "name": "moon"}]
    (folder / "classes.json").write_text(json.dumps(classes))
    report = write(folder, tmp_path / "records")
    assert report.vocabulary.names == ("road, street", "car", "sky", "moon")
    assert report.splits["train"].pixels[3] == 17 * 31
    write(folder, tmp_path / "whole")
    assert files_of(tmp_path / "records") == files_of(tmp_path / "whole")


def test_a_directory_of_other_files_is_refused(folder):
    before = files_of(folder)
    with pytest.raises(ValueError, match="folder: holds 'classes.json' and so on; name a new or"):
        write(folder, folder)
    assert files_of(folder) == before


@pytest.mark.parametrize(
    "spoiled, message",
    [
        (shutil.rmtree, "folder: no such folder"),
        (lambda folder: (folder / "classes.json").unlink(), "classes.json: no such file"),
        (lambda folder: [x.unlink() for x in (folder / "train/images").iterdir()], "train/images"),
        (lambda folder: (folder / "train/images").rename(folder / "x"), "train/images: no such f"),
        (
            lambda folder: (folder / "classes.json").write_text(
                '{"classes": [{"name": "sofa"}, {"name": "cat"}, {"name": "Sofa"}]}'
            ),
            r"folder/classes.json: 'sofa' and 'Sofa' are one class .* \(entries 1 and 3\)",
        ),
    ],
)
def test_an_incomplete_source_is_told_before_anything_is_written(
    folder, tmp_path, spoiled, message
):
    spoiled(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        write(folder, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_the_number_of_records_must_be_the_benchmarks(folder, tmp_path):
    benchmark = dataclasses.replace(Folder.open(folder), counts={"train": 9, "validation": 3})
    with pytest.raises(ValueError, match="train has 8 records, folder has 9: .*--subset"):
        write(folder, tmp_path / "records", benchmark)
    assert not (tmp_path / "records").exists()
    assert write(folder, tmp_path / "records", benchmark, subset=True).splits["train"].records == 8


def test_an_id_that_occurs_twice_is_named(tmp_path):
    ade = tmp_path / "ADE/validation"
    for place in ("urban/street", "home/attic", "home/cellar"):
        (ade / place).mkdir(parents=True)
        for id_ in {place[0], "b"}:
            (ade / place / f"{id_}.jpg").touch()
    with pytest.raises(ValueError, match=r"validation has b twice \(3 such ids\)$"):
        write(
            tmp_path, tmp_path / "records", benchmarks.find("ade20k_full"),
            splits=("validation",), subset=True,
        )  # fmt: skip
    assert not (tmp_path / "records").exists()


def test_a_split_alone(folder, tmp_path):
    report = write(folder, tmp_path / "records", splits=("validation",))
    assert list(report.splits) == ["validation"]
    with pytest.raises(ValueError, match="no split 'test'; there are train, validation"):
        write(folder, tmp_path / "other", splits=("test",))


@dataclasses.dataclass(frozen=True)
class Careless(Folder):
    """A benchmark whose labels are not checked."""

    def read(self, example):
        image_hw3, label_hw = super().read(example)
        return image_hw3, (label_hw * 0 + 3 if example.id == "002" else label_hw)


def test_labels_are_checked_whoever_reads_them(folder, tmp_path):
    opened = Folder.open(folder)
    careless = Careless(**{x.name: getattr(opened, x.name) for x in dataclasses.fields(opened)})
    with pytest.raises(records.BadRecords) as error:
        write(folder, tmp_path / "records", careless)
    assert [record.id for record in error.value.records] == ["002", "002"]
    assert "label 3 is not a class of the vocabulary (0..2)" in error.value.records[0].reason


def run(*arguments):
    return main.main(["prepare", *map(str, arguments)])


def test_the_command_prints_the_table(folder, tmp_path, capsys):
    flags = f"--source={folder}", f"--destination={tmp_path / 'records'}", "--workers=1"
    assert run("folder", *flags) == 0
    out, err = capsys.readouterr()
    assert "sky" in out and "unseen" in out and f"written: {tmp_path / 'records'}" in out
    assert "prepare: 100%" in err and "11/11" in err


def test_the_command_warns_of_classes_without_pixels(folder, tmp_path, capsys):
    """Of an unseen one in the validation alone: training needs none of its pixels."""
    flags = f"--source={folder}", f"--destination={tmp_path / 'records'}", "--workers=1"
    classes = json.loads((folder / "classes.json").read_text())
    classes["classes"] += [{"id": 5, "name": "moon", "seen": False}, {"id": 6, "name": "sun"}]
    (folder / "classes.json").write_text(json.dumps(classes))
    assert run("folder", *flags) == 0
    train, validation = lines_of(capsys, "warning")
    assert train.startswith("warning: train: no pixel shows 'sun' (id 6); ")
    assert validation.startswith(
        "warning: validation: no pixel shows 2 of 5 classes: 'moon' (id 5), 'sun' (id 6); "
    )


def test_the_commands_errors_are_one_line(folder, tmp_path, capsys):
    flags = f"--source={folder}", f"--destination={tmp_path / 'records'}", "--workers=1"
    assert run("imagenet", *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no data set 'imagenet'; there are folder, pascal_voc, coco_stuff" in line
    assert run("pascal_voc", *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.count("VOCtrainval_11-May-2012.tar, see") == 1
    assert line.endswith("data/README.md lists what 'pascal_voc' needs")
    assert run("coco_stuff", *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "train2017.zip, see" in line and "val2017.zip, see" in line
    assert run("coco_stuff", f"--source={folder / 'none'}", *flags[1:]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("folder/none: no such folder")
    expected = spoil(folder)
    assert run("folder", *flags) == 1
    *_, last = lines = capsys.readouterr().err.splitlines()
    assert last.startswith("zegformer: 7 bad records")
    assert all(any(line.startswith(record) for line in lines) for record in expected)
    assert run("folder", *flags, "--skip-bad") == 0
    assert "left out:\n  train 000: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["folder", *benchmarks.BENCHMARKS])
def test_a_name_alone_says_where_to_get_the_data_set(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["prepare", name]) == 0
    out, err = capsys.readouterr()
    lines, wanted = out.splitlines(), ["DIR/classes.json"]
    if name != "folder":
        wanted = [archive.address.split(" ")[0] for archive in benchmarks.find(name).archives]
    assert all(any(word in line for line in lines) for word in wanted) and wanted
    assert lines[-1] == f"then: zegformer prepare {name} --source=DIR --destination=RECORDS"
    assert not err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--source=a", "--destination=b"])
def test_half_a_command_is_not_taken_for_a_question(flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["prepare", "pascal_voc", flag]) == 1
    out, err = capsys.readouterr()
    assert not out and "needs both --source and --destination" in err
    assert not list(tmp_path.iterdir())
