"""Tests of inference.py against golden semantic maps, SciPy's interpolation and plain NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from zegformer_jax import inference

SEEN = np.array([True] * 5 + [False] * 2)
STATIC = ("padded_size", "out_size", "rows_at_once")

semantic_map = jax.jit(inference.semantic_map, static_argnames=STATIC)
label_map = jax.jit(inference.label_map, static_argnames=STATIC)
per_pixel_map = jax.jit(inference.per_pixel_map, static_argnames=STATIC)
class_scores = jax.jit(inference.class_scores, static_argnames=("mode", "weight"))


def random_case(seed, queries=4, classes=3):
    random = np.random.default_rng(seed)
    return (
        random.normal(size=(queries, classes + 1)).astype(np.float32),
        random.normal(size=(queries, classes)).astype(np.float32),
        random.normal(size=(queries, 6, 8)).astype(np.float32) * 4,
    )


def scipy_resize(maps, size):
    """Bilinear with half-pixel centres and clamped edges, in float64."""
    axes = [
        (np.arange(out) + 0.5) * length / out - 0.5
        for out, length in zip(size, maps.shape[1:], strict=True)
    ]
    grid = np.meshgrid(*axes, indexing="ij")
    resize = partial(scipy.ndimage.map_coordinates, coordinates=grid, order=1, mode="nearest")
    return np.stack([resize(np.asarray(one, np.float64)) for one in maps])


def test_ensemble_of_a_wholly_unseen_vocabulary_is_the_unseen_formula():
    class_logits, clip_logits, _ = random_case(1)
    unseen = inference.class_scores(class_logits, clip_logits, np.zeros(3, bool))
    every = inference.class_scores(
        class_logits, clip_logits, np.zeros(3, bool), mode="ensemble_all"
    )
    np.testing.assert_allclose(unseen, every, rtol=1e-6)


def test_ensemble_of_a_wholly_seen_vocabulary():
    class_logits, clip_logits, _ = random_case(2)
    seen = inference.class_scores(class_logits, clip_logits, np.ones(3, bool), weight=0.75)
    with_no_object = np.concatenate([clip_logits, class_logits[:, -1:]], axis=1)
    grouper = scipy.special.softmax(class_logits, axis=1)[:, :-1]
    mean = scipy.special.softmax(with_no_object, axis=1)[:, :-1].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(seen, grouper**0.75 * mean**0.25, rtol=1e-5)


@pytest.mark.parametrize("mode", inference.MODES)
def test_scores_stay_finite_where_a_softmax_underflows(mode):
    class_logits = jnp.array([[100.0, -100.0, 0.0, 90.0]])
    clip_logits = jnp.array([[-300.0, 200.0, 100.0]])
    scores = class_scores(class_logits, clip_logits, SEEN[3:6], mode=mode)
    assert np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()


def test_selected_classes_equal_a_smaller_vocabulary():
    class_logits, _, _ = random_case(3, classes=5)
    selected = inference.select_classes(class_logits, [4, 1])
    np.testing.assert_array_equal(selected, class_logits[:, [4, 1, 5]])


@pytest.mark.parametrize("rows_at_once", [1, 7, 64])
def test_semantic_map_is_the_formula_at_any_strip_height(rows_at_once):
    scores, _, mask_logits = random_case(4, classes=2)
    seen, gamma = np.array([True, False, True]), 0.3
    result = semantic_map(
        scores, mask_logits, padded_size=(24, 32), size=jnp.array([21, 30]),
        original_size=jnp.array([13, 41]), out_size=(16, 44), gamma=gamma, seen_c=seen,
        rows_at_once=rows_at_once,
    )  # fmt: skip
    probabilities = scipy.special.expit(scipy_resize(mask_logits, (24, 32)))
    padded_map = np.einsum("qc,qhw->chw", scores.astype(np.float64), probabilities)
    expected = scipy_resize(padded_map[:, :21, :30], (13, 41)) - gamma * seen[:, None, None]
    np.testing.assert_allclose(result[:, :13, :41], expected, atol=5e-6)
    beyond = np.broadcast_to(-gamma * seen[:, None, None], (3, 3, 44))
    np.testing.assert_allclose(result[:, 13:], beyond, atol=1e-7)


def test_label_map_is_the_argmax_of_the_semantic_map():
    scores, _, mask_logits = random_case(5, queries=9, classes=6)
    arguments = dict(
        padded_size=(24, 32), size=jnp.array([24, 27]), original_size=jnp.array([40, 33]),
        out_size=(40, 33), gamma=0.1, seen_c=SEEN, rows_at_once=16,
    )  # fmt: skip
    labels = label_map(scores, mask_logits, **arguments)
    expected = semantic_map(scores, mask_logits, **arguments).argmax(axis=0)
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == jnp.int32 and len(np.unique(labels)) > 2


def test_per_pixel_map_is_the_formula():
    _, _, logits_chw = random_case(6, queries=5)
    seen = np.array([True, False, True, False, True])
    result = per_pixel_map(
        logits_chw, padded_size=(24, 32), size=jnp.array([21, 30]), gamma=0.2, seen_c=seen,
        original_size=jnp.array([30, 40]), out_size=(30, 40),
    )  # fmt: skip
    probabilities = scipy.special.softmax(scipy_resize(logits_chw, (24, 32)), axis=0)
    expected = scipy_resize(probabilities[:, :21, :30], (30, 40)) - 0.2 * seen[:, None, None]
    np.testing.assert_allclose(result, expected, atol=5e-6)


def test_wrong_arguments_are_named():
    class_logits, clip_logits, mask_logits = random_case(7)
    with pytest.raises(ValueError, match="score mode 'both' is unknown; choose one of ensemble"):
        inference.class_scores(class_logits, clip_logits, SEEN[:3], mode="both")
    with pytest.raises(ValueError, match="score mode 'ensemble' needs CLIP's logits"):
        inference.class_scores(class_logits, None, SEEN[:3])
    size = jnp.array([24, 32])
    with pytest.raises(ValueError, match="pass seen_c"):
        inference.semantic_map(
            class_logits, mask_logits, padded_size=(24, 32), size=size, original_size=size,
            out_size=(24, 32), gamma=0.1,
        )  # fmt: skip


@pytest.mark.parametrize("mode", inference.MODES)
@given(
    seed=st.integers(0, 2**32 - 1),
    no_object=st.floats(-30, 60),
    weight=st.floats(0, 1),
    scale=st.floats(0, 5),
)
def test_no_score_exceeds_its_bound(mode, seed, no_object, weight, scale):
    rng = np.random.default_rng(seed)
    class_logits = np.append(rng.normal(0, 10, (6, 5)), np.full((6, 1), no_object), axis=1)
    clip_logits = np.exp(scale) * rng.uniform(-1, 1, (6, 5))
    seen = rng.random(5) < 0.5
    options = dict(mode=mode, weight=weight)
    scores = inference.class_scores(class_logits, clip_logits, seen, **options)
    bounds = inference.score_bounds(class_logits, seen, scale, **options)
    assert np.all(np.asarray(scores).max(-1) <= np.asarray(bounds) * (1 + 1e-5) + 1e-30)


@pytest.mark.parametrize("mode", inference.MODES)
def test_a_bound_gives_each_class_all_that_clip_has_to_give(mode):
    """Where CLIP's logits are as large as they get, to all classes together; class by class."""
    rng, scale, weight = np.random.default_rng(0), 1.5, 0.8
    class_logits = np.append(rng.normal(0, 8, (40, 5)), rng.uniform(-5, 15, (40, 1)), axis=1)
    seen = np.array([True, False, False, True, False])
    grouper = scipy.special.softmax(class_logits, axis=1)[:, :5]
    largest = np.append(np.full((40, 5), np.exp(scale)), class_logits[:, -1:], axis=1)
    clip = scipy.special.softmax(largest, axis=1)[:, :5].sum(1, keepdims=True)
    on_grouper = np.broadcast_to(
        {"grouper": 1, "clip": 0, "ensemble_all": 1 - weight}.get(
            mode, np.where(seen, weight, 1 - weight)
        ),
        5,
    )
    expected = (grouper**on_grouper * clip ** (1 - on_grouper)).max(1)
    bounds = inference.score_bounds(class_logits, seen, scale, mode=mode, weight=weight)
    np.testing.assert_allclose(bounds, expected, rtol=1e-5)


