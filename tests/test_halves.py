"""Which segments CLIP need not see."""

import numpy as np
import pytest

from zegformer_jax import halves, inference

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
    defaults = dict(skip_below=0.0, top_segments=0, modes=inference.MODES, weight=2 / 3)
    return halves.Economy(**defaults | fields, vocabularies=tuple(SUBSETS))


@pytest.mark.parametrize("mode", inference.MODES)
@pytest.mark.parametrize("below", [1e-3, 1e-1])
def test_what_is_skipped_weighs_less_in_every_vocabulary(mode, below):
    """Also in a vocabulary of a few of the classes, where a query's scores are larger."""
    class_logits, clip_logits, masks = make_queries(0)
    chosen = economy(skip_below=below, modes=(mode,)).choose(class_logits, masks, SCALE)
    wanted, named = map(np.asarray, chosen)
    opacity = 1 / (1 + np.exp(-masks.max((1, 2))))
    heaviest = np.zeros(len(masks))
    for indices, seen in SUBSETS:
        scores = inference.class_scores(
            inference.select_classes(class_logits, indices),
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
    weights = np.asarray(inference.foreground_weights(class_logits, masks))
    assert set(np.flatnonzero(named)) == set(np.argsort(-weights)[:7])
    np.testing.assert_array_equal(wanted, named)
