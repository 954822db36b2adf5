"""Prepared records read by place, by threads, by TFDS, from other file systems, and damaged."""

import dataclasses
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import bucket
import numpy as np
import pytest
from folders import files_of, label_of, make_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zegformer_jax.input.datasets import open_source
from zegformer_jax.input.folder import Folder
from zegformer_jax.input.pipeline import train_batches
from zegformer_jax.input.records import plan, read
from zegformer_jax.input.records import write as records
from zegformer_jax.input.records.read import PreparedSource
from zegformer_jax.input.settings import InputSettings
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import Vocabulary

SETTINGS = InputSettings(batch_size=3, crop_size=16, short_sides=(20,), max_long_side=60)


def write(root, directory, **options):
    options = {"workers": 1, "progress": False} | options
    return records.prepare(Folder.open(root), root, directory, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("source") / "folder", train=11)


@pytest.fixture(scope="module")
def directory(folder, tmp_path_factory):
    """Prepared in shards of at most three records."""
    path = tmp_path_factory.mktemp("prepared") / "records"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "RECORDS_PER_SHARD", 3)
        write(folder, path)
    return path


@pytest.mark.parametrize("split, count", [("train", 11), ("validation", 3), ("val", 3)])
def test_records_are_the_files(folder, directory, split, count):
    source = PreparedSource(directory, split)
    assert len(source) == count
    place = folder / {"val": "validation"}.get(split, split)
    for index in range(count):
        record = source[index]
        assert record["id"] == f"{index:03d}"
        (file,) = (place / "images").glob(f"{index:03d}.*")
        np.testing.assert_array_equal(record["image"], np.asarray(Image.open(file).convert("RGB")))
        np.testing.assert_array_equal(record["label"], label_of(place, record["id"]))
        assert record["image"].dtype == record["label"].dtype == np.uint8
        with Image.open(file) as picture:
            untouched = picture.mode == "RGB" or (picture.mode, picture.format) == ("L", "JPEG")
        assert (source.encoded_image(index) == file.read_bytes()) == untouched


def test_16_bit_ids_and_labels(tmp_path):
    classes = [{"id": 60_000 - 7 * i, "name": f"class {i}", "seen": True} for i in range(300)]
    root = make_folder(tmp_path / "folder", train=0, validation=0)
    names = [item["name"] for item in classes]
    ids = tuple(item["id"] for item in classes)
    vocabulary = Vocabulary(tuple(names), (True,) * 300, ids, 65535, ignored_ids=(12,))
    (root / "classes.json").write_text(vocabulary.to_json())
    rng = np.random.default_rng(0)
    label_hw = rng.permutation(np.append(np.arange(300), [65535] * 8)).reshape(14, 22)
    lookup = dict(enumerate(ids)) | {65535: 65535}
    ids_hw = np.vectorize(lookup.get)(label_hw).astype(np.uint16)
    ids_hw[label_hw == 65535] = [12, 65535] * 4
    for split in ("train", "validation"):
        Image.fromarray(np.zeros((14, 22, 3), np.uint8)).save(root / split / "images/a.png")
        Image.fromarray(ids_hw).save(root / split / "annotations/a.png")
    report = write(root, tmp_path / "records")
    record = PreparedSource(tmp_path / "records", "train", vocabulary=vocabulary)[0]
    assert record["label"].dtype == np.uint16
    np.testing.assert_array_equal(record["label"], label_hw)
    assert report.splits["train"].pixels.tolist() == [1] * 300
    assert report.splits["train"].ignored == 8
    assert report.vocabulary == vocabulary


def test_ids_of_16_bits_may_be_few_classes(tmp_path):
    """Also 255 itself; the labels have 8 bits."""
    root = make_folder(tmp_path / "folder", train=0, validation=0)
    names, ids = ("wall", "boat", "sea"), (26_001, 255, 65535)
    vocabulary = Vocabulary(names, (True,) * 3, ids, ignored_ids=(3,))
    (root / "classes.json").write_text(vocabulary.to_json())
    ids_hw = np.array([[3, 65535], [26_001, 255]], np.uint16)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(root / "train/images/a.png")
    Image.fromarray(ids_hw).save(root / "train/annotations/a.png")
    report = records.prepare(
        Folder.open(root, splits=("train",)), root, tmp_path / "records", workers=1, progress=False
    )
    record = PreparedSource(tmp_path / "records", "train", vocabulary=vocabulary)[0]
    assert record["label"].dtype == np.uint8
    assert record["label"].tolist() == [[255, 2], [0, 1]]
    assert report.splits["train"].pixels.tolist() == [1, 1, 1]


