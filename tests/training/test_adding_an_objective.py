"""Another objective is one module and one line: here a line through points."""

import importlib
import sys
import textwrap
from typing import NamedTuple

import numpy as np
import pytest
import shrunk
from etils import epath

from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.checkpoints import Checkpoints
from zegformer_jax.training.log import VALIDATION_FILE, read_lines, read_metrics
from zegformer_jax.training.loop import train
from zegformer_jax.training.objectives import OBJECTIVES

MODULE = '''
    import jax.numpy as jnp
    import numpy as np

    from zegformer_jax.training.objective import Objective


    class Line(Objective):
        """Least squares of a line through the origin."""

        metrics = ("loss",)
        constants = {"slope": jnp.float32(3.0)}

        def __init__(self, experiment):
            self.experiment = experiment

        def init(self, key):
            return {"params": {"slope": jnp.zeros(())}}

        def loss(self, params, constants, batch, totals, key):
            error_b = (params["slope"] - constants["slope"]) * batch["x"]
            loss = (error_b**2).mean()
            return loss, {"loss": loss}

        def batches(self, start_step):
            for step in range(start_step, self.experiment.train.steps):
                rng = np.random.default_rng([self.experiment.seed, step])
                yield {"x": rng.normal(size=self.experiment.input.batch_size).astype(np.float32)}

        def finish(self, params):
            (self.experiment.workdir / "slope.txt").write_text(str(float(params["slope"])))
'''


@pytest.fixture
def config(tmp_path, monkeypatch):
    """An experiment of the toy objective: `Line` is registered by its one line."""
    (tmp_path / "toy_objective.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_objective", raising=False)
    monkeypatch.setitem(OBJECTIVES, "line", importlib.import_module("toy_objective").Line)
    config = shrunk.get_config().unlock()
    config.model.kind, config.model.start_from, config.train.steps = "line", "", 3
    config.optimiser.update(learning_rate=0.5, weight_decay=0.0, power=0.0)
    return config.lock()


def test_a_toy_objective_is_trained(tmp_path, config):
    workdir = tmp_path / "run"
    history = train(Experiment.open(config, workdir), progress=False)
    assert [line["step"] for line in history] == [1, 2, 3]
    assert history == read_metrics(workdir)
    for step, (line, slope) in enumerate(zip(history, (0.0, 0.5, 1.0), strict=True)):
        x = np.random.default_rng([0, step]).normal(size=4)
        # Adam's steps are near the learning rate while the gradient keeps its sign.
        np.testing.assert_allclose(line["loss"], (3 - slope) ** 2 * (x**2).mean(), rtol=0.1)
    assert 1.3 < float((workdir / "slope.txt").read_text()) < 1.5


class Nearness(NamedTuple):
    """Stands for an evaluation: the nearer a slope is to 1, the better."""

    slope: float

    def line(self):
        return {"slope": self.slope}

    def rank(self):
        return -abs(self.slope - 1)


def test_a_training_is_validated_by_what_it_is_given(tmp_path, config):
    config.train.update(validate_every=1, keep_checkpoints=1)
    slopes = []

    def validate(variables):
        slopes.append(float(variables["params"]["slope"]))
        return Nearness(slopes[-1])

    workdir = tmp_path / "run"
    train(Experiment.open(config, workdir), progress=False, validate=validate)
    np.testing.assert_allclose(slopes, [0.5, 1.0, 1.4], atol=0.1)
    lines = read_lines(epath.Path(workdir) / VALIDATION_FILE)
    assert lines == [{"step": n, "slope": slope} for n, slope in enumerate(slopes, 1)]
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.best_step == 2 and checkpoints.latest_step == 3
