"""A data set of a module of its own, its vocabulary and one line, used as any other."""

import importlib
import json
import sys
import textwrap

import numpy as np
import pytest
import shrunk
from PIL import Image

from zegformer_jax.cli import main
from zegformer_jax.evaluation.subsets import load_subsets
from zegformer_jax.evaluation.targets import choose
from zegformer_jax.experiment import Experiment
from zegformer_jax.input import benchmarks
from zegformer_jax.input.datasets import open_source
from zegformer_jax.input.pipeline import train_batches
from zegformer_jax.input.settings import InputSettings

MODULE = """
    import dataclasses
    from pathlib import Path

    import numpy as np
    from PIL import Image

    from zegformer_jax.input.benchmarks.benchmark import Benchmark, Example


    @dataclasses.dataclass(frozen=True, eq=False)
    class Toy(Benchmark):
        def examples(self, source, split):
            files = sorted((Path(source) / split).glob("*.png"))
            return [Example(file.stem, file, file.with_suffix(".npy")) for file in files]

        def read(self, example):
            ids_hw = np.load(example.label)
            return np.asarray(Image.open(example.image)), np.array([0, 1, 1], np.uint8)[ids_hw]

        def encoded_image(self, example):
            return None


    BENCHMARK = Toy("toy", "VOCABULARY", {"train": 3, "validation": 2}, "Draw it yourself.")
"""
CLASSES = [{"name": "square"}, {"name": "disc, circle", "seen": False}]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The folder of the data set's files; the data set is registered by one line."""
    vocabulary = tmp_path / "toy.json"
    vocabulary.write_text(json.dumps({"classes": CLASSES}))
    text = textwrap.dedent(MODULE).replace("VOCABULARY", str(vocabulary))
    (tmp_path / "toy_data_set.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "toy_data_set", raising=False)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "toy", "toy_data_set")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("validation", 2)):
        folder = tmp_path / "files" / split
        folder.mkdir(parents=True)
        for index in range(count):
            image_hw3 = rng.integers(0, 256, (20, 24 + index, 3), np.uint8)
            Image.fromarray(image_hw3).save(folder / f"{index}.png")
            np.save(folder / f"{index}.npy", rng.integers(0, 3, (20, 24 + index)))
    return tmp_path / "files"


@pytest.fixture
def records(toy, tmp_path):
    """The prepared records."""
    flags = [f"--source={toy}", f"--destination={tmp_path / 'records'}", "--workers=1"]
    assert main.main(["prepare", "toy", *flags]) == 0
    return tmp_path / "records"


def files_of(toy, split, index):
    image_hw3 = np.asarray(Image.open(toy / split / f"{index}.png"))
    return image_hw3, np.minimum(np.load(toy / split / f"{index}.npy"), 1)


def test_it_is_prepared_and_named(toy, records, capsys):
    assert "toy" in benchmarks.names()
    vocabulary = benchmarks.find("toy").load_vocabulary()
    assert vocabulary.names == ("square", "disc, circle") and vocabulary.seen == (True, False)
    source = open_source("toy", "validation", data_dir=records, vocabulary=vocabulary)
    assert len(source) == 2
    for index in range(2):
        image_hw3, label_hw = files_of(toy, "validation", index)
        np.testing.assert_array_equal(source[index]["image"], image_hw3)
        np.testing.assert_array_equal(source[index]["label"], label_hw)
    with pytest.raises(ValueError, match="no data set 'toys'; there are folder, .*, toy$"):
        open_source("toys", "train", data_dir=records, vocabulary=vocabulary)
    capsys.readouterr()
    assert main.main(["prepare", "toy"]) == 0
    assert capsys.readouterr().out.startswith("Draw it yourself.\n")


def test_it_is_trained_on(toy, records):
    vocabulary = benchmarks.find("toy").load_vocabulary()
    source = open_source("toy", "train", data_dir=records, vocabulary=vocabulary)
    settings = InputSettings(batch_size=3, crop_size=32, short_sides=(20,), max_long_side=40)
    (batch,) = train_batches(source, vocabulary, settings, seed=0, num_steps=1)
    assert sorted(batch["index"].tolist()) == [0, 1, 2]
    for index, label_hw in zip(batch["index"], batch["label"], strict=True):
        _, expected_hw = files_of(toy, "train", index)
        assert np.count_nonzero(label_hw == 0) == np.count_nonzero(expected_hw == 0)
        assert set(np.unique(label_hw)) == {0, 255}  # the unseen class is ignored


def test_a_model_is_evaluated_on_it(records, tmp_path):
    experiment = Experiment.open(shrunk.get_config(), tmp_path / "w")
    (target,) = choose(f"toy={records}", experiment)
    assert (target.name, target.results, target.trained) == ("toy", "toy", experiment.vocabulary)
    there = target.experiment
    assert there.vocabulary == benchmarks.find("toy").load_vocabulary()
    assert len(there.open_split("validation")) == 2
    (subset,) = load_subsets(there.eval.vocabularies, there.vocabulary, "toy")
    assert subset.reported == {"square": True, "disc, circle": False}