def test_any_order_and_many_threads_give_the_same(directory):
    source = PreparedSource(directory, "train")
    expected = [source[i] for i in range(len(source))]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(source)), 20))
    start = threading.Barrier(8)

    def read(index):
        if index < 0:
            return start.wait() and None
        record = source[index]
        return all(np.array_equal(record[key], expected[index][key]) for key in record)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(read, [-1] * 8 + order.tolist()))
    assert results.count(True) == len(order)


def test_threads_may_open_the_shards(directory):
    """All at once: shards are opened by the first read."""
    source, start = PreparedSource(directory, "train"), threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda i: start.wait() < 8 and source[i % 11]["id"], range(8)))
    assert ids == source.ids[:8]


def test_tfds_reads_the_directory(directory):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(directory))
    assert builder.name == "folder"
    for split in ("train", "validation"):
        source = PreparedSource(directory, split)
        assert builder.info.splits[split].num_examples == len(source)
        for index, example in enumerate(builder.as_data_source(split)):
            record = source[index]
            assert example["id"].decode() == record["id"]
            np.testing.assert_array_equal(example["label"][..., 0], record["label"])
            np.testing.assert_array_equal(example["image"], record["image"])
        assert index == len(source) - 1


def test_a_bucket_holds_the_same_bytes(folder, directory, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "RECORDS_PER_SHARD", 3)
    with bucket.serve(tmp_path, monkeypatch) as requests:
        report = write(folder, "gs://bucket/sets/records")
        assert files_of(tmp_path / "bucket/sets/records") == files_of(directory)
        source = open_source(
            "folder", "train", data_dir="gs://bucket/sets/records", vocabulary=report.vocabulary
        )
        requests.clear()
        local = PreparedSource(directory, "train")
        order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(source)), 3))
        with ThreadPoolExecutor(4) as pool:
            records = list(pool.map(lambda i: source[i], order))
        for index, record in zip(order, records, strict=True):
            assert record["id"] == local[index]["id"]
            for key in ("image", "label"):
                np.testing.assert_array_equal(record[key], local[index][key])
        shards = {f"gs://bucket/sets/records/{path.name}" for path in directory.glob("*-train.*-*")}
        assert set(requests) == shards and len(requests) >= len(order)
        with pytest.raises(ValueError, match="gs://bucket/x/.*/prepared.json: damaged"):
            (tmp_path / "bucket/x/y").mkdir(parents=True)
            (tmp_path / "bucket/x/y/prepared.json").write_text("{")
            PreparedSource("gs://bucket/x/y", "train")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_in_a_bucket_is_named(directory, monkeypatch, tmp_path, damage):
    copy(directory, tmp_path / "bucket")
    shard = sorted((tmp_path / "bucket").glob("folder-train.array_record-*"))[1]
    spoil(shard, damage)
    with bucket.serve(tmp_path, monkeypatch):
        source = PreparedSource("gs://bucket/", "train")
        with pytest.raises(ValueError, match=f"^gs://bucket/{shard.name}: cannot be read"):
            _ = [source[i] for i in range(len(source))]


def test_presence_of_classes_is_that_of_the_labels(folder, directory):
    source = PreparedSource(directory, "train")
    direct = open_source("folder", "train", data_dir=folder, vocabulary=source.vocabulary)
    for classes in ([0], [1], [2], [0, 2], [0, 1, 2]):
        expected = [i for i in range(11) if np.isin(source[i]["label"], classes).any()]
        assert source.records_with(classes).tolist() == expected
        assert direct.records_with(classes).tolist() == expected
    assert source.records_with([0, 2]).tolist() == [0, 2, 3, 4, 6, 7, 8, 10]


def test_training_batches_are_those_of_the_folder(folder, directory):
    vocabulary = read.read_classes(directory)
    for option in (False, True):
        ways = [
            train_batches(
                open_source("folder", "train", data_dir=place, vocabulary=vocabulary),
                vocabulary,
                dataclasses.replace(SETTINGS, skip_unseen_pictures=option),
                seed=1,
                num_steps=4,
            )
            for place in (folder, directory)
        ]
        for one, other in zip(*ways, strict=True):
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])


def test_another_split_of_seen_and_unseen_is_welcome(directory):
    vocabulary = read.read_classes(directory)
    other = dataclasses.replace(vocabulary, seen=(False, True, True), ids=(0, 1, 2))
    assert len(PreparedSource(directory, "train", vocabulary=other)) == 11


