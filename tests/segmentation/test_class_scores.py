"""Class scores and label maps against golden maps, SciPy's interpolation and plain NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from semantic_maps import semantic_maps

from zegformer_jax.segmentation import class_scores as class_scores_module
from zegformer_jax.segmentation import label_maps
from zegformer_jax.segmentation.augmentation import View, mirror

SEEN = np.array([True] * 5 + [False] * 2)
class_scores = jax.jit(class_scores_module.class_scores, static_argnames=("mode", "weight"))


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


def make_view(logits, size, mirrored=False):
    """The view that mask logits are of; label maps do not read its pixels."""
    height, width = (label_maps.STRIDE * side for side in logits.shape[1:])
    return View(jnp.zeros((height, width, 3)), size, mirrored)


def jitted_map(function, *views, gamma=0.0, seen_c=None, original_size, **options):
    """Calls a map's function, compiled, on views (scores, logits, size[, mirrored])."""
    turned = [len(view) > 3 for view in views]

    def call(traced, gamma, original_size):
        scores, logits, sizes = zip(*traced, strict=True)
        views = [make_view(*view) for view in zip(logits, sizes, turned, strict=True)]
        of_queries = scores[0] is not None
        classes = scores[0].shape[-1] if of_queries else len(logits[0])
        seen = np.zeros(classes, bool) if seen_c is None else seen_c
        scores = [x[None] for x in scores] if of_queries else None
        scores = label_maps.ClassScores(scores, seen, (gamma,))
        return function(logits, views, [scores], original_size=original_size, **options)

    traced = [(scores, logits, jnp.array(size)) for scores, logits, size, *_ in views]
    (maps,) = jax.jit(call)(traced, gamma, jnp.array(original_size))
    return np.asarray(maps[0, 0])


semantic_map = partial(jitted_map, semantic_maps)
label_map = partial(jitted_map, label_maps.label_maps)


def test_ensemble_of_a_wholly_unseen_vocabulary_is_the_unseen_formula():
    class_logits, clip_logits, _ = random_case(1)
    unseen = class_scores_module.class_scores(class_logits, clip_logits, np.zeros(3, bool))
    every = class_scores_module.class_scores(
        class_logits, clip_logits, np.zeros(3, bool), mode="ensemble_all"
    )
    np.testing.assert_allclose(unseen, every, rtol=1e-6)


def test_ensemble_of_a_wholly_seen_vocabulary():
    class_logits, clip_logits, _ = random_case(2)
    seen = class_scores_module.class_scores(
        class_logits, clip_logits, np.ones(3, bool), weight=0.75
    )
    with_no_object = np.concatenate([clip_logits, class_logits[:, -1:]], axis=1)
    grouper = scipy.special.softmax(class_logits, axis=1)[:, :-1]
    mean = scipy.special.softmax(with_no_object, axis=1)[:, :-1].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(seen, grouper**0.75 * mean**0.25, rtol=1e-5)


@pytest.mark.parametrize("mode", class_scores_module.MODES)
def test_scores_stay_finite_where_a_softmax_underflows(mode):
    class_logits = jnp.array([[100.0, -100.0, 0.0, 90.0]])
    clip_logits = jnp.array([[-300.0, 200.0, 100.0]])
    scores = class_scores(class_logits, clip_logits, SEEN[3:6], mode=mode)
    assert np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()


def test_selected_classes_equal_a_smaller_vocabulary():
    class_logits, _, _ = random_case(3, classes=5)
    selected = class_scores_module.select_classes(class_logits, [4, 1])
    np.testing.assert_array_equal(selected, class_logits[:, [4, 1, 5]])


def formula(scores, logits, size, original, resize="after"):
    """The semantic map [C, *original] of a view, in float64, from the formula."""

    def masks(logits):
        if scores is None:
            return scipy.special.softmax(logits, axis=0)
        return scipy.special.expit(logits)

    padded = scipy_resize(logits, [4 * side for side in logits.shape[1:]])
    weights = np.eye(len(logits)) if scores is None else scores.astype(np.float64)
    if resize == "before":
        return np.einsum(
            "qc,qhw->chw", weights, masks(scipy_resize(padded[:, : size[0], : size[1]], original))
        )
    padded_map = np.einsum("qc,qhw->chw", weights, masks(padded))
    return scipy_resize(padded_map[:, : size[0], : size[1]], original)


@pytest.mark.parametrize("rows_at_once", [1, 7, 64])
@pytest.mark.parametrize("resize", label_maps.RESIZE)
def test_semantic_map_is_the_formula_at_any_strip_height(rows_at_once, resize):
    scores, _, mask_logits = random_case(4, classes=2)
    seen, gamma = np.array([True, False, True]), 0.3
    result = semantic_map(
        (scores, mask_logits, (21, 30)), original_size=(13, 41), out_size=(16, 44),
        gamma=gamma, seen_c=seen, rows_at_once=rows_at_once, resize=resize,
    )  # fmt: skip
    expected = formula(scores, mask_logits, (21, 30), (13, 41), resize)
    expected -= gamma * seen[:, None, None]
    np.testing.assert_allclose(result[:, :13, :41], expected, atol=5e-6)


