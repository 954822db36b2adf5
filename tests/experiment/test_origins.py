"""Origins of weights: the step, and whether a training reached its end."""

import numpy as np
import pytest

from configs import openmoji
from zegformer_jax.experiment import Experiment
from zegformer_jax.experiment.origins import Origin, facts, origin_of
from zegformer_jax.experiment.workdir import CONVERTED_FILE, save_config
from zegformer_jax.runtime.checkpoints import Checkpoints
from zegformer_jax.runtime.errors import MissingFile
from zegformer_jax.text.vocabulary import Vocabulary


@pytest.fixture
def workdir(tmp_path):
    """A run of 3,500 steps that was validated at step 7 and stopped at step 1,400."""
    save_config(openmoji.get_config(), tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        for step, score in ((7, 0.5), (1400, None)):
            checkpoints.save(step, {"params": {"x": np.ones(1)}}, score=score)
    return tmp_path


def test_a_training_that_was_stopped_is_said_to_be_so(workdir):
    origin = Experiment.open(None, workdir).origin
    assert str(origin) == f"{workdir}, step 1,400 of 3,500: NOT TRAINED TO ITS END"
    assert origin.as_json() == {
        "place": str(workdir), "step": 1400, "steps": 3500, "finished": False,
    }  # fmt: skip
    assert origin_of(workdir, steps=9, checkpoint="best").step == 7


def test_the_end_is_that_of_the_workdirs_config(workdir):
    config = openmoji.get_config().unlock()
    config.train.steps = 1400
    assert not Experiment.open(config, workdir).origin.is_finished
    save_config(config, workdir)
    origin = Experiment.open(openmoji.get_config(), workdir).origin
    assert str(origin) == f"{workdir}, step 1,400 of 1,400" and origin.is_finished


def test_converted_weights_have_no_step(workdir):
    (workdir / CONVERTED_FILE).write_text("zegformer.pth\n")
    origin = Experiment.open(None, workdir).origin
    assert str(origin) == f"{workdir}, converted weights" and origin.is_finished


def test_a_workdir_without_a_checkpoint(tmp_path):
    with pytest.raises(MissingFile, match="no checkpoint here"):
        origin_of(tmp_path, 10)
    assert not any(tmp_path.iterdir())


def test_on_another_data_set_the_origin_is_the_same(workdir):
    experiment = Experiment.open(None, workdir)
    experiment.origin = Origin("zegformer.pth")
    there, _ = experiment.on_dataset("folder", str(workdir))
    assert there.origin is experiment.origin


def test_facts_of_the_data_the_vocabulary_and_clip(workdir):
    settings = Experiment.open(None, workdir).dataset
    vocabulary = Vocabulary.from_names(["a", "b", "c"], [True, False, True])
    assert facts(settings, "records", "train", 8000, vocabulary, None) == [
        "data: openmoji_voc in records, 8,000 images (train)",
        "vocabulary: openmoji_voc, 3 classes: 2 seen, 1 unseen",
        "CLIP: none, word vectors",
    ]
