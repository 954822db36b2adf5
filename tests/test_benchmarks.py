"""The benchmarks start from any folder, and the step that is timed is the one that is trained."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import shrunk

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["accelerator", "train_step", "input", "inference", "precision", "tpu"]
)
def test_a_benchmark_finds_the_package(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage")


def test_the_timed_step_is_the_trained_one_and_counts_its_work(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("train_step", BENCHMARKS / "train_step.py")
    train_step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_step)
    config = shrunk.get_config()
    config.loss.max_targets = 0  # the published configs' default
    text_cd = train_step.make_text(classes=12)
    ours = train_step.OurStep(config, "float32", train_step.make_batch(config, 2, 12), text_cd)
    objective, key = ours.objective, jax.random.fold_in(ours.key, 0)
    constants = {**ours.state.constants, **objective.constants}
    loss, _ = jax.jit(objective.loss)(
        ours.state.params, constants, ours.batch, objective.totals(ours.batch), key
    )
    ours()
    ours.wait()
    assert ours.state.step == 1 and ours.state.skipped == 0
    np.testing.assert_allclose(ours.state.sums["loss"], loss, rtol=1e-5)
    # At least the stem's convolution of two images: 32 x 32 places, 7 x 7 x 3 x 8 weights.
    assert ours.flops > 2 * 2 * 32 * 32 * 7 * 7 * 3 * 8
    parameters = sum(x.nbytes for x in jax.tree.leaves(ours.state.params))
    assert ours.memory() > 3 * parameters  # and Adam's two moments
    assert ours.matching_seconds(0.01) > 0
