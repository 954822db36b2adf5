"""The two halves together: which segments CLIP need not see, and what is held meanwhile."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shrunk
from clips import VIT, random_params

from configs import base
from zegformer_jax.experiment import models as experiment
from zegformer_jax.experiment.models import embed_vocabulary, make_economy
from zegformer_jax.models.clip.model import CLIP
from zegformer_jax.models.grouper import GrouperOutput
from zegformer_jax.segmentation import label_maps
from zegformer_jax.segmentation.augmentation import Version
from zegformer_jax.segmentation.class_scores import (
    MODES,
    class_scores,
    foreground_weights,
    select_classes,
)
from zegformer_jax.segmentation.skipping import Economy
from zegformer_jax.segmentation.zegformer import SEGMENT_STYLES, TextEmbeddings, run_models

SUBSETS = [(range(12), np.arange(12) < 7), ([2, 9], np.array([True, False]))]
SCALE = 3.0


def make_queries(seed, queries=200):
    rng = np.random.default_rng(seed)
    class_logits = rng.normal(0, 6, (queries, 13))
    class_logits[:, -1] += rng.uniform(-10, 60, queries)
    clip_logits = np.exp(SCALE) * rng.uniform(-1, 1, (queries, 12))
    masks = rng.normal(-3, 4, (queries, 3, 4))
    return class_logits, clip_logits, masks


def economy(**fields):
    defaults = dict(skip_below=0.0, top_segments=0, modes=MODES, weight=2 / 3, vocabularies=SUBSETS)
    return Economy(**defaults | fields)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("below", [1e-3, 1e-1])
def test_what_is_skipped_weighs_less_in_every_vocabulary(mode, below):
    """Also in a vocabulary of a few of the classes, where a query's scores are larger."""
    class_logits, clip_logits, masks = make_queries(0)
    chosen = economy(skip_below=below, modes=(mode,)).choose(class_logits, masks, SCALE)
    wanted, named = map(np.asarray, chosen)
    opacity = 1 / (1 + np.exp(-masks.max((1, 2))))
    heaviest = np.zeros(len(masks))
    for indices, seen in SUBSETS:
        scores = class_scores(
            select_classes(class_logits, indices),
            clip_logits[:, indices],
            seen,
            mode=mode,
        )
        heaviest = np.maximum(heaviest, np.asarray(scores).max(-1) * opacity)
    assert np.all(heaviest[~wanted] < below)
    assert 10 < (~wanted).sum() < len(masks) - 10
    assert named.all()


def test_without_a_bound_clip_sees_and_names_everything():
    class_logits, _, masks = make_queries(1)
    wanted, named = economy().choose(class_logits, masks, SCALE)
    assert wanted.all() and named.all()


def test_only_the_segments_with_most_foreground_are_named():
    class_logits, _, masks = make_queries(2)
    wanted, named = economy(top_segments=7).choose(class_logits, masks, SCALE)
    weights = np.asarray(foreground_weights(class_logits, masks))
    assert set(np.flatnonzero(named)) == set(np.argsort(-weights)[:7])
    np.testing.assert_array_equal(wanted, named)


# A query of twelve classes alike, opaque in one pixel and of no other opacity worth the name.
ALIKE = np.zeros((1, 13))
ONE_PIXEL = np.where(np.arange(12).reshape(1, 3, 4) == 5, 50.0, -9.0)


@pytest.mark.parametrize("subsets", [SUBSETS, SUBSETS[::-1]])
def test_one_vocabulary_is_enough_to_see_a_segment(subsets):
    """One of twelve classes weighs 1/13, one of two 1/3."""
    of_twelve = economy(skip_below=0.2, modes=("grouper",), vocabularies=SUBSETS[:1])
    assert not of_twelve.choose(ALIKE, ONE_PIXEL, SCALE)[0].any()
    of_both = economy(skip_below=0.2, modes=("grouper",), vocabularies=subsets)
    assert of_both.choose(ALIKE, ONE_PIXEL, SCALE)[0].all()


@pytest.mark.parametrize("modes", [("grouper", "clip"), ("clip", "grouper")])
def test_one_way_of_scoring_is_enough_to_see_a_segment(modes):
    options = dict(skip_below=0.5, vocabularies=SUBSETS[:1])
    assert not economy(modes=("grouper",), **options).choose(ALIKE, ONE_PIXEL, SCALE)[0].any()
    assert economy(modes=modes, **options).choose(ALIKE, ONE_PIXEL, SCALE)[0].all()


@pytest.mark.parametrize("weight", [0.1, 0.9])
def test_the_bound_is_for_the_ensembles_weight(weight):
    """The scores are 13^(weight - 1) where CLIP is sure: 0.10 and 0.77."""
    chosen = economy(
        skip_below=0.5, modes=("ensemble_all",), weight=weight, vocabularies=SUBSETS[:1]
    ).choose(ALIKE, ONE_PIXEL, SCALE)
    assert chosen[0].tolist() == [weight > 0.5]


def test_the_most_opaque_pixel_bounds_a_query():
    """However sure its class: where a mask is nowhere opaque, no pixel weighs much."""
    opacity = np.array([0.5, 0.19, 0.21])[:, None, None]
    masks = np.where(np.arange(12).reshape(1, 3, 4) == 5, np.log(opacity / (1 - opacity)), -9.0)
    sure = np.where(np.arange(13) == 2, 50.0, np.zeros((3, 1)))
    wanted, _ = economy(skip_below=0.2, modes=("grouper",)).choose(sure, masks, SCALE)
    assert wanted.tolist() == [True, False, True]


