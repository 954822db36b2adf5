import dataclasses

import numpy as np
import pytest
from array_source import ArraySource
from PIL import Image

from zegformer_jax.input import transforms
from zegformer_jax.input.datasets import open_source
from zegformer_jax.input.pipeline import eval_batches, train_batches
from zegformer_jax.input.settings import InputSettings
from zegformer_jax.text.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_names(list("abcdef"), [True, False, True, True, False, True])
SETTINGS = InputSettings(batch_size=4, crop_size=24, short_sides=(20, 28), max_long_side=60)


def make_source(count=11, sizes=((30, 40), (40, 30), (26, 26))):
    rng = np.random.default_rng(0)
    images, labels = [], []
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        images.append(rng.integers(0, 256, (height, width, 3), np.uint8))
        label = rng.choice(np.array([0, 1, 2, 3, 4, 5, 255], np.uint8), (4, 4))
        labels.append(np.kron(label, np.ones((16, 16), np.uint8))[:height, :width])
    return ArraySource(images, labels, [f"record {i}" for i in range(count)])


def start(source, vocabulary=VOCABULARY, **options):
    """Calls `train_batches` with changed settings or options."""
    changes = {name: options.pop(name) for name in options.keys() & vars(SETTINGS).keys()}
    settings = dataclasses.replace(SETTINGS, **changes)
    return train_batches(source, vocabulary, settings, **{"seed": 3, "num_steps": 5, **options})


def train(source=None, vocabulary=VOCABULARY, **options):
    return list(start(source or make_source(), vocabulary, **options))


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_shapes_and_types():
    batch = train(num_steps=1)[0]
    assert batch["image"].shape == (4, 24, 24, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4, 24, 24) and batch["label"].dtype == np.uint8
    assert batch["index"].shape == (4,) and batch["index"].dtype == np.int64


def test_batches_are_the_same_each_time_and_with_other_threads():
    assert_equal_batches(train(), train(threads=1, prefetch=1))


def test_another_seed_gives_other_batches():
    assert np.any(train()[0]["image"] != train(seed=4)[0]["image"])


def test_a_restart_in_the_middle_of_an_epoch_goes_on_alike():
    assert_equal_batches(train(num_steps=6)[4:], train(start_step=4, num_steps=2))


def test_two_shards_make_the_global_batch():
    whole = train()
    shards = [train(shard_index=i, shard_count=2) for i in range(2)]
    for batch, *parts in zip(whole, *shards, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([part[key] for part in parts]))


def test_every_epoch_is_another_permutation():
    indices = np.concatenate([batch["index"] for batch in train(num_steps=11)])
    epochs = indices.reshape(4, 11)
    for epoch in epochs:
        assert sorted(epoch) == list(range(11))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_record_is_augmented_anew_in_each_epoch():
    source = make_source(1)
    images = np.concatenate([batch["image"] for batch in train(source, num_steps=2)])
    assert len({image.tobytes() for image in images}) > 4


def test_no_random_number_is_used_twice(monkeypatch):
    """Neither in one example, nor in two, nor with two seeds."""
    drawn, augment = [], transforms.augment

    def watched(image, label, uniform, **options):
        drawn.append(uniform)
        return augment(image, label, uniform, **options)

    monkeypatch.setattr(transforms, "augment", watched)
    for seed in (3, 4):
        train(seed=seed, num_steps=10)
    assert np.shape(drawn) == (2 * 10 * 4, transforms.NUM_RANDOM)
    assert len(np.unique(drawn)) == np.size(drawn)


def test_unseen_classes_become_the_ignore_label():
    # Whole pictures: crops as large as the picture, so that only flips move pixels.
    source = make_source(sizes=((26, 26),))
    options = dict(crop_size=26, short_sides=(26,), max_long_side=26)
    expected = {0: 0, 1: 255, 2: 1, 3: 2, 4: 255, 5: 3, 255: 255}
    for batch in train(source, **options):
        assert set(np.unique(batch["label"])) <= {0, 1, 2, 3, 255}
        for label, index in zip(batch["label"], batch["index"], strict=True):
            whole = np.vectorize(expected.get)(source.labels[index])
            assert np.array_equal(label, whole) or np.array_equal(label, whole[:, ::-1])


