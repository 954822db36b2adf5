"""The objectives' totals and batches, and how an experiment's kind chooses among them."""

import dataclasses
import json

import numpy as np
import pytest
import shrunk
from folders import CLASSES as CLASSES_OF_FOLDER
from folders import make_folder
from ml_collections import ConfigDict

from zegformer_jax.experiment import Experiment
from zegformer_jax.input.folder import Folder
from zegformer_jax.input.records.write import prepare
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.training.objectives import open_objective
from zegformer_jax.training.objectives.grouper import GrouperObjective
from zegformer_jax.training.objectives.per_pixel import PerPixelObjective

CLASSES, IGNORE = 7, 255
TEXT = np.eye(CLASSES, 16, dtype=np.float32)


@pytest.fixture
def labels():
    """Label maps with 0 to 7 classes; the grouper's objective keeps 5 an image."""
    rng = np.random.default_rng(0)
    maps = [rng.choice([*range(count), CLASSES, IGNORE], (9, 11)) for count in (0, 1, 4, 7)]
    return np.array(maps, np.uint8)


def test_the_groupers_totals_are_targets_and_weights_of_all_queries(labels, tmp_path):
    config = shrunk.get_config().unlock()
    config.loss.no_object_weight = 0.3
    experiment = Experiment.open(config, tmp_path)
    totals = GrouperObjective(experiment, TEXT).totals({"label": labels})
    targets = sum(min(len(np.unique(x[x < CLASSES])), 5) for x in labels)
    assert totals.targets == targets == 0 + 1 + 4 + 5
    queries = len(labels) * 8
    np.testing.assert_allclose(totals.class_weight, targets + 0.3 * (queries - targets), rtol=1e-6)


def test_the_baselines_total_is_the_number_of_labelled_pixels(labels, tmp_path):
    experiment = Experiment.open(shrunk.get_config("per_pixel"), tmp_path)
    total = PerPixelObjective(experiment, TEXT).totals({"label": labels})
    assert total == (labels < CLASSES).sum() > 0


@pytest.fixture
def mine(tmp_path):
    """An experiment on a folder of a user's, without CLIP."""
    folder = make_folder(tmp_path / "mine")
    config = shrunk.get_config("per_pixel").unlock()
    config.dataset.update(name="folder", directory=str(folder), vocabulary="")
    config.dataset.options = ConfigDict()
    return folder, config


class WithoutClip(Experiment):
    """Experiment with other text embeddings."""

    def embed_classes(self, names, prompts=""):
        return TEXT[: len(names)]


def open_mine(mine, tmp_path, **fields):
    folder, config = mine
    config.input.update(fields)
    return open_objective(WithoutClip.open(config, tmp_path / "run"))


def change_classes(folder, classes, **fields):
    (folder / "classes.json").write_text(json.dumps({"classes": classes} | fields))


def prepare_folder(mine):
    folder, config = mine
    config.dataset.directory = f"{folder}_records"
    prepare(Folder.open(folder), folder, f"{folder}_records", workers=1, progress=False)


MOON = {"id": 5, "name": "moon"}


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_class_without_a_pixel_is_refused(mine, tmp_path, is_prepared):
    change_classes(mine[0], [*CLASSES_OF_FOLDER, MOON], ignored_ids=[9])
    if is_prepared:
        prepare_folder(mine)
    message = (
        r"mine\S*: train: no pixel shows 'moon' \(id 5\); \d\d\.\d% of the pixels are 255 or 9, "
        'which mean no label: if 255 or 9 is a class, give it that "id" in classes.json; '
        "if it is meant so, set input.allow_missing_classes=True$"
    )
    with pytest.raises(UserError, match=message):
        open_mine(mine, tmp_path)
    assert open_mine(mine, tmp_path, allow_missing_classes=True).classes == 3


@pytest.mark.parametrize("is_prepared", [False, True])
def test_an_unseen_class_needs_no_pixel(mine, tmp_path, is_prepared):
    change_classes(mine[0], [*CLASSES_OF_FOLDER, MOON | {"seen": False}], ignored_ids=[9])
    if is_prepared:
        prepare_folder(mine)
    assert open_mine(mine, tmp_path).classes == 2


@pytest.mark.parametrize("is_prepared", [False, True])
def test_labels_without_any_class_are_refused(mine, tmp_path, is_prepared):
    change_classes(mine[0], [MOON], ignored_ids=[1, 3, 7, 9])
    if is_prepared:
        prepare_folder(mine)
    with pytest.raises(
        UserError, match="train: no pixel has a label; 100.0% of the pixels are 255"
    ):
        open_mine(mine, tmp_path)


def test_a_part_of_a_published_data_set_may_lack_classes(mine, tmp_path, monkeypatch):
    """But not all of them."""
    folder, config = mine
    change_classes(folder, [*CLASSES_OF_FOLDER, MOON], ignored_ids=[9])
    benchmark = dataclasses.replace(Folder.open(folder), name="pascal_voc")
    prepare(benchmark, folder, tmp_path / "records", workers=1, progress=False)
    config.dataset.update(name="pascal_voc", directory=str(tmp_path / "records"))
    assert open_mine(mine, tmp_path).classes == 3
    classes = json.loads((tmp_path / "records/classes.json").read_text())
    for item in classes["classes"]:
        item["seen"] = item["name"] == "moon"
    (tmp_path / "records/classes.json").write_text(json.dumps(classes))
    with pytest.raises(
        UserError, match="records: train: no pixel shows any of 1 classes; if it is"
    ):
        open_mine(mine, tmp_path)


def test_an_unknown_kind_names_those_that_there_are(tmp_path):
    config = shrunk.get_config().unlock()
    config.model.kind = "grouper"
    with pytest.raises(ValueError, match="model.kind 'grouper': choose one of zegformer, per_pix"):
        open_objective(Experiment.open(config, tmp_path))
