"""The Python API: any image and any classes; errors are one clear line."""

import gc
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shrunk
from PIL import Image
from toy_experiment import ToyExperiment

import zegformer_jax
from zegformer_jax.experiment import Experiment
from zegformer_jax.experiment.workdir import CONFIG_FILE, load_config, save_config
from zegformer_jax.segmentation.zegformer import Prediction
from zegformer_jax.segmenter import PROGRAMS_KEPT, Segmentation, Segmenter
from zegformer_jax.text.vocabulary import Vocabulary, load_vocabulary

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["sheep", "tvmonitor, couch", "cat"]


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)


@pytest.mark.parametrize("classes, mode", [(3, "L"), (256, "L"), (300, "I;16")])
def test_the_label_image_survives_a_file(classes, mode, tmp_path):
    labels = np.random.default_rng(0).integers(0, classes, (9, 7)).astype(np.int32)
    labels[0, 0] = classes - 1
    vocabulary = Vocabulary.from_names([f"class {i}" for i in range(classes)])
    result = Segmentation(np.zeros((9, 7, 3), np.uint8), labels, vocabulary)
    result.label_image().save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image), labels)


def test_areas_are_shares_largest_first():
    labels = np.array([[2, 2, 2, 0]], np.int32)
    result = Segmentation(
        np.zeros((1, 4, 3), np.uint8), labels, Vocabulary.from_names(list("abc"))
    )  # fmt: skip
    assert result.areas() == {"c": 0.75, "a": 0.25} and list(result.areas()) == ["c", "a"]


def test_a_reduced_image_has_labels_of_the_whole_size():
    """The overlay is as small as the image; shares of classes are those of the labels."""
    labels = np.repeat([[0, 1, 1, 1]], 300, axis=1).repeat(600, axis=0).astype(np.int32)
    image = np.full((150, 300, 3), 255, np.uint8)
    result = Segmentation(image, labels, Vocabulary.from_names(["a", "b"]))
    assert result.overlay().size == (600, 300)  # small images are enlarged
    left, right = (np.asarray(result.overlay())[20, column].astype(int) for column in (75, 450))
    assert np.abs(left - right).max() > 50
    assert result.label_image().size == (1200, 600)
    assert result.areas() == {"b": 0.75, "a": 0.25}
    assert result.overlay(max_pixels=5000).size == (100, 50)


@pytest.fixture(scope="module")
def segmenter(finished):
    return zegformer_jax.load(finished.workdir)


@pytest.mark.slow
def test_path_image_and_array_give_the_same(segmenter, rgb, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(rgb).save(path)
    results = [segmenter(x, CLASSES) for x in (path, str(path), Image.fromarray(rgb), rgb)]
    for result in results:
        assert result.labels.shape == (40, 36) and result.labels.dtype == np.int32
        assert result.labels.min() >= 0 and result.labels.max() < 3
        assert result.vocabulary.names == tuple(CLASSES)
        assert sum(result.areas().values()) == pytest.approx(1)
        np.testing.assert_array_equal(result.labels, results[0].labels)
        np.testing.assert_array_equal(result.image, rgb)
    overlay = results[0].overlay()
    assert overlay.size[0] % 36 == 0 and overlay.size[1] % 40 == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (300, 5000)])