def test_pictures_without_a_seen_pixel_are_left_out():
    source = make_source()
    for index in (2, 5, 7):  # b and e are unseen
        source.labels[index][...] = np.resize([1, 4, 255], source.labels[index].shape)
    everything = np.concatenate([batch["index"] for batch in train(source, num_steps=11)])
    assert set(everything) == set(range(11))
    kept = np.concatenate(
        [batch["index"] for batch in train(source, num_steps=8, skip_unseen_pictures=True)]
    ).reshape(4, 8)
    for epoch in kept:
        assert sorted(epoch) == [0, 1, 3, 4, 6, 8, 9, 10]
    assert len({tuple(epoch) for epoch in kept}) == 4


def test_leaving_pictures_out_is_as_deterministic():
    source = make_source()
    source.labels[3][...] = 1
    options = dict(skip_unseen_pictures=True)
    whole = train(source, num_steps=6, **options)
    assert_equal_batches(whole[4:], train(source, start_step=4, num_steps=2, **options))
    shards = [
        train(source, num_steps=6, shard_index=i, shard_count=2, threads=i + 1, **options)
        for i in range(2)
    ]
    for batch, *parts in zip(whole, *shards, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([part[key] for part in parts]))


def test_nothing_left_to_train_on_is_an_error():
    source = make_source(1)
    source.labels[0][...] = 4
    with pytest.raises(ValueError, match="no images with a pixel of a seen class"):
        train(source, skip_unseen_pictures=True)
    with pytest.raises(ValueError, match="the source has no images$"):
        start(ArraySource([], [], []))


def test_16_bit_labels():
    vocabulary = Vocabulary.from_names([f"class {i}" for i in range(400)], [False] + [True] * 399)
    labels = [np.full((20, 20), value, np.uint16) for value in (0, 1, 399, 65535)]
    source = ArraySource([np.zeros((20, 20, 3), np.uint8)] * 4, labels, list("abcd"))
    batch = train(source, vocabulary, num_steps=1, short_sides=(24,))[0]
    assert batch["label"].dtype == np.uint16
    by_index = dict(zip(batch["index"].tolist(), batch["label"][:, 0, 0].tolist(), strict=True))
    assert by_index == {0: 65535, 1: 0, 2: 398, 3: 65535}


@pytest.mark.parametrize("batches", [train, lambda source: evaluate(source)])
def test_a_label_of_another_size_names_its_record(batches):
    source = make_source()
    source.labels[7] = source.labels[7][:-1]
    with pytest.raises(ValueError, match=r"record 'record 7': the image's shape is \(40, 30, 3"):
        batches(source)


