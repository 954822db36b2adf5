"""The method on one image: the same call for every caller, and what is held meanwhile."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shrunk
from clips import VIT, random_params
from slow_but import slow_but

from configs import base
from zegformer_jax.experiment import Experiment, LoadedClip
from zegformer_jax.models.clip.model import CLIP
from zegformer_jax.models.grouper import GrouperOutput
from zegformer_jax.segmentation import label_maps
from zegformer_jax.segmentation.augmentation import View
from zegformer_jax.segmentation.classifiers.crops import STYLES, Crops
from zegformer_jax.segmentation.classifiers.one_pass import OnePass
from zegformer_jax.segmentation.zegformer import (
    Question,
    TextEmbeddings,
    Weights,
    ZegFormer,
    predict,
)


@pytest.mark.parametrize("other, of_grouper", [("", "imagenet"), ("single", "single")])
def test_each_half_has_its_own_prompts(monkeypatch, tmp_path, other, of_grouper):
    """The grouper the training's, or those that the evaluation names; CLIP its own."""
    sets = ("imagenet", "single", "imagenet_select_clip")
    embeddings = {prompts: np.full((2, 3), place) for place, prompts in enumerate(sets)}
    monkeypatch.setattr(LoadedClip, "embed", lambda self, names, prompts: embeddings[prompts])
    config = base.get_config()
    config.clip.update(grouper_prompts=sets[0], classifier_prompts=sets[2])
    config.eval.grouper_prompts = other

    def embed():
        experiment = Experiment(config, tmp_path)
        experiment.clip = LoadedClip(None, None, None)
        return experiment.text_embeddings(("cat", "dog"))

    text = embed()
    np.testing.assert_array_equal(text.grouper_cd, embeddings[of_grouper])
    np.testing.assert_array_equal(text.classifier_cd, embeddings[sets[2]])
    config.model.kind = "per_pixel"
    assert embed().classifier_cd is None


@pytest.mark.parametrize("style", slow_but(STYLES[:1], [*STYLES, "one_pass"]))
def test_an_image_without_segments_is_classified_all_the_same(style):
    """Every query gets CLIP's logits of an empty segment: a black crop, or a token alone."""
    clip, params = CLIP(VIT), random_params(VIT)
    classifier = OnePass(clip, 1) if style == "one_pass" else Crops(clip, style, 2)
    rng = np.random.default_rng(0)
    text = TextEmbeddings(*rng.normal(size=(2, 5, VIT.embed_dim)).astype(np.float32))
    class_logits, masks = rng.normal(size=(3, 6)), -1 - rng.random((3, 16, 16))

    class Grouper:
        def apply(self, variables, images, text_cd, all_layers):
            return GrouperOutput(jnp.asarray(class_logits)[None, None], masks[None, None])

    view = View(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8), np.array([60, 50]))
    method = ZegFormer(Grouper(), classifier)
    queries = method.run(Weights(None, params), text, view, [Question(np.ones(5, bool), ("clip",))])
    np.testing.assert_array_equal(queries.mask_logits_qhw, masks)
    logits = np.asarray(queries.clip_logits_qc)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, np.broadcast_to(logits[:1], logits.shape))
    if style in ("cropmask", "mask"):
        black = jnp.zeros((1, VIT.image_size, VIT.image_size, 3))
        feature = np.asarray(clip.apply({"params": params}, black, method=CLIP.encode_image))
        expected = np.exp(params["logit_scale"]) * text[1] @ feature[0] / np.linalg.norm(feature)
        np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-4)


class ColourGrouper:
    """Stands for the grouper: the three colours are the segments of an image."""

    def apply(self, variables, images, text_cd, all_layers):
        masks = images[:, ::4, ::4].transpose(0, 3, 1, 2)
        class_logits = jnp.tile(masks.mean((2, 3))[..., None], len(text_cd) + 1)
        return GrouperOutput(class_logits[None], masks[None])


@pytest.mark.parametrize("classifier", [Crops(CLIP(VIT), clip_chunk=1), OnePass(CLIP(VIT), 1)])
def test_images_together_are_as_each_alone(classifier):
    """One has three segments and the other one, so CLIP's loop over crops ends later for one."""
    rng = np.random.default_rng(0)
    text = TextEmbeddings(*rng.normal(size=(2, 5, VIT.embed_dim)).astype(np.float32))
    images = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    images[1, ..., 1:] = 0
    sizes = np.array([[64, 50], [40, 64]])
    model, questions = (
        ZegFormer(ColourGrouper(), classifier),
        [Question(np.ones(5, bool), ("clip",))],
    )

    @jax.jit
    def run(image, size):
        return model.run(Weights(None, random_params(VIT)), text, View(image, size), questions)

    for image, size, *together in zip(images, sizes, *jax.vmap(run)(images, sizes), strict=True):
        for one, other in zip(run(image, size), together, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def make_grouper(queries):
    config = shrunk.get_config().unlock()
    config.model.transformer.update(queries=queries, layers=6)
    return Experiment(config, "nowhere").build_model(VIT.embed_dim)


@pytest.mark.slow
def test_the_last_layer_alone_is_the_last_of_all():
    grouper, rng = make_grouper(7), np.random.default_rng(0)
    images, text = rng.normal(size=(2, 64, 96, 3)), rng.normal(size=(5, VIT.embed_dim))
    variables = jax.jit(grouper.init)(jax.random.key(0), images, text)
    every = jax.jit(grouper.apply)(variables, images, text)
    last = jax.jit(partial(grouper.apply, all_layers=False))(variables, images, text)
    for of_every, of_last in zip(every, last, strict=True):
        assert len(of_every) == 6 and len(of_last) == 1
        np.testing.assert_allclose(of_last[0], of_every[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_queries_cost_no_memory_beyond_their_masks(monkeypatch):
    """A picture needs the mask logits of one layer, and no map at a larger size."""
    monkeypatch.setattr(label_maps, "STRIP_VALUES_ON", {})
    monkeypatch.setattr(label_maps, "STRIP_VALUES", 2**14)
    clip, size = CLIP(VIT), np.array([256, 256])
    view = View(np.zeros((256, 256, 3), np.uint8), size)
    text = TextEmbeddings(*np.zeros((2, 5, VIT.embed_dim), np.float32))
    question = Question(np.zeros(5, bool), ("clip",))

    def temporaries(queries):
        grouper = make_grouper(queries)
        shapes = jax.eval_shape(grouper.init, jax.random.key(0), view.image_hwc[None], text[0])
        method = ZegFormer(grouper, Crops(clip, clip_chunk=2))

        def label(*weights):
            return predict(
                method, Weights(*weights), text, [view], [question],
                original_size=size, out_size=(256, 256),
            ).maps  # fmt: skip

        compiled = jax.jit(label).lower(shapes, random_params(VIT)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    mask_bytes = 4 * 64 * 64
    assert temporaries(300) - temporaries(100) < 3 * 200 * mask_bytes
