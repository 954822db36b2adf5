"""The training step on a small problem: parts of a batch, averages, shardings, steps not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shrunk

from zegformer_jax import models
from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.mesh import make_mesh, replicate, shard_arrays, to_devices
from zegformer_jax.training import optim
from zegformer_jax.training.objective import Objective
from zegformer_jax.training.objectives.grouper import GrouperObjective
from zegformer_jax.training.objectives.per_pixel import PerPixelObjective
from zegformer_jax.training.step import make_state, make_train_step

FEATURES, ROWS = 128, 32
INIT = np.random.default_rng(0).normal(size=(FEATURES, 256)).astype(np.float32)
OPTIONS = dict(learning_rate=0.05, steps=20, power=0.9, weight_decay=1e-2, clip_norm=1.0)


class LeastSquares(Objective):
    """Squared error of weighted rows, divided by the weights of the whole batch."""

    metrics = ("loss", "rows")
    adds_up = True

    def init(self, key):
        return {"params": {"kernel": jnp.asarray(INIT), "bias": jnp.ones(3)}}

    def totals(self, batch):
        return batch["weight"].sum()

    def loss(self, params, constants, batch, totals, key):
        error_b = ((batch["x"] @ params["kernel"] - batch["y"]) ** 2).sum(-1)
        value = (error_b * batch["weight"]).sum() / totals
        return value, {"loss": value, "rows": batch["weight"].sum()}


def make_batches(count=6):
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield {
            "x": rng.normal(size=(ROWS, FEATURES)).astype(np.float32),
            "y": rng.normal(size=(ROWS, 256)).astype(np.float32),
            "weight": rng.integers(1, 5, ROWS).astype(np.float32),
        }


def first_state(objective, optimiser, ema=False):
    variables = jax.jit(objective.init)(jax.random.key(0))
    return make_state(variables, objective.metrics, optimiser, ema)


def run(objective=None, batches=None, axis="", mesh=None, ema=0.0, **options):
    """The states after each step on some batches, and the metrics."""
    objective, mesh = objective or LeastSquares(), mesh or make_mesh(jax.devices()[:2])
    optimiser, schedule = optim.make_optimiser(**OPTIONS)
    state = first_state(objective, optimiser, ema > 0)
    state = jax.device_put(state, shard_arrays(state, mesh, axis))
    step = jax.jit(make_train_step(objective, optimiser, schedule, mesh, ema=ema, **options))
    constants, key = replicate((dict(objective.constants), jax.random.key(1)), mesh)
    states, metrics = [], []
    for batch in batches or make_batches():
        state, line = step(state, constants, to_devices(batch, mesh), key)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(line))
    return states, metrics


def test_parts_of_a_batch_add_up_to_it():
    whole, lines = run()
    parts, part_lines = run(accumulate=4)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(
            one.params["kernel"], other.params["kernel"], rtol=1e-5, atol=1e-6
        )
    for one, other in zip(lines, part_lines, strict=True):
        for name in ("loss", "rows", "gradient_norm"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5)


def test_a_loss_that_compares_the_batch_takes_it_whole():
    class Whole(LeastSquares):
        adds_up = False

    with pytest.raises(ValueError, match="train.accumulate.*take 1"):
        run(Whole(), accumulate=2)


def test_averages_follow_their_recurrence():
    states, _ = run(ema=0.9)
    expected = INIT.astype(np.float64)
    for state in states:
        expected = 0.9 * expected + 0.1 * state.params["kernel"]
        np.testing.assert_allclose(state.ema["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert run()[0][-1].ema == {}


@pytest.mark.parametrize("axis", ["data", "model"])
def test_sharded_parameters_train_alike(axis):
    mesh = make_mesh(jax.devices()[:2], model=2 if axis == "model" else 1)
    whole, _ = run(mesh=make_mesh(jax.devices()[:1]))
    split, _ = run(axis=axis, mesh=mesh)
    for one, other in zip(whole, split, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            (one.params, one.opt_state),
            (other.params, other.opt_state),
        )


def test_large_arrays_are_split_and_their_moments_too():
    mesh = make_mesh(jax.devices()[:2])
    optimiser, _ = optim.make_optimiser(**OPTIONS)
    state = first_state(LeastSquares(), optimiser, ema=True)
    shardings = shard_arrays(state, mesh, "data")
    split = [s.spec for s in jax.tree.leaves(shardings) if s.spec != jax.P()]
    assert split == [jax.P(None, "data")] * 4  # the kernel, two moments, its average
    assert all(s.spec == jax.P() for s in jax.tree.leaves(shard_arrays(state, mesh, "")))
    with pytest.raises(ValueError, match="sharding.params: no axis 'rows'"):
        shard_arrays(state, mesh, "rows")
    with pytest.raises(ValueError, match="sharding.model: 3 does not divide 2"):
        make_mesh(jax.devices()[:2], model=3)


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((2**14,), jax.P("data")),
        ((2**14 - 2,), jax.P()),  # small
        ((128, 256), jax.P(None, "data")),
        ((256, 128), jax.P("data")),
        ((257, 128), jax.P(None, "data")),
        ((129, 129), jax.P()),  # no side is even
        ((), jax.P()),
    ],
)
def test_the_longest_side_that_can_be_is_split(shape, spec):
    array = jax.ShapeDtypeStruct(shape, np.float32)
    assert shard_arrays(array, make_mesh(jax.devices()[:2]), "data").spec == spec


def with_bad(batches, bad):
    for number, batch in enumerate(batches, 1):
        if number in bad:
            batch["x"] = np.full_like(batch["x"], np.nan)
        yield batch


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been():
    batches = list(make_batches())
    good, _ = run(batches=[b for n, b in enumerate(batches, 1) if n not in (2, 3)])
    states, lines = run(batches=with_bad(make_batches(), (2, 3)), most_skipped=3, log_every=6)
    jax.tree.map(np.testing.assert_array_equal, good[-1].params, states[-1].params)
    jax.tree.map(np.testing.assert_array_equal, good[-1].opt_state, states[-1].opt_state)
    assert states[-1].step == 6 and states[-1].skipped == 2
    assert [line["skipped_in_a_row"] for line in lines] == [0, 1, 2, 0, 0, 0]
    assert lines[-1]["skipped"] == 2 and np.isfinite(lines[-1]["loss"])
    assert lines[-1]["learning_rate"] == optim.make_optimiser(**OPTIONS)[1](3)


def test_a_line_of_the_log_is_of_its_own_finite_steps():
    """Skipped steps change neither the log's means, nor the learning rate, nor the averages."""
    bad = (2, 4, 5)
    batches = [batch for number, batch in enumerate(make_batches(), 1) if number not in bad]
    good, (first, second, third) = run(batches=batches, ema=0.9)
    states, lines = run(batches=with_bad(make_batches(), bad), most_skipped=3, log_every=3, ema=0.9)
    for name in ("loss", "rows", "gradient_norm"):
        np.testing.assert_allclose(lines[2][name], (first[name] + second[name]) / 2, rtol=1e-5)
        np.testing.assert_allclose(lines[5][name], third[name], rtol=1e-5)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 2, 2]
    assert states[-1].skipped == 3
    assert [lines[i]["learning_rate"] for i in (2, 5)] == [
        second["learning_rate"],
        third["learning_rate"],
    ]
    jax.tree.map(np.testing.assert_array_equal, good[-1].ema, states[-1].ema)