def test_bounds_tell_queries_apart():
    """A query that surely shows no object is bounded near 0, one that shows one is not."""
    class_logits = np.array([[50.0, 0, 0], [0, 0, 200]])
    for mode in inference.MODES:
        sure, none = inference.score_bounds(class_logits, [True, False], 4.0, mode=mode)
        assert sure > 0.9 and none < 1e-6


def test_queries_that_clip_does_not_name_are_scored_by_the_grouper():
    rng = np.random.default_rng(0)
    class_logits, clip_logits = rng.normal(size=(3, 5)), rng.normal(size=(3, 4))
    seen = np.array([True, True, False, True])
    named = np.array([True, False, True])
    scores = inference.class_scores(class_logits, clip_logits, seen, named_q=named)
    every = inference.class_scores(class_logits, clip_logits, seen)
    grouper = inference.class_scores(class_logits, None, seen, mode="grouper")
    np.testing.assert_array_equal(scores, np.where(named[:, None], every, grouper))


def test_foreground_is_area_times_probability():
    class_logits = np.log([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    masks = np.array([[[0.0, 100.0]], [[100.0, 100.0]]])
    weights = inference.foreground_weights(class_logits, masks)
    np.testing.assert_allclose(weights, [0.75 * 1.5, 0.2 * 2], rtol=1e-6)
