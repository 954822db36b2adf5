"""Targets from label maps, and the losses against slow NumPy; see also test_golden's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zegformer_jax.training import losses, matching
from zegformer_jax.training.targets import targets_from_labels

LABELS = np.array([[[0, 0, 2, 255], [4, 4, 2, 255]], [[255, 5, 255, 255], [3, 9, 3, 3]]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_class_in_the_map_is_a_target(dtype):
    labels = np.where(LABELS == 255, np.iinfo(dtype).max, LABELS).astype(dtype)
    targets = targets_from_labels(jnp.asarray(labels), 5, 4)
    np.testing.assert_array_equal(targets.valid_bn, [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(targets.ids_bn[0, :3], [0, 2, 4])
    assert targets.ids_bn[1, 0] == 3, "neither 5 nor 9 is a class of 5"
    np.testing.assert_array_equal(targets.overflow_b, [0, 0])
    for b in range(2):
        for n in range(4):
            wanted = (labels[b] == int(targets.ids_bn[b, n])) & bool(targets.valid_bn[b, n])
            np.testing.assert_array_equal(targets.masks_bnhw[b, n], wanted)


def test_all_classes_at_once():
    labels = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    targets = targets_from_labels(jnp.asarray(labels), 12, 12)
    np.testing.assert_array_equal(targets.ids_bn[0], np.arange(12))
    assert targets.valid_bn.all()
    np.testing.assert_array_equal(targets.masks_bnhw.sum((2, 3)), np.ones((1, 12)))


def test_classes_beyond_the_number_kept_are_counted():
    targets = targets_from_labels(jnp.asarray(LABELS, jnp.uint8), 5, 2)
    assert targets.ids_bn[0].tolist() in ([0, 2], [0, 4], [2, 4]) and targets.valid_bn[0].all()
    np.testing.assert_array_equal(targets.ids_bn[1], [3, 0])
    np.testing.assert_array_equal(targets.valid_bn[1], [True, False])
    np.testing.assert_array_equal(targets.overflow_b, [1, 0])


@pytest.mark.slow
def test_every_class_is_kept_for_some_images():
    """And for one image always the same."""
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.permuted(np.tile(np.arange(8), (60, 6)), axis=1).reshape(60, 6, 8))
    labels = labels.at[:, 0, 0].set(jnp.arange(60) % 8)
    targets = targets_from_labels(labels, 8, 5)
    assert targets.valid_bn.all() and (targets.overflow_b == 3).all()
    assert (jnp.diff(targets.ids_bn) > 0).all()
    counts = np.bincount(np.asarray(targets.ids_bn).ravel(), minlength=8)
    assert counts.min() > 10, counts
    again = targets_from_labels(labels, 8, 5)
    np.testing.assert_array_equal(again.ids_bn, targets.ids_bn)


def test_a_map_without_any_class_has_no_target_and_a_finite_loss():
    targets = targets_from_labels(jnp.full((1, 4, 4), 255, jnp.uint8), 5, 2)
    assert not targets.valid_bn.any() and not targets.masks_bnhw.any()
    sums, _ = sums_of(jnp.zeros((1, 3, 6)), jnp.zeros((1, 3, 2, 2)), targets)
    assert sums.mask_sum == 0 and sums.dice_sum == 0
    # Three queries, each with weight 0.1 and the cross entropy of a uniform guess among six.
    np.testing.assert_allclose(sums.class_sum, 3 * 0.1 * np.log(6), rtol=1e-6)


@pytest.mark.slow
def test_the_focal_loss_is_optaxs():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(40, 5)) * 8, jnp.float32)
    wanted = jnp.asarray(rng.random((40, 5)) < 0.4)

    def reference(x):
        return optax.losses.sigmoid_focal_loss(x, wanted.astype(jnp.float32), alpha=0.25, gamma=2)

    close = dict(rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(losses.focal_loss(logits, wanted), reference(logits), **close)
    gradients = [
        jax.grad(lambda x, f=f: f(x).sum())(logits)
        for f in (reference, lambda x: losses.focal_loss(x, wanted))
    ]
    np.testing.assert_allclose(*gradients, **close)


@pytest.fixture
def matched_batch():
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 4, (2, 2, 2)), np.ones((1, 4, 4))).astype(np.uint8)
    class_logits = jnp.asarray(rng.normal(size=(2, 9, 5)), jnp.float32)
    mask_logits = jnp.asarray(rng.normal(size=(2, 9, 4, 4)), jnp.float32)
    return class_logits, mask_logits, jnp.asarray(labels)


@jax.jit
def sums_of(class_logits, mask_logits, targets):
    matched = matching.match(class_logits, mask_logits, targets, 20.0, 1.0)
    return losses.set_loss(class_logits, mask_logits, targets, matched), matched


def test_more_padding_changes_nothing(matched_batch):
    class_logits, mask_logits, labels = matched_batch
    few, many = (
        sums_of(class_logits, mask_logits, targets_from_labels(labels, 4, n))[0] for n in (4, 9)
    )
    np.testing.assert_allclose(few, many, rtol=1e-6)


def test_there_are_no_more_targets_than_classes():
    assert targets_from_labels(jnp.asarray(LABELS, jnp.uint8), 5, 32).ids_bn.shape == (2, 5)


def test_what_stands_in_padded_targets_changes_nothing(matched_batch):
    class_logits, mask_logits, labels = matched_batch
    targets = targets_from_labels(labels, 4, 8)
    _, matched = sums_of(class_logits, mask_logits, targets)
    valid = targets.valid_bn
    assert 0 < valid.sum() < valid.size
    spoilt = targets._replace(ids_bn=jnp.where(valid, targets.ids_bn, 3))
    set_loss = jax.jit(losses.set_loss)
    expected = set_loss(class_logits, mask_logits, targets, matched)
    other_queries = jnp.where(valid, matched, matched[:, :1])
    actual = set_loss(class_logits, mask_logits, spoilt, other_queries)
    np.testing.assert_array_equal(actual, expected)


def test_the_class_loss_is_the_weighted_cross_entropy(matched_batch):
    class_logits, mask_logits, labels = matched_batch
    targets = targets_from_labels(labels, 4, 4)
    sums, matched = sums_of(class_logits, mask_logits, targets)
    logits = np.asarray(class_logits, np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = 0.0
    for b in range(2):
        wanted = {
            int(q): int(c)
            for q, c, v in zip(matched[b], targets.ids_bn[b], targets.valid_bn[b], strict=True)
            if v
        }
        for q in range(9):
            share = 1.0 if q in wanted else 0.1
            total -= share * log_probability[b, q, wanted.get(q, 4)]
    np.testing.assert_allclose(sums.class_sum, total, rtol=1e-5)


def bilinear(source, target):
    """Weights [target, source] of a bilinear resize with half-pixel centres, clamped at edges."""
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.maximum(1 - np.abs(centres[:, None] - np.arange(source)), 0)


def test_the_mask_losses_are_focal_and_dice_of_the_matched_pairs():
    """Targets of different areas, one of them padded, at twice the logits' resolution."""
    rng = np.random.default_rng(0)
    mask_logits = 3 * rng.normal(size=(2, 5, 3, 4))
    labels = rng.choice(4, (2, 6, 8), p=(0.1, 0.2, 0.3, 0.4))
    labels[1] = np.where(labels[1] == 1, 2, labels[1])
    targets = targets_from_labels(jnp.asarray(labels, jnp.uint8), 4, 4)
    matched = np.array([[3, 0, 4, 1], [2, 1, 0, 3]])
    assert targets.valid_bn.sum() == 7
    focal = dice = 0.0
    for b, n in np.argwhere(targets.valid_bn):
        mask = labels[b] == int(targets.ids_bn[b, n])
        logits = bilinear(3, 6) @ mask_logits[b, matched[b, n]] @ bilinear(4, 8).T
        inside = 1 / (1 + np.exp(-logits))
        right = np.where(mask, inside, 1 - inside)
        focal += (np.where(mask, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right)).mean()
        dice += 1 - (2 * inside[mask].sum() + 1) / (inside.sum() + mask.sum() + 1)
    actual = jax.jit(losses.mask_losses)(
        jnp.asarray(mask_logits, jnp.float32), targets, jnp.asarray(matched)
    )
    np.testing.assert_allclose(actual, (focal, dice), rtol=1e-5)