def test_extreme_image_sizes(segmenter, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    result = segmenter(image, CLASSES)
    assert result.labels.shape == size
    assert 0 <= result.labels.min() and result.labels.max() < 3
    assert result.overlay().size[0] >= size[1]


@pytest.mark.slow
def test_a_huge_jpeg_has_the_labels_of_the_whole_image(segmenter, tmp_path, monkeypatch):
    """The model sees 64 pixels; the file has 900."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    path = tmp_path / "huge.jpg"
    Image.fromarray(colours).resize((1200, 900)).save(path, quality=95)
    whole = segmenter(path, CLASSES)
    monkeypatch.setattr("zegformer_jax.input.photographs.HUGE", 1000)
    reduced = segmenter(path, CLASSES)
    assert whole.image.shape == (900, 1200, 3) and reduced.image.shape == (113, 150, 3)
    assert reduced.labels.shape == (900, 1200)
    assert np.mean(reduced.labels == whole.labels) > 0.98
    with pytest.raises(ValueError, match="huge.jpg: more than 1,000 pixels"):
        segmenter(path, CLASSES, max_pixels=1000)


@pytest.fixture
def of_tiles(finished):
    """Loads the model with tiles of 80 pixels and other fields of `eval`."""

    def load(say=None, **fields):
        config = load_config(finished.workdir).unlock()
        config.eval.update(**{"tile": 80, "gamma": 0.0} | fields)
        return Segmenter(Experiment.open(config.lock(), finished.workdir), say)

    return load


@pytest.mark.slow
def test_inside_a_tile_labels_are_those_of_the_tile_alone(of_tiles):
    """Tiles start at 0 and 55 in rows of 135 pixels, and at 0, 60 and 120 in columns of 200."""
    colours = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    image = np.asarray(Image.fromarray(colours).resize((200, 135), Image.Resampling.NEAREST))
    said = []
    views = {"flip": True, "more_short_sides": (96,)}
    segmenter = of_tiles(said.append, scores="clip", **views)
    classes = load_vocabulary("openmoji_voc").names
    labels = segmenter(image, classes).labels
    assert said == ["6 tiles of 80 x 80 pixels", "compiling ...", "compiling ..."]
    assert labels.shape == (135, 200) and len(np.unique(labels)) > 1
    for top, rows in ((0, slice(0, 57)), (55, slice(78, 135))):
        for left, columns in ((0, slice(0, 60)), (60, slice(80, 120)), (120, slice(140, 200))):
            alone = segmenter(image[top : top + 80, left : left + 80], classes).labels
            part = alone[rows.start - top : rows.stop - top, columns.start - left :]
            same = labels[rows, columns] == part[:, : columns.stop - columns.start]
            assert same.mean() > 0.999, (top, left)


@pytest.mark.slow
def test_a_small_image_is_one_tile(of_tiles, segmenter, rgb):
    np.testing.assert_array_equal(
        of_tiles(gamma=0.1)(rgb, CLASSES).labels, segmenter(rgb, CLASSES).labels
    )


@pytest.mark.slow
def test_a_huge_jpeg_is_cut_at_its_whole_size(of_tiles, tmp_path, monkeypatch):
    monkeypatch.setattr("zegformer_jax.input.photographs.HUGE", 1000)
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(colours).resize((1200, 900)).save(tmp_path / "huge.jpg")
    assert of_tiles().read(tmp_path / "huge.jpg").pixels.shape == (900, 1200, 3)


def test_few_compiled_programs_stay_in_memory(monkeypatch):
    """Images of 15 padded sizes, and then lists of 19 lengths, each with its own program."""

    def counted(self, weights, text, seen_c, images, original_size, out_size):
        return Prediction([], [jnp.zeros((1, 1, *out_size), jnp.int32) + len(seen_c)])

    def count():
        gc.collect()
        return sum(
            "counted" in x.hlo_modules()[0].name for x in jax.devices()[0].client.live_executables()
        )

    said = []
    monkeypatch.setattr(Segmenter, "_predict", counted)
    monkeypatch.setattr(ToyExperiment, "kind", "zegformer")
    segment = Segmenter(ToyExperiment(), say=said.append)
    for place in range(20):
        image = np.zeros((8, 8 + 32 * place, 3), np.uint8)
        assert segment(image, ["a"]).labels.shape == (8, 8 + 32 * place)
    assert count() == PROGRAMS_KEPT and said == ["compiling ..."] * 15
    for classes in range(1, 20):
        labels = segment(image, [f"class {place}" for place in range(classes)]).labels
        assert np.all(labels == classes)
    assert count() == PROGRAMS_KEPT and len(said) == 15 + 18, "the first was compiled before"


@pytest.mark.slow
def test_programs_are_kept_for_other_processes(tmp_path):
    """Also without the command, which sets the folder in the environment."""
    code = "import jax; from zegformer_jax.runtime.compiled import keep_programs; keep_programs(); "
    code += "print(jax.config.jax_compilation_cache_dir)"
    environment = {"PATH": "", "ZEGFORMER_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for more, expected in (
        ({}, tmp_path / "xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | more, capture_output=True, text=True
        )
        assert done.stdout == f"{expected}\n", done.stderr


@pytest.mark.parametrize("use", ["load", "evaluate", "train"])
def test_the_python_api_keeps_programs_too(use, monkeypatch, cache):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(ToyExperiment, "kind", "zegformer")
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        if use == "load":
            Segmenter(ToyExperiment())
        elif use == "evaluate":
            zegformer_jax.evaluate(ToyExperiment(), progress=False)
        else:
            with pytest.raises(AttributeError, match="no attribute 'check'"):
                zegformer_jax.train(ToyExperiment())
        assert jax.config.jax_compilation_cache_dir == f"{cache}/xla"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
def test_one_class_takes_everything(segmenter, rgb):
    assert segmenter(rgb, ["unheard of"]).areas() == {"unheard of": 1.0}


@pytest.mark.slow
def test_the_order_of_the_classes_does_not_matter(segmenter, rgb):
    forth, back = segmenter(rgb, CLASSES), segmenter(rgb, CLASSES[::-1])
    assert np.mean(forth.labels == 2 - back.labels) > 0.99


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(finished, segmenter, rgb):
    """Both halves compute in the dtype of the config; logits are float32 in either case."""
    config = load_config(finished.workdir).unlock()
    config.eval.dtype = "bfloat16"
    rough = Segmenter(Experiment(config.lock(), finished.workdir)).queries(rgb, CLASSES)
    exact = segmenter.queries(rgb, CLASSES)
    assert exact.class_logits_qc.shape == (8, len(CLASSES) + 1)
    assert exact.clip_logits_qc.shape == (8, len(CLASSES))
    assert exact.named_q.all() and rough.named_q.all()
    for a, b in zip(exact[:3], rough[:3], strict=True):
        assert a.dtype == b.dtype == np.float32
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert 1e-5 < error < 0.2


@pytest.mark.slow
def test_a_synonym_of_a_trained_class_is_seen(segmenter):
    classes = ["Cat", "rat", "kitten, cat", "sheep", "sofa", "zebra crossing"]
    assert segmenter.vocabulary(classes).seen == (True, True, True, False, False, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "classes, message",
    [
        ([], "empty"),
        (["cat", " "], "entry 2 has an empty name"),
        (["cat", "dog", "Cat"], "'cat' and 'Cat' are one class in two spellings .entries 1 and 3"),
        ("cat", "expected a list of names"),
    ],
)
def test_classes_that_are_no_vocabulary(segmenter, rgb, classes, message):
    with pytest.raises(ValueError, match=message):
        segmenter(rgb, classes)


def test_a_workdir_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no trained model here"):
        zegformer_jax.load(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_workdir_that_is_not_trained_yet(finished, tmp_path):
    save_config(shrunk.beside(finished.workdir), tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no checkpoint here: train"):
        zegformer_jax.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_FILE]


@pytest.mark.slow
def test_a_model_of_another_kind(finished):
    with pytest.raises(ValueError, match="per_pixel: holds a model of kind 'per_pixel'"):
        zegformer_jax.load(finished.workdir / "per_pixel")
