"""The optimiser against AdamW's recurrence in float64, with groups, clipping and schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zegformer_jax.training.optim import group_factors, make_optimiser, poly_schedule

STEPS, WARM_UP, RATE, POWER, DECAY = 12, 3, 0.02, 0.9, 0.3
GROUPS = (
    ("backbone/.*", {"learning_rate": 0.1}),
    (".*norm.*", {"weight_decay": 0.0}),
    ("backbone/norm/.*", {"learning_rate": 0.5, "weight_decay": 7.0}),
)
# Factors of the learning rate and of the weight decay, by the product over all groups.
FACTORS = {
    "backbone/kernel": (0.1, 1.0),
    "backbone/norm/scale": (0.1 * 0.5, 0.0),
    "head/kernel": (1.0, 1.0),
    "head/faint": (1.0, 1.0),
    "head/norm": (1.0, 0.0),
}


def nested(arrays):
    tree = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = jnp.asarray(array, jnp.float32)
    return tree


def learning_rate(step):
    if step < WARM_UP:
        return RATE * step / WARM_UP
    return RATE * (1 - (step - WARM_UP) / (STEPS - WARM_UP)) ** POWER


def random_arrays(rng):
    return {path: rng.normal(size=(3, 4)) for path in FACTORS}


def random_gradients(rng):
    """Those of `head/faint` are of the size of Adam's epsilon."""
    scale = 10 ** rng.uniform(-1, 1)
    return {
        path: (1e-8 if path == "head/faint" else scale) * array
        for path, array in random_arrays(rng).items()
    }


def adamw(params, gradients_of_steps, clip_norm):
    """Decoupled weight decay (Loshchilov & Hutter, 2019, algorithm 2), one array at a time."""
    moments = {path: (0.0, 0.0) for path in params}
    for step, gradients in enumerate(gradients_of_steps):
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        shrink = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for path, (rate_factor, decay_factor) in FACTORS.items():
            gradient = shrink * gradients[path]
            first = 0.9 * moments[path][0] + 0.1 * gradient
            second = 0.999 * moments[path][1] + 0.001 * gradient**2
            moments[path] = first, second
            first = first / (1 - 0.9 ** (step + 1))
            second = second / (1 - 0.999 ** (step + 1))
            change = first / (np.sqrt(second) + 1e-8) + DECAY * decay_factor * params[path]
            params[path] = params[path] - learning_rate(step) * rate_factor * change
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 5.0])
def test_steps_follow_the_recurrence(clip_norm):
    rng = np.random.default_rng(0)
    start = random_arrays(rng)
    gradients_of_steps = [random_gradients(rng) for _ in range(STEPS)]
    norms = [optax.tree.norm(nested(gradients)) for gradients in gradients_of_steps]
    assert min(norms) < 5.0 < max(norms), "some steps are clipped, others are not"
    optimiser, _ = make_optimiser(
        learning_rate=RATE, steps=STEPS, power=POWER, weight_decay=DECAY, clip_norm=clip_norm,
        groups=GROUPS, warmup_steps=WARM_UP,
    )  # fmt: skip
    params = nested(start)
    state = optimiser.init(params)
    update = jax.jit(optimiser.update)
    for gradients in gradients_of_steps:
        updates, state = update(nested(gradients), state, params)
        params = optax.apply_updates(params, updates)
    expected = nested(adamw(start, gradients_of_steps, clip_norm))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), params, expected
    )


def test_the_learning_rate_rises_and_falls():
    schedule = poly_schedule(RATE, STEPS, POWER, WARM_UP)
    rates = [float(schedule(step)) for step in range(STEPS + 1)]
    np.testing.assert_allclose(rates, [learning_rate(step) for step in range(STEPS + 1)], rtol=1e-5)
    assert rates[0] == rates[-1] == 0 and max(rates) == rates[WARM_UP]


def test_without_warm_up_the_learning_rate_begins_at_its_largest():
    schedule = poly_schedule(RATE, 4, 2.0)
    rates = [float(schedule(step)) for step in range(5)]
    np.testing.assert_allclose(rates, RATE * np.array([16, 9, 4, 1, 0]) / 16, rtol=1e-5)


@pytest.mark.parametrize("place, field", [(0, "learning_rate"), (1, "weight_decay")])
def test_a_parameter_has_the_factors_of_all_groups_that_its_whole_path_matches(place, field):
    factors = group_factors(nested(dict.fromkeys(FACTORS, np.ones(2))), GROUPS, field)
    wanted = nested({path: pair[place] for path, pair in FACTORS.items()})
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y), factors, wanted)
    inside = group_factors({"a": {"backbone": {"kernel": 0}}}, GROUPS, "learning_rate")
    assert inside == {"a": {"backbone": {"kernel": 1.0}}}