@pytest.mark.parametrize(
    "names, ignore_label, message",
    [
        (("sky", "car", "road, street"), 255, "class 1 is 'road, street', but 'car' in the conf"),
        (("sky", "road, street"), 255, "3 classes, but the config's vocabulary .* has 2"),
        (("sky", "road, street", "car"), 65535, "the ignore label is 255, but 65535"),
    ],
)
def test_other_classes_are_refused(directory, names, ignore_label, message):
    count = len(names)
    vocabulary = Vocabulary(names, (True,) * count, tuple(range(count)), ignore_label)
    with pytest.raises(ValueError, match=f"classes.json: {message}"):
        PreparedSource(directory, "train", vocabulary=vocabulary)


def test_another_name_or_split_is_refused(directory, tmp_path):
    vocabulary = read.read_classes(directory)
    with pytest.raises(ValueError, match="holds the data set 'folder', not 'pascal_voc'"):
        open_source("pascal_voc", "train", data_dir=directory, vocabulary=vocabulary)
    with pytest.raises(FileNotFoundError, match="'test' was not prepared, only train, validation"):
        PreparedSource(directory, "test")
    with pytest.raises(FileNotFoundError, match="prepared.json: .*no records were prepared here"):
        PreparedSource(tmp_path, "train")


def test_a_config_without_a_vocabulary_takes_the_data_sets_own(folder, directory, tmp_path):
    from configs import base
    from zegformer_jax.experiment.data import dataset_directory, dataset_vocabulary, open_split

    for place in (folder, directory):
        config = base.get_config()
        config.dataset.update(name="folder", directory=str(place), vocabulary="")
        vocabulary = dataset_vocabulary(config, tmp_path)
        assert vocabulary.names == ("sky", "road, street", "car")
        assert len(open_split(config, tmp_path, "validation")) == 3
    config.dataset.directory = "gs://bucket/records"
    assert dataset_directory(config, tmp_path) == "gs://bucket/records"


def copy(directory, target):
    target.mkdir()
    for name, content in files_of(directory).items():
        (target / name).write_bytes(content)
    return target


def spoil(shard, damage):
    """Damages a shard whose records end in its first 64 kB."""
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[200] ^= 1
    elif damage == "cut":
        del content[-1:]
    shard.write_bytes(content)
    if damage == "gone":
        shard.unlink()


@pytest.mark.parametrize("damage", ["flip", "cut", "other shard", "gone"])
def test_a_damaged_shard_is_named(directory, tmp_path, damage):
    directory = copy(directory, tmp_path / "records")
    shards = sorted(directory.glob("folder-train.array_record-*"))
    if damage == "other shard":
        shards[1].write_bytes(shards[2].read_bytes())
    else:
        spoil(shards[1], damage)
    source = PreparedSource(directory, "train")
    with pytest.raises(ValueError, match=rf"^{shards[1]}: .*prepare the data set again$"):
        _ = [source[i] for i in range(len(source))]


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=40)
def test_no_damaged_byte_gives_another_record(directory, tmp_path_factory, data):
    """Every bit of a shard is under a hash, or is not needed to read its records."""
    directory = copy(directory, tmp_path_factory.mktemp("damaged") / "records")
    shard = directory / "folder-validation.array_record-00000-of-00001"
    expected = [PreparedSource(directory, "validation")[i] for i in range(3)]
    content = bytearray(shard.read_bytes())
    used = len(bytes(content[: 1 << 16]).rstrip(b"\0"))
    place = data.draw(st.integers(0, used + 64) | st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    shard.write_bytes(content)
    source = PreparedSource(directory, "validation")
    try:
        records = [source[i] for i in range(3)]
    except ValueError as error:
        assert str(error).startswith(f"{shard}: cannot be read")
        return
    for one, other in zip(records, expected, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "name", ["train.index.json", "prepared.json", "classes.json", "dataset_info.json"]
)
def test_a_damaged_file_beside_the_shards_is_named(directory, tmp_path, name):
    directory = copy(directory, tmp_path / "records")
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name}: "):
        PreparedSource(directory, "train")


def test_no_module_that_a_file_names_is_imported(directory, tmp_path, monkeypatch):
    """TFDS imports the module of any feature that features.json names."""
    copy = shutil.copytree(directory, tmp_path / "records")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange.py").write_text("raise SystemExit('it runs')")
    path = copy / "features.json"
    path.write_text(re.sub(r"tensorflow_datasets[^\"]*Image", "strange.Image", path.read_text()))
    with pytest.raises(UserError, match=r"features.json: names 'strange.Image', which is no class"):
        PreparedSource(copy, "train")


def test_records_of_other_features_are_refused(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "records")
    path = copy / "features.json"
    content = path.read_text()
    assert '"id": {' in content
    path.write_text(content.replace('"id": {', '"name": {'))
    with pytest.raises(UserError, match=r"cannot be read \(.*\); if damaged, "):
        PreparedSource(copy, "train")[0]
