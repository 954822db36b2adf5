"""The assignment against SciPy's, the costs against a slow transcription of the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from zegformer_jax.training import matching
from zegformer_jax.training.targets import targets_from_labels

RANDOM_CASES = 20


match = jax.jit(matching.match)


def expected_cost(cost_qn):
    rows, columns = linear_sum_assignment(cost_qn)
    return cost_qn[rows, columns].sum()


def test_the_total_cost_is_scipys():
    assign = jax.jit(matching.assign)
    for seed in range(RANDOM_CASES):
        rng = np.random.default_rng(seed)
        cost_qn = rng.normal(size=(9, 5)).astype(np.float32) * 10.0 ** rng.integers(-2, 3)
        matched = np.asarray(assign(cost_qn, np.ones(5, bool)))
        assert len(set(matched)) == 5
        total = cost_qn[matched, np.arange(5)].sum()
        np.testing.assert_allclose(total, expected_cost(cost_qn), rtol=1e-5, atol=1e-6)


def test_as_many_targets_as_queries():
    cost_qn = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    matched = np.asarray(jax.jit(matching.assign)(cost_qn, np.ones(6, bool)))
    assert sorted(matched) == list(range(6))
    total = cost_qn[matched, np.arange(6)].sum()
    np.testing.assert_allclose(total, expected_cost(cost_qn), rtol=1e-5)


def test_padded_targets_never_displace_valid_ones():
    """Padding is cheap everywhere, and yet the valid targets get what SciPy gives them alone."""
    assign = jax.jit(matching.assign)
    for seed in range(RANDOM_CASES):
        rng = np.random.default_rng(seed)
        valid_n = rng.random(7) < 0.5
        cost_qn = rng.uniform(1, 2, (8, 7)).astype(np.float32)
        cost_qn[:, ~valid_n] = -1000.0
        matched = np.asarray(assign(cost_qn, valid_n))
        assert len(set(matched)) == 7, "a padded target took a valid one's query"
        total = cost_qn[matched, np.arange(7)][valid_n].sum()
        np.testing.assert_allclose(total, expected_cost(cost_qn[:, valid_n]), rtol=1e-5)


def test_more_targets_than_queries_is_an_error_that_names_the_fields():
    with pytest.raises(ValueError, match=r"5 targets for 4 queries: loss\.max_targets"):
        matching.assign(jnp.zeros((4, 5)), jnp.ones(5, bool))


def transcribed_cost(class_logits_qc, mask_logits_qp, ids_n, masks_np, mask_weight, dice_weight):
    """One pair at a time, in float64, from the formulas of the two losses."""
    queries, targets = len(class_logits_qc), len(ids_n)
    cost_qn = np.zeros((queries, targets))
    for q in range(queries):
        exponentials = np.exp(class_logits_qc[q] - class_logits_qc[q].max())
        inside_p = 1 / (1 + np.exp(-mask_logits_qp[q].astype(np.float64)))
        for n in range(targets):
            probability_p = np.where(masks_np[n] == 1, inside_p, 1 - inside_p)
            alpha_p = np.where(masks_np[n] == 1, 0.25, 0.75)
            focal = (alpha_p * (1 - probability_p) ** 2 * -np.log(probability_p)).mean()
            shared = (inside_p * masks_np[n]).sum()
            dice = 1 - (2 * shared + 1) / (inside_p.sum() + masks_np[n].sum() + 1)
            class_cost = -exponentials[ids_n[n]] / exponentials.sum()
            cost_qn[q, n] = class_cost + mask_weight * focal + dice_weight * dice
    return cost_qn


def random_problem(queries=6, classes=4, targets=3, pixels=30):
    rng = np.random.default_rng(1)
    class_logits = rng.normal(size=(queries, classes + 1)).astype(np.float32) * 3
    mask_logits = rng.normal(size=(queries, pixels)).astype(np.float32) * 4
    ids = np.array([3, 0, 2], np.int32)[:targets]
    masks = (rng.random((targets, pixels)) < 0.3).astype(np.float32)
    return class_logits, mask_logits, ids, masks


@pytest.mark.parametrize("weights", [(20.0, 1.0), (0.5, 3.0)])
def test_the_cost_of_every_pair(weights):
    problem = random_problem()
    actual = jax.jit(matching.cost_matrix)(*problem, *weights)
    np.testing.assert_allclose(actual, transcribed_cost(*problem, *weights), rtol=1e-4, atol=1e-5)


def batch_problem():
    rng = np.random.default_rng(2)
    labels = np.kron(rng.integers(0, 3, (2, 2, 2)), np.ones((1, 8, 8))).astype(np.uint8)
    targets = targets_from_labels(jnp.asarray(labels), 3, 4)
    class_logits = rng.normal(size=(2, 6, 4)).astype(np.float32)
    mask_logits = rng.normal(size=(2, 6, 4, 4)).astype(np.float32)
    return jnp.asarray(class_logits), jnp.asarray(mask_logits), targets


def test_a_batch_is_matched_image_by_image_at_every_fourth_pixel():
    class_logits, mask_logits, targets = batch_problem()
    matched = np.asarray(match(class_logits, mask_logits, targets, 20.0, 1.0))
    for b in range(2):
        valid = np.asarray(targets.valid_bn[b])
        masks = np.asarray(targets.masks_bnhw[b][valid, ::4, ::4]).reshape(valid.sum(), -1)
        cost = transcribed_cost(
            np.asarray(class_logits[b]),
            np.asarray(mask_logits[b]).reshape(6, -1),
            np.asarray(targets.ids_bn[b][valid]),
            masks.astype(np.float64),
            20.0,
            1.0,
        )
        queries, places = linear_sum_assignment(cost)
        np.testing.assert_array_equal(matched[b][valid][places], queries)


@pytest.mark.slow
def test_many_targets_are_matched_as_few_at_once_are(monkeypatch):
    """Seven targets by three: the last part has two that were computed before."""
    rng = np.random.default_rng(3)
    labels = np.kron(rng.integers(0, 7, (2, 4, 4)), np.ones((1, 4, 4))).astype(np.uint8)
    targets = targets_from_labels(jnp.asarray(labels), 7, 7)
    logits = rng.normal(size=(2, 9, 8)), rng.normal(size=(2, 9, 4, 4))
    problem = (*(jnp.asarray(x, jnp.float32) for x in logits), targets, 20.0, 1.0)
    expected = match(*problem)
    monkeypatch.setattr(matching, "TARGETS_AT_ONCE_ON", {"cpu": 3})
    np.testing.assert_array_equal(matching.match(*problem), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_give_some_assignment(value):
    class_logits, mask_logits, targets = batch_problem()
    class_logits = class_logits.at[0, 0].set(value)
    mask_logits = mask_logits.at[1, :, 0, 0].set(value)
    matched = np.asarray(match(class_logits, mask_logits, targets, 20.0, 1.0))
    assert matched.shape == (2, 3)
    for row in matched:
        assert len(set(row)) == 3 and row.min() >= 0 and row.max() < 6


def test_no_gradient_flows_through_the_match():
    class_logits, mask_logits, targets = batch_problem()

    def chosen(mask_logits):
        matched = match(class_logits, mask_logits, targets, 20.0, 1.0)
        return matched.astype(jnp.float32).sum()

    assert not np.any(jax.grad(chosen)(mask_logits))
