"""No loss or target sees an unseen label: changing such labels does not move the loss by a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shrunk
from array_source import ArraySource

from zegformer_jax.experiment import Experiment
from zegformer_jax.input.pipeline import train_batches
from zegformer_jax.input.settings import InputSettings
from zegformer_jax.text.vocabulary import Vocabulary
from zegformer_jax.training.objectives.grouper import GrouperObjective
from zegformer_jax.training.objectives.per_pixel import PerPixelObjective
from zegformer_jax.training.targets import targets_from_labels

SEEN = (True, False, True, True, False, False, True)
VOCABULARY = Vocabulary.from_names(list("abcdefg"), SEEN)
UNSEEN, NUM_SEEN, IGNORE = (1, 4, 5), 4, 255
OBJECTIVES = {"zegformer": GrouperObjective, "per_pixel": PerPixelObjective}
# What every unseen label becomes: another unseen class, always the same one, or no label.
CHANGES = {
    "another": {1: 4, 4: 5, 5: 1},
    "one": {1: 5, 4: 5},
    "ignored": dict.fromkeys(UNSEEN, IGNORE),
}


def make_labels():
    rng = np.random.default_rng(0)
    coarse = rng.choice(np.array([*range(7), IGNORE], np.uint8), (6, 5, 5))
    return [np.kron(label, np.ones((8, 8), np.uint8)) for label in coarse]


def changed(labels, change):
    table = np.arange(256, dtype=np.uint8)
    table[list(change)] = list(change.values())
    return [table[label] for label in labels]


def batches_of(labels):
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (40, 40, 3), np.uint8) for _ in labels]
    source = ArraySource(images, labels, [str(i) for i in range(len(labels))])
    settings = InputSettings(batch_size=2, crop_size=32, short_sides=(32, 40), max_long_side=80)
    return list(train_batches(source, VOCABULARY, settings, seed=0, num_steps=4))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_batches_do_not_tell_unseen_classes_apart(change):
    labels = make_labels()
    assert all(np.isin(label, UNSEEN).any() for label in labels)
    for first, second in zip(batches_of(labels), batches_of(changed(labels, change)), strict=True):
        for name in ("image", "label", "index"):
            np.testing.assert_array_equal(first[name], second[name])
        assert set(np.unique(first["label"])) <= {*range(NUM_SEEN), IGNORE}


def test_a_seen_label_does_change_the_batches():
    """This shows that the test above can fail."""
    labels = make_labels()
    pairs = zip(batches_of(labels), batches_of(changed(labels, {0: 2})), strict=True)
    assert any(np.any(first["label"] != second["label"]) for first, second in pairs)


@pytest.fixture(scope="module", params=OBJECTIVES)
def loss_of(request, tmp_path_factory):
    """The loss and its gradient as a function of the labels, for each kind of model."""
    experiment = Experiment.open(shrunk.get_config(request.param), tmp_path_factory.mktemp("run"))
    rng = np.random.default_rng(2)
    text_cd = rng.normal(size=(NUM_SEEN, 8)).astype(np.float32)
    text_cd /= np.linalg.norm(text_cd, axis=-1, keepdims=True)
    objective = OBJECTIVES[request.param](experiment, text_cd)
    images = batches_of(make_labels())[0]["image"]
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(objective.init, jax.random.key(0))["params"],
    )

    @jax.jit
    def value_and_gradient(label):
        batch = {"image": images, "label": label}
        totals, key = objective.totals(batch), jax.random.key(2)
        return jax.value_and_grad(
            lambda p: objective.loss(p, objective.constants, batch, totals, key)[0]
        )(params)

    return value_and_gradient


@pytest.mark.slow
def test_labels_beyond_the_seen_classes_are_ignored_by_the_loss(loss_of):
    """Should one ever come through: no bit of the loss or of its gradient depends on it."""
    label = batches_of(make_labels())[0]["label"]
    assert (label == IGNORE).any() and (label < NUM_SEEN).any()
    expected = loss_of(label)
    for other in (NUM_SEEN, NUM_SEEN + 1, 254):
        actual = loss_of(np.where(label == IGNORE, other, label).astype(np.uint8))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    moved, _ = loss_of(np.where(label == IGNORE, 0, label).astype(np.uint8))
    assert moved != expected[0], "a seen label must move the loss"


def test_no_target_is_made_of_labels_beyond_the_seen_classes():
    label = np.array([[[0, 1, 2, 3], [4, 5, 6, 254]]], np.uint8)
    targets = targets_from_labels(jnp.asarray(label), NUM_SEEN, 8)
    assert targets.valid_bn.sum() == NUM_SEEN
    assert not targets.masks_bnhw[:, :, 1].any()