def test_pixels_without_a_label_do_not_count():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 2, 4, 5)).astype(np.float32)
    total, count = losses.per_pixel_loss(jnp.asarray(logits), jnp.asarray(LABELS, jnp.uint8))
    known = LABELS < 5
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probability, np.where(known, LABELS, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, -picked[known].sum(), rtol=1e-5)
    assert count == known.sum() == 9
    gradient = jax.grad(lambda x: losses.per_pixel_loss(x, jnp.asarray(LABELS, jnp.uint8))[0])(
        jnp.asarray(logits)
    )
    np.testing.assert_array_equal(np.abs(gradient).sum(-1) > 0, known)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(logits, wanted):
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -(wanted * log_probability).sum(-1).mean()


def contrastive_case(classes):
    rng = np.random.default_rng(0)
    image, text = unit(rng.normal(size=(6, 8))), unit(rng.normal(size=(6, 8)))
    actual = losses.contrastive_loss(
        jnp.asarray(image, jnp.float32), jnp.asarray(text, jnp.float32), 14.0, jnp.asarray(classes)
    )
    return 14.0 * image @ text.T, actual


def test_with_distinct_classes_the_contrastive_loss_is_clips():
    logits, actual = contrastive_case(np.arange(6))
    of_images, of_texts = cross_entropy(logits, np.eye(6)), cross_entropy(logits.T, np.eye(6))
    np.testing.assert_allclose(actual, (of_images + of_texts) / 2, rtol=1e-5)


def test_pairs_of_one_class_share_what_is_wanted():
    logits, actual = contrastive_case(np.array([0, 1, 0, 2, 1, 0]))
    third, half = 1 / 3, 1 / 2
    wanted = np.array([
        [third, 0, third, 0, 0, third],
        [0, half, 0, 0, half, 0],
        [third, 0, third, 0, 0, third],
        [0, 0, 0, 1, 0, 0],
        [0, half, 0, 0, half, 0],
        [third, 0, third, 0, 0, third],
    ])  # fmt: skip
    of_images, of_texts = cross_entropy(logits, wanted), cross_entropy(logits.T, wanted)
    np.testing.assert_allclose(actual, (of_images + of_texts) / 2, rtol=1e-5)