@pytest.mark.parametrize("grown", ["queries", "classes"])
@pytest.mark.parametrize("resize", label_maps.RESIZE)
def test_memory_of_a_label_map_does_not_grow(monkeypatch, resize, grown):
    """Strips become lower with more queries or classes."""
    monkeypatch.setattr(label_maps, "STRIP_VALUES_ON", {})
    monkeypatch.setattr(label_maps, "STRIP_VALUES", 2**14)

    def temporaries(queries, classes):
        size, shapes = np.array([64, 64]), [(queries, 16, 16), (1, queries, classes)]
        run = jax.jit(
            lambda logits, scores: label_maps.label_maps(
                [logits], [make_view(logits, size)],
                [label_maps.ClassScores([scores], [True] * classes)],
                original_size=size, out_size=(64, 64), resize=resize,
            )
        )  # fmt: skip
        compiled = run.lower(*[jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes])
        return compiled.compile().memory_analysis().temp_size_in_bytes

    few = {"queries": 20, "classes": 20}
    assert temporaries(**few | {grown: 10 * few[grown]}) < 1.5 * temporaries(**few)


def test_resizing_before_the_sum_is_another_map():
    scores, _, mask_logits = random_case(4)
    after, before = (
        formula(scores, mask_logits, (21, 30), (40, 60), resize) for resize in label_maps.RESIZE
    )
    assert np.abs(after - before).max() > 1e-2


def test_views_are_averaged_and_mirrored_ones_turned_back():
    """Three views: of the picture, of another size, and of the picture mirrored."""
    scores, other_scores, mask_logits = random_case(7, classes=4)
    scores = scores[:, :4]
    larger = np.random.default_rng(8).normal(size=(4, 9, 11)).astype(np.float32)
    result = semantic_map(
        (scores, mask_logits, (21, 30)),
        (other_scores, larger, (36, 43)),
        (other_scores, mask_logits, (21, 30), "mirrored"),
        original_size=(33, 47), out_size=(40, 50),
    )  # fmt: skip
    expected = (
        formula(scores, mask_logits, (21, 30), (33, 47))
        + formula(other_scores, larger, (36, 43), (33, 47))
        + formula(other_scores, mask_logits, (21, 30), (33, 47))[..., ::-1]
    ) / 3
    np.testing.assert_allclose(result[:, :33, :47], expected, atol=5e-6)


def test_a_picture_is_mirrored_without_its_padding():
    image = np.zeros((8, 12, 3), np.float32)
    image[:5, :7] = np.random.default_rng(0).random((5, 7, 3))
    mirrored = jax.jit(mirror)(image, jnp.array([5, 7]))
    np.testing.assert_array_equal(mirrored[:5, :7], image[:5, 6::-1])
    assert not np.any(mirrored[5:]) and not np.any(mirrored[:, 7:])