@pytest.mark.parametrize("batches", ["train", "eval"])
def test_an_unknown_label_names_its_record(batches):
    source = make_source()
    source.labels[7][3, 5] = 6
    message = r"record 'record 7': label 6 is not a class of the vocabulary \(0..5\) nor the ignore"
    with pytest.raises(ValueError, match=message):
        if batches == "train":
            train(source)
        else:
            evaluate(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shard_count=3), "3 shards do not divide a batch of 4"),
        (dict(shard_index=2, shard_count=2), "no shard 2 of 2"),
        (dict(short_sides=()), "short_sides is empty"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        start(make_source(), **options)


def evaluate(source, **options):
    options = {"batch_size": 2, "short_sides": (36,), "max_long_side": 60, **options}
    return list(eval_batches(source, VOCABULARY, **options))


def test_evaluation_gives_every_record_once():
    source = make_source()
    batches = evaluate(source)
    ids = [id_ for batch in batches for id_ in batch["id"][batch["valid"]]]
    assert sorted(ids) == sorted(source.ids)
    for batch in batches:
        assert np.all(batch["id"][~batch["valid"]] == "")
        assert np.all(batch["label"][~batch["valid"]] == 255)
        assert np.all(batch["views"][0][0][~batch["valid"]] == 0)


def test_evaluation_resizes_as_pillow_and_pads():
    source = make_source()
    for batch in evaluate(source):
        for row in np.flatnonzero(batch["valid"]):
            index = source.ids.index(batch["id"][row])
            image, label = source.images[index], source.labels[index]
            short = min(image.shape[:2])
            height, width = (int(side * 36 / short + 0.5) for side in image.shape[:2])
            images, sizes = batch["views"][0]
            assert sizes[row].tolist() == [height, width]
            assert batch["original_size"][row].tolist() == list(label.shape)
            expected = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
            got = images[row]
            assert np.abs(got[:height, :width].astype(int) - np.asarray(expected)).max() <= 1
            assert not got[height:].any() and not got[:, width:].any()
            assert got.shape[0] % 32 == 0 and got.shape[0] - height < 32
            assert got.shape[1] % 32 == 0 and got.shape[1] - width < 32
            padded = np.full(batch["label"].shape[1:], 255)
            padded[: label.shape[0], : label.shape[1]] = label
            np.testing.assert_array_equal(batch["label"][row], padded)


def test_evaluation_gives_every_size_of_each_image():
    source, sides = make_source(), (36, 50, 20)
    alone = [
        {
            str(id_): image[:height, :width]
            for batch in evaluate(source, short_sides=(side,))
            for id_, image, (height, width) in zip(batch["id"], *batch["views"][0], strict=True)
        }
        for side in sides
    ]
    for batch in evaluate(source, short_sides=sides):
        assert len(batch["views"]) == 3 and min(batch["views"][2][1][0]) == 20
        for row in np.flatnonzero(batch["valid"]):
            for (images, sizes), expected in zip(batch["views"], alone, strict=True):
                height, width = sizes[row]
                np.testing.assert_array_equal(
                    images[row, :height, :width], expected[str(batch["id"][row])]
                )
                assert not images[row, height:].any() and not images[row, :, width:].any()


def test_evaluation_shards_are_disjoint_and_complete():
    source = make_source()
    shards = [evaluate(source, shard_index=i, shard_count=2) for i in range(2)]
    ids = [id_ for shard in shards for batch in shard for id_ in batch["id"][batch["valid"]]]
    assert sorted(ids) == sorted(source.ids)


@pytest.mark.parametrize("shards", [1, 2])
def test_evaluation_leaves_out_what_is_done(shards):
    """Records are left out by their index in the source, on every process."""
    source, done = make_source(), np.zeros(11, bool)
    done[[0, 3, 4, 9]] = True
    found = {}
    for shard in range(shards):
        for batch in evaluate(source, done=done, shard_index=shard, shard_count=shards):
            rows = batch["valid"]
            found |= dict(zip(batch["index"][rows].tolist(), batch["id"][rows], strict=True))
            assert np.all(batch["index"][~rows] == -1)
    assert found == {place: f"record {place}" for place in (1, 2, 5, 6, 7, 8, 10)}
    assert evaluate(source, done=np.ones(11, bool)) == []


def test_evaluation_keeps_16_bit_labels():
    vocabulary = Vocabulary.from_names([f"class {i}" for i in range(400)])
    label = np.array([[0, 399], [256, 65535]], np.uint16).repeat(16, 0).repeat(16, 1)
    source = ArraySource([np.zeros((32, 32, 3), np.uint8)], [label], ["one"])
    (batch,) = eval_batches(source, vocabulary, batch_size=1, short_sides=(32,), max_long_side=60)
    np.testing.assert_array_equal(batch["label"], label[None])


def make_folder(root, ids_hw):
    for kind in ("images", "annotations"):
        (root / "val" / kind).mkdir(parents=True)
    Image.fromarray(np.zeros((*ids_hw.shape, 3), np.uint8)).save(root / "val/images/one.jpg")
    Image.fromarray(ids_hw).save(root / "val/annotations/one.png")


def test_a_folder_maps_annotation_ids(tmp_path):
    vocabulary = Vocabulary(("a", "b"), (True, True), (9, 4), ignored_ids=(0,))
    make_folder(tmp_path, np.array([[9, 4], [0, 255]], np.uint8))
    source = open_source("folder", "val", data_dir=tmp_path, vocabulary=vocabulary)
    assert len(source) == 1
    record = source[0]
    assert record["id"] == "one" and record["image"].shape == (2, 2, 3)
    assert record["label"].tolist() == [[0, 1], [255, 255]]


def test_a_palette_label_picture_is_read_by_its_indices(tmp_path):
    make_folder(tmp_path, np.array([[2, 0]], np.uint8))
    picture = Image.new("P", (2, 1))
    picture.putpixel((0, 0), 2)
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(tmp_path / "val/annotations/one.png")
    source = open_source("folder", "val", data_dir=tmp_path, vocabulary=VOCABULARY)
    assert source[0]["label"].tolist() == [[2, 0]]


def test_errors_of_sources_say_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="val: no such folder, nor a list val.txt"):
        open_source("folder", "val", data_dir=tmp_path, vocabulary=VOCABULARY)
    make_folder(tmp_path, np.zeros((3, 2), np.uint8))
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "val/annotations/one.png")
    source = open_source("folder", "val", data_dir=tmp_path, vocabulary=VOCABULARY)
    with pytest.raises(
        ValueError, match=r"annotations/one.png: .*\(2, 2\), but one.jpg is \(3, 2\)"
    ):
        source[0]
    (tmp_path / "val/annotations/one.png").unlink()
    with pytest.raises(FileNotFoundError, match="annotations/one.png: no such file"):
        open_source("folder", "val", data_dir=tmp_path, vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match="no data set 'imagenet'"):
        open_source("imagenet", "val", data_dir=tmp_path, vocabulary=VOCABULARY)


