"""The objectives' totals and batches, and how an experiment's kind chooses among them."""

import numpy as np
import pytest
import shrunk

from zegformer_jax.experiment import Experiment
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


def test_an_unknown_kind_names_those_that_there_are(tmp_path):
    config = shrunk.get_config().unlock()
    config.model.kind = "grouper"
    with pytest.raises(ValueError, match="model.kind 'grouper': choose one of zegformer, per_pix"):
        open_objective(Experiment.open(config, tmp_path))