@pytest.mark.parametrize("field", ["offset", "root"])
def test_either_loss_or_gradient_may_be_what_is_not_finite(field):
    """An infinite offset has no gradient; a root of 0 is finite, its gradient is not."""

    class Spoilt(LeastSquares):
        def loss(self, params, constants, batch, totals, key):
            value, metrics = super().loss(params, constants, batch, totals, key)
            moved = params["bias"][0] - jax.lax.stop_gradient(params["bias"][0])
            return value + batch["offset"].sum() + jnp.sqrt(moved + batch["root"].sum()), metrics

    def batches():
        for number, batch in enumerate(make_batches(3), 1):
            fields = {"offset": np.zeros(ROWS, np.float32), "root": np.ones(ROWS, np.float32)}
            if number == 2:
                fields[field][:] = {"offset": np.inf, "root": 0.0}[field]
            yield batch | fields

    states, lines = run(Spoilt(), batches(), most_skipped=3)
    jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)
    assert [line["skipped"] for line in lines] == [0, 1, 0]
    assert all(np.isfinite(state.params["kernel"]).all() for state in states)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_step_and_part_draws_its_own_numbers(accumulate):
    """The metrics are the sums over the parts of a drawn number and of its square."""

    class Drawing(LeastSquares):
        def loss(self, params, constants, batch, totals, key):
            value, _ = super().loss(params, constants, batch, totals, key)
            drawn = jax.random.uniform(key)
            return value, {"loss": drawn**2, "rows": drawn}

    _, lines = run(Drawing(), accumulate=accumulate)
    assert len({float(line["rows"]) for line in lines}) == len(lines)
    means = np.array([line["rows"] for line in lines]) / accumulate
    variances = np.array([line["loss"] for line in lines]) / accumulate - means**2
    if accumulate > 1:
        assert variances.min() > 1e-3
    else:
        np.testing.assert_allclose(variances, 0, atol=1e-6)


