"""A new segment classifier is one class and one line in the registry."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import shrunk
from clips import VIT, random_params

from zegformer_jax.experiment import Experiment, LoadedClip
from zegformer_jax.models.grouper import GrouperOutput
from zegformer_jax.segmentation.augmentation import View
from zegformer_jax.segmentation.classifiers import CLASSIFIERS
from zegformer_jax.segmentation.zegformer import Question, TextEmbeddings, Weights, predict


@dataclasses.dataclass(frozen=True)
class MeanColour:
    """Classifies a segment by the mean colour of its pixels: text embeddings are colours here."""

    clip: Any
    ensemble_weight: float

    def __call__(self, params, view, mask_logits_qhw, text_cd, wanted_q):
        del params, wanted_q
        pixels_hwc = view.image_hwc[::4, ::4] / 255.0
        masks_qhw = (mask_logits_qhw > 0).astype(jnp.float32)
        sums_qc = jnp.einsum("qhw,hwc->qc", masks_qhw, pixels_hwc)
        return 100 * sums_qc / masks_qhw.sum((1, 2))[:, None] @ text_cd.T

    def logit_scale(self, params):
        del params
        return jnp.log(100.0)


class TwoHalves:
    """A grouper with two queries, the left and the right half, which knows no class."""

    def apply(self, variables, images_bhwc, text_cd, all_layers):
        del variables, all_layers
        _, height, width, _ = images_bhwc.shape
        left = jnp.arange(width // 4) < width // 8
        masks = jnp.where(jnp.stack([left, ~left])[:, None], 20.0, -20.0)
        masks_qhw = jnp.broadcast_to(masks, (2, height // 4, width // 4))
        return GrouperOutput(jnp.zeros((1, 1, 2, len(text_cd) + 1)), masks_qhw[None, None])


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setitem(CLASSIFIERS, "mean_colour", MeanColour)
    config = shrunk.get_config().unlock()
    config.eval.update(segment_classifier="mean_colour", ensemble_weight=0.25)
    experiment = Experiment(config.lock(), tmp_path)
    experiment.clip = LoadedClip(VIT, random_params(VIT), None)
    return experiment


def test_the_config_chooses_it_and_fills_its_fields(experiment):
    classifier = experiment.segmentation_model.classifier
    assert isinstance(classifier, MeanColour) and classifier.ensemble_weight == 0.25
    assert classifier.clip.config == VIT


@pytest.mark.slow
def test_it_names_the_segments_of_an_image(experiment):
    model = dataclasses.replace(experiment.segmentation_model, grouper=TwoHalves())
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, :32, 0], image[:, 32:, 2] = 255, 255
    text = TextEmbeddings(*[jnp.eye(3)] * 2)
    (maps,) = predict(
        model, Weights(None), text, [View(jnp.asarray(image), jnp.array([32, 64]))],
        [Question(jnp.zeros(3, bool), ("clip",))],
        original_size=jnp.array([32, 64]), out_size=(32, 64),
    ).maps  # fmt: skip
    labels = np.asarray(maps[0, 0])
    assert np.all(labels[:, :28] == 0) and np.all(labels[:, 36:] == 2)


def test_a_name_that_is_not_there_is_refused(tmp_path):
    config = shrunk.get_config().unlock()
    config.eval.segment_classifier = "mean_colour"
    experiment = Experiment(config, tmp_path)
    experiment.clip = LoadedClip(VIT, random_params(VIT), None)
    message = "eval.segment_classifier 'mean_colour': choose one of crops, one_pass"
    with pytest.raises(ValueError, match=message):
        _ = experiment.segmentation_model