def test_an_id_that_is_no_class_is_an_error_that_says_what_to_do(tmp_path):
    make_folder(tmp_path, np.array([[1, 7], [7, 255]], np.uint8))
    source = open_source("folder", "val", data_dir=tmp_path, vocabulary=VOCABULARY)
    message = r'annotations/one.png: id 7 at row 0, column 1 .*2 such pixels.*"ignored_ids": \[7\]'
    with pytest.raises(ValueError, match=message):
        source[0]
    with pytest.raises(ValueError, match=message):
        train(source, num_steps=1)


def test_a_damaged_picture_stops_the_training_with_its_path(tmp_path):
    make_folder(tmp_path, np.zeros((30, 30), np.uint8))
    file = tmp_path / "val/images/one.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    source = open_source("folder", "val", data_dir=tmp_path, vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match="images/one.jpg: damaged or cut off"):
        train(source, num_steps=1)


def test_a_published_data_set_has_to_be_prepared(tmp_path):
    command = "zegformer prepare coco_stuff --source=DIR --destination="
    with pytest.raises(FileNotFoundError, match=command):
        open_source("coco_stuff", "train", data_dir=tmp_path, vocabulary=VOCABULARY)
    with pytest.raises(
        ValueError, match="'coco_stuff' takes no options, got side, .*voc.py:r50: doc"
    ):
        open_source("coco_stuff", "train", data_dir=tmp_path, vocabulary=VOCABULARY, side=3)


def test_the_built_in_benchmarks_config_on_a_folder_says_what_to_change(tmp_path):
    message = (
        "'folder' takes no options, got side, as a config of the built-in .*; take one without "
        "dataset.options, such as configs/folder.py:tiny: docs/datasets.md has the command$"
    )
    with pytest.raises(ValueError, match=message):
        open_source("folder", "train", data_dir=tmp_path, vocabulary=VOCABULARY, side=3)