@pytest.mark.parametrize("resize", label_maps.RESIZE)
def test_label_map_is_the_argmax_of_the_semantic_map(resize):
    scores, _, mask_logits = random_case(5, queries=9, classes=6)
    arguments = dict(
        original_size=(40, 33), out_size=(40, 33), gamma=0.1, seen_c=SEEN, rows_at_once=16,
        resize=resize,
    )  # fmt: skip
    view = (scores, mask_logits, (24, 27))
    labels = label_map(view, **arguments)
    expected = semantic_map(view, **arguments).argmax(axis=0)
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == jnp.int32 and len(np.unique(labels)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("of_queries", [True, False])
def test_many_maps_at_once_are_those_one_by_one(of_queries):
    """The maps are of two views and two vocabularies, the first scored in two ways."""
    rng, size = np.random.default_rng(9), (21, 30)
    logits = [rng.normal(size=(4, 6, 8)).astype(np.float32) for _ in range(2)]
    asked = [(2, (0.0, 0.05, 0.2), SEEN[2:6]), (1, (0.1,), SEEN[3:])]
    scores = [
        [rng.random((ways, 4, len(seen)), np.float32) if of_queries else None for _ in logits]
        for ways, _, seen in asked
    ]
    views = [make_view(x, np.array(size)) for x in logits]
    options = {"original_size": (33, 20), "out_size": (40, 21), "rows_at_once": 7}
    for function in (semantic_maps, label_maps.label_maps):
        questions = [
            label_maps.ClassScores(own if of_queries else None, seen, gammas)
            for own, (_, gammas, seen) in zip(scores, asked, strict=True)
        ]
        traced = {**options, "original_size": np.array(options["original_size"])}
        answers = jax.jit(lambda: function(logits, views, questions, **traced))()  # noqa: B023
        for own, (ways, gammas, seen), answer in zip(scores, asked, answers, strict=True):
            ways = ways if of_queries else 1
            assert answer.shape[:2] == (ways, len(gammas)) and answer.shape[-2:] == (40, 21)
            for way in range(ways):
                for place, gamma in enumerate(gammas):
                    own_views = [
                        (x[way] if of_queries else None, y, size)
                        for x, y in zip(own, logits, strict=True)
                    ]
                    one = jitted_map(function, *own_views, gamma=gamma, seen_c=seen, **options)
                    np.testing.assert_allclose(
                        answer[way, place][..., :33, :20], one[..., :33, :20], atol=1e-6
                    )


@pytest.mark.parametrize("resize", label_maps.RESIZE)
def test_the_baselines_map_is_the_formula(resize):
    _, _, logits_chw = random_case(6, queries=5)
    seen = np.array([True, False, True, False, True])
    result = semantic_map(
        (None, logits_chw, (21, 30)), gamma=0.2, seen_c=seen, original_size=(30, 40),
        out_size=(30, 40), resize=resize,
    )  # fmt: skip
    expected = formula(None, logits_chw, (21, 30), (30, 40), resize)
    np.testing.assert_allclose(result, expected - 0.2 * seen[:, None, None], atol=5e-6)


def test_wrong_arguments_are_named():
    class_logits, clip_logits, mask_logits = random_case(7)
    with pytest.raises(ValueError, match="score mode 'both' is unknown; choose one of ensemble"):
        class_scores_module.class_scores(class_logits, clip_logits, SEEN[:3], mode="both")
    with pytest.raises(ValueError, match="score mode 'ensemble' needs CLIP's logits"):
        class_scores_module.class_scores(class_logits, None, SEEN[:3])
    with pytest.raises(ValueError, match="eval.resize 'both': choose one of after, before"):
        semantic_map(
            (class_logits, mask_logits, (24, 32)),
            original_size=(24, 32), out_size=(24, 32), resize="both",
        )  # fmt: skip


@pytest.mark.parametrize("mode", class_scores_module.MODES)
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
    scores = class_scores_module.class_scores(class_logits, clip_logits, seen, **options)
    bounds = class_scores_module.score_bounds(class_logits, seen, scale, **options)
    assert np.all(np.asarray(scores).max(-1) <= np.asarray(bounds) * (1 + 1e-5) + 1e-30)


@pytest.mark.parametrize("mode", class_scores_module.MODES)
def test_a_bound_gives_each_class_all_that_clip_has_to_give(mode):
    """The bound holds class by class, with CLIP's logits at their largest for all classes."""
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
    bounds = class_scores_module.score_bounds(class_logits, seen, scale, mode=mode, weight=weight)
    np.testing.assert_allclose(bounds, expected, rtol=1e-5)


def test_bounds_tell_queries_apart():
    """A query that surely shows no object is bounded near 0, one that shows one is not."""
    class_logits = np.array([[50.0, 0, 0], [0, 0, 200]])
    for mode in class_scores_module.MODES:
        sure, none = class_scores_module.score_bounds(class_logits, [True, False], 4.0, mode=mode)
        assert sure > 0.9 and none < 1e-6


def test_queries_that_clip_does_not_name_are_scored_by_the_grouper():
    rng = np.random.default_rng(0)
    class_logits, clip_logits = rng.normal(size=(3, 5)), rng.normal(size=(3, 4))
    seen = np.array([True, True, False, True])
    named = np.array([True, False, True])
    scores = class_scores_module.class_scores(class_logits, clip_logits, seen, named_q=named)
    every = class_scores_module.class_scores(class_logits, clip_logits, seen)
    grouper = class_scores_module.class_scores(class_logits, None, seen, mode="grouper")
    np.testing.assert_array_equal(scores, np.where(named[:, None], every, grouper))


def test_foreground_is_area_times_probability():
    class_logits = np.log([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    masks = np.array([[[0.0, 100.0]], [[100.0, 100.0]]])
    weights = class_scores_module.foreground_weights(class_logits, masks)
    np.testing.assert_allclose(weights, [0.75 * 1.5, 0.2 * 2], rtol=1e-6)


ORDER = np.random.default_rng(9).permutation(7)


ALL_SEEN, NEARLY_NOTHING = np.ones(7, bool), np.float32(-20)


@pytest.mark.parametrize(
    "mode, seen, shift",
    [
        *((mode, ALL_SEEN, NEARLY_NOTHING) for mode in class_scores_module.MODES),
        *(("ensemble", SEEN, shift) for shift in (NEARLY_NOTHING, np.float32(0))),
        ("ensemble", ~ALL_SEEN, NEARLY_NOTHING),
    ],
)
def test_the_order_of_the_classes_does_not_matter(mode, seen, shift):
    """Also where masks are so faint that all scores minus gamma would round to -gamma."""
    cases = [random_case(seed, classes=7) for seed in range(2)]

    def names(order):
        views = [
            (
                class_scores(
                    logits[:, np.append(order, 7)], clip[:, order], seen[order], mode=mode
                ),
                masks + shift,
                (24, 32),
                bool(index),
            )
            for index, (logits, clip, masks) in enumerate(cases)
        ]
        sizes = {"original_size": (24, 32), "out_size": (24, 32)}
        return order[label_map(*views, gamma=0.1, seen_c=seen[order], **sizes)]

    plain = names(np.arange(7))
    assert len(np.unique(plain)) > 1
    np.testing.assert_array_equal(names(ORDER), plain)