def test_parts_move_no_row_to_another_device():
    objective, mesh = LeastSquares(), make_mesh(jax.devices()[:2])
    optimiser, schedule = optim.make_optimiser(**OPTIONS)
    state = replicate(first_state(objective, optimiser), mesh)
    step = jax.jit(make_train_step(objective, optimiser, schedule, mesh, accumulate=4))
    batch = to_devices(next(make_batches()), mesh)
    key = replicate(jax.random.key(1), mesh)
    program = step.lower(state, {}, batch, key).compile().as_text()
    assert "all-reduce" in program  # of the gradients
    for movement in ("all-to-all", "all-gather", "collective-permute"):
        assert movement not in program


def test_after_too_many_nothing_changes_any_more():
    states, lines = run(batches=with_bad(make_batches(), (2, 3)), most_skipped=2)
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0].params, state.params)
    assert [line["skipped_in_a_row"] for line in lines] == [0, 1, 2, 3, 4, 5]


def test_metrics_are_means_since_the_last_line():
    _, every = run()
    _, lines = run(log_every=3)
    for name in ("loss", "rows", "gradient_norm"):
        for end in (3, 6):
            expected = np.mean([line[name] for line in every[end - 3 : end]])
            np.testing.assert_allclose(lines[end - 1][name], expected, rtol=1e-5)


def test_only_parameters_have_optimiser_state(tmp_path):
    """Frozen norms and the fixed logit scale are constants: no moments, no change."""
    config = shrunk.get_config("zegformer").unlock()
    config.model.backbone.norm = "frozen_batch"
    model = Experiment.open(config, tmp_path).build_model(16)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((5, 16))
    )
    assert jax.tree.leaves(shapes["constants"])
    optimiser, _ = optim.make_optimiser(**OPTIONS)
    state = jax.eval_shape(optimiser.init, shapes["params"])
    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim) + sum(
        2 for x in jax.tree.leaves(shapes["params"]) if not x.ndim
    )
    assert moments == 2 * count


RESNET = dict(name="resnet", blocks=(1, 1, 1, 1), stem_width=8, bottleneck_width=8, stage_width=16)
SWIN = {"name": "swin", "width": 8, "depths": (1, 1), "heads": (2, 2), "window": 4}
OBJECTIVES = {"zegformer": GrouperObjective, "per_pixel": PerPixelObjective}


@pytest.fixture
def segmentation(request, tmp_path):
    """A real objective on a small model without dropout."""
    text_cd = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    text_cd /= np.linalg.norm(text_cd, axis=-1, keepdims=True)
    experiment = Experiment.open(shrunk.get_config(request.param), tmp_path)
    return OBJECTIVES[request.param](experiment, text_cd)


def labelled_batch():
    """Images with different numbers of targets."""
    rng = np.random.default_rng(2)
    label = rng.choice(np.array([0, 1, 2, 3, 4, 255], np.uint8), (8, 2, 2))
    label[0] = 255  # an image without any target
    return {
        "image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
        "label": np.kron(label, np.ones((1, 16, 16), np.uint8)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("segmentation", OBJECTIVES, indirect=True)
def test_the_real_losses_add_up_over_parts(segmentation):
    (whole,), lines = run(segmentation, [labelled_batch()])
    (parts,), part_lines = run(segmentation, [labelled_batch()], accumulate=4)
    for name in (*segmentation.metrics, "gradient_norm"):
        np.testing.assert_allclose(lines[0][name], part_lines[0][name], rtol=2e-5, err_msg=name)
    # After one step the first moment is a tenth of the clipped gradient.
    moments = [optax.tree.get(state.opt_state, "mu") for state in (whole, parts)]
    difference = optax.tree.norm(jax.tree.map(np.subtract, *moments))
    assert difference < 1e-4 * optax.tree.norm(moments[0])


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [RESNET, SWIN], ids=["resnet", "swin"])
def test_computing_again_changes_no_gradient(backbone):
    images = np.random.default_rng(3).normal(size=(1, 32, 32, 3)).astype(np.float32)
    gradients = []
    for remat in (False, True):
        model = models.build_backbone(backbone, remat=remat)
        variables = jax.jit(model.init)(jax.random.key(0), images)

        def loss(params, model=model, variables=variables):
            maps = model.apply(variables | {"params": params}, images, deterministic=True)
            return sum((x**2).sum() for x in maps.values())

        text = str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))
        assert ("remat" in text or "checkpoint" in text) == remat
        gradients.append(jax.jit(jax.grad(loss))(variables["params"]))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, *gradients))
    assert difference < 1e-5 * optax.tree.norm(gradients[0])


def test_the_optax_clip_sees_the_whole_gradient():
    """Clipping comes after the parts are added."""
    states, lines = run(accumulate=4)
    objective, batch = LeastSquares(), next(make_batches())
    gradient = jax.grad(
        lambda p: objective.loss(p, {}, batch, objective.totals(batch), jax.random.key(0))[0]
    )({"kernel": jnp.asarray(INIT), "bias": jnp.ones(3)})
    np.testing.assert_allclose(lines[0]["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
