"""Tests of the segments that need no classifier, against the scores they would have had."""

import numpy as np
import pytest

from zegformer_jax.segmentation.class_scores import (
    MODES,
    class_scores,
    foreground_weights,
    select_classes,
)
from zegformer_jax.segmentation.skipping import Skipping

SUBSETS = [(range(12), np.arange(12) < 7), ([2, 9], np.array([True, False]))]
SCALE = 3.0


def make_queries(seed, queries=200):
    rng = np.random.default_rng(seed)
    class_logits = rng.normal(0, 6, (queries, 13))
    class_logits[:, -1] += rng.uniform(-10, 60, queries)
    clip_logits = np.exp(SCALE) * rng.uniform(-1, 1, (queries, 12))
    masks = rng.normal(-3, 4, (queries, 3, 4))
    return class_logits, clip_logits, masks


def choose(class_logits, masks, modes=MODES, weight=2 / 3, vocabularies=SUBSETS, **fields):
    scorings = [(*vocabulary, mode) for vocabulary in vocabularies for mode in modes]
    return Skipping(**fields).choose(class_logits, masks, SCALE, scorings, weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("below", [1e-3, 1e-1])
def test_what_is_skipped_weighs_less_in_every_vocabulary(mode, below):
    """This holds in a vocabulary of few classes too, in which a query's scores are larger."""
    class_logits, clip_logits, masks = make_queries(0)
    chosen = choose(class_logits, masks, skip_below=below, modes=(mode,))
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
    wanted, named = choose(class_logits, masks)
    assert wanted.all() and named.all()


def test_only_the_segments_with_most_foreground_are_named():
    class_logits, _, masks = make_queries(2)
    wanted, named = choose(class_logits, masks, top_segments=7)
    weights = np.asarray(foreground_weights(class_logits, masks))
    assert set(np.flatnonzero(named)) == set(np.argsort(-weights)[:7])
    np.testing.assert_array_equal(wanted, named)


# A query of twelve classes alike, opaque in one pixel and of no other opacity worth the name.
ALIKE = np.zeros((1, 13))
ONE_PIXEL = np.where(np.arange(12).reshape(1, 3, 4) == 5, 50.0, -9.0)


@pytest.mark.parametrize("subsets", [SUBSETS, SUBSETS[::-1]])
def test_one_vocabulary_is_enough_to_see_a_segment(subsets):
    """One of twelve classes weighs 1/13, one of two 1/3."""
    options = {"skip_below": 0.2, "modes": ("grouper",)}
    assert not choose(ALIKE, ONE_PIXEL, vocabularies=SUBSETS[:1], **options)[0].any()
    assert choose(ALIKE, ONE_PIXEL, vocabularies=subsets, **options)[0].all()


@pytest.mark.parametrize("modes", [("grouper", "clip"), ("clip", "grouper")])
def test_one_way_of_scoring_is_enough_to_see_a_segment(modes):
    options = dict(skip_below=0.5, vocabularies=SUBSETS[:1])
    assert not choose(ALIKE, ONE_PIXEL, modes=("grouper",), **options)[0].any()
    assert choose(ALIKE, ONE_PIXEL, modes=modes, **options)[0].all()


@pytest.mark.parametrize("weight", [0.1, 0.9])
def test_the_bound_is_for_the_ensembles_weight(weight):
    """The scores are 13^(weight - 1) where CLIP is sure: 0.10 and 0.77."""
    chosen = choose(
        ALIKE,
        ONE_PIXEL,
        skip_below=0.5,
        modes=("ensemble_all",),
        weight=weight,
        vocabularies=SUBSETS[:1],
    )
    assert chosen[0].tolist() == [weight > 0.5]


def test_the_most_opaque_pixel_bounds_a_query():
    """However sure its class: where a mask is nowhere opaque, no pixel weighs much."""
    opacity = np.array([0.5, 0.19, 0.21])[:, None, None]
    masks = np.where(np.arange(12).reshape(1, 3, 4) == 5, np.log(opacity / (1 - opacity)), -9.0)
    sure = np.where(np.arange(13) == 2, 50.0, np.zeros((3, 1)))
    wanted, _ = choose(sure, masks, skip_below=0.2, modes=("grouper",))
    assert wanted.tolist() == [True, False, True]


def test_of_the_named_segments_only_those_that_weigh_are_seen():
    class_logits, _, masks = make_queries(3)
    _, named = choose(class_logits, masks, top_segments=60)
    heavy, _ = choose(class_logits, masks, skip_below=0.5)
    both = choose(class_logits, masks, top_segments=60, skip_below=0.5)
    np.testing.assert_array_equal(both[0], named & heavy)
    np.testing.assert_array_equal(both[1], named)
    assert 0 < both[0].sum() < min(named.sum(), heavy.sum())


@pytest.mark.parametrize("name", ["skip_below", "top_segments"])
def test_less_than_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"eval.{name} -1: give 0 or more"):
        Skipping(**{name: -1})