def test_of_the_named_segments_only_those_that_weigh_are_seen():
    class_logits, _, masks = make_queries(3)
    _, named = economy(top_segments=60).choose(class_logits, masks, SCALE)
    heavy, _ = economy(skip_below=0.5).choose(class_logits, masks, SCALE)
    both = economy(top_segments=60, skip_below=0.5).choose(class_logits, masks, SCALE)
    np.testing.assert_array_equal(both[0], named & heavy)
    np.testing.assert_array_equal(both[1], named)
    assert 0 < both[0].sum() < min(named.sum(), heavy.sum())


def test_the_economy_is_the_configs():
    config = base.get_config()
    config.eval.update(skip_below=0.25, top_segments=3, ensemble_weight=0.75)
    made = make_economy(config, ("clip", "grouper"), SUBSETS)
    assert made[:4] == (0.25, 3, ("clip", "grouper"), 0.75)
    for (indices, seen), expected in zip(made.vocabularies, SUBSETS, strict=True):
        np.testing.assert_array_equal(indices, expected[0])
        np.testing.assert_array_equal(seen, expected[1])


@pytest.mark.parametrize("name", ["skip_below", "top_segments"])
def test_less_than_nothing_is_refused(name):
    config = base.get_config()
    config.eval[name] = -1
    with pytest.raises(ValueError, match=f"eval.{name} -1.*: give 0 or more"):
        make_economy(config, ("clip",), SUBSETS)


@pytest.mark.parametrize("other, of_grouper", [("", "imagenet"), ("single", "single")])
def test_each_half_has_its_own_prompts(monkeypatch, tmp_path, other, of_grouper):
    """The grouper the training's, or those that the evaluation names; CLIP its own."""
    sets = ("imagenet", "single", "imagenet_select_clip")
    embeddings = {prompts: np.full((2, 3), place) for place, prompts in enumerate(sets)}
    monkeypatch.setattr(experiment, "embed_names", lambda clip, names, prompts: embeddings[prompts])
    config = base.get_config()
    config.clip.update(grouper_prompts=sets[0], classifier_prompts=sets[2])
    config.eval.grouper_prompts = other
    text = embed_vocabulary(config, tmp_path, "a CLIP", ("cat", "dog"))
    np.testing.assert_array_equal(text.grouper_cd, embeddings[of_grouper])
    np.testing.assert_array_equal(text.classifier_cd, embeddings[sets[2]])
    config.model.kind = "per_pixel"
    assert embed_vocabulary(config, tmp_path, "a CLIP", ("cat", "dog"))[1] is None


@pytest.mark.parametrize("style", SEGMENT_STYLES)
def test_a_picture_without_segments_is_named_all_the_same(style):
    """Every query gets what CLIP says of nothing: of a black crop, or of its class token alone."""
    clip, params = CLIP(VIT), random_params(VIT)
    rng = np.random.default_rng(0)
    text = TextEmbeddings(*rng.normal(size=(2, 5, VIT.embed_dim)).astype(np.float32))
    class_logits, masks = rng.normal(size=(3, 6)), -1 - rng.random((3, 16, 16))

    class Grouper:
        def apply(self, variables, images, text_cd, all_layers):
            return GrouperOutput(jnp.asarray(class_logits)[None, None], masks[None, None])

    version = Version(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8), np.array([60, 50]))
    nothing = Economy(0.0, 0, (), 0.0, ())
    queries = run_models(
        Grouper(), clip, None, params, text, version,
        crop_style=style, clip_chunk=2, one_pass_layers=1, economy=nothing,
    )  # fmt: skip
    np.testing.assert_array_equal(queries.mask_logits_qhw, masks)
    logits = np.asarray(queries.clip_logits_qc)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, np.broadcast_to(logits[:1], logits.shape))
    if style in ("cropmask", "mask"):
        black = jnp.zeros((1, VIT.image_size, VIT.image_size, 3))
        feature = np.asarray(clip.apply({"params": params}, black, method=CLIP.encode_image))
        expected = np.exp(params["logit_scale"]) * text[1] @ feature[0] / np.linalg.norm(feature)
        np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-4)


def make_grouper(queries):
    config = shrunk.get_config().unlock()
    config.model.transformer.update(queries=queries, layers=6)
    return experiment.build_model(config, VIT.embed_dim)


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
    """From the picture to its label map: the logits of one layer, and no map at a larger size."""
    monkeypatch.setattr(label_maps, "STRIP_VALUES_ON", {})
    monkeypatch.setattr(label_maps, "STRIP_VALUES", 2**14)
    clip, size = CLIP(VIT), np.array([256, 256])
    version = Version(np.zeros((256, 256, 3), np.uint8), size)
    text = TextEmbeddings(*np.zeros((2, 5, VIT.embed_dim), np.float32))
    everything = Economy(0.0, 0, (), 0.0, ())

    def temporaries(queries):
        grouper = make_grouper(queries)
        shapes = jax.eval_shape(grouper.init, jax.random.key(0), version.image_hwc[None], text[0])

        def label(variables, clip_params):
            found = run_models(
                grouper, clip, variables, clip_params, text, version,
                crop_style="cropmask", clip_chunk=2, one_pass_layers=1, economy=everything,
            )  # fmt: skip
            view = label_maps.View(found.mask_logits_qhw, size)
            question = label_maps.Question([found.clip_logits_qc[None]], np.zeros(5, bool))
            return label_maps.label_maps(
                [view], [question], original_size=size, out_size=(256, 256)
            )

        compiled = jax.jit(label).lower(shapes, random_params(VIT)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    mask_bytes = 4 * 64 * 64
    assert temporaries(300) - temporaries(100) < 3 * 200 * mask_bytes
