"""Runs as users start them, in real processes: killed, asked to stop, on several hosts."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import shrunk
from xla_flags import threads, xla_flags

from zegformer_jax.cli.main import main
from zegformer_jax.cli.train import TERMINATED
from zegformer_jax.experiment.data import open_split
from zegformer_jax.experiment.workdir import load_config
from zegformer_jax.runtime.checkpoints import Checkpoints
from zegformer_jax.runtime.processes import count_processes, join
from zegformer_jax.training.log import METRICS_FILE, TIMINGS, read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
KILLS = 2
# The published one. Adam's first steps are as long for a gradient that is mere rounding as for any
# other, so at the shrunk experiment's rate the sums of another split soon lead elsewhere.
LEARNING_RATE = 1e-4


def command(workdir, finished, *fields, steps=STEPS, kind="per_pixel"):
    config = shrunk.beside(finished.workdir, kind)
    return [
        sys.executable, "-m", "zegformer_jax.cli.main", "train",
        f"--config={ROOT / 'tests' / 'support' / 'shrunk.py'}:{kind}", f"--workdir={workdir}",
        f"--config.clip.source={config.clip.source}",
        f"--config.dataset.directory={config.dataset.directory}",
        f"--config.model.start_from={config.model.start_from}",
        f"--config.train.steps={steps}", "--config.train.log_every=2",
        "--config.train.checkpoint_every=4", "--config.train.tensorboard=False",
        f"--config.optimiser.learning_rate={LEARNING_RATE}", *fields,
    ]  # fmt: skip


def start(arguments, devices=1, **variables):
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "XLA_FLAGS": xla_flags(devices),
        "NPROC": threads(devices),
        **variables,
    }
    return subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process, status=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def lines_of(workdir):
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_metrics(workdir)
    ]


def state_of(workdir):
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step == STEPS
        return checkpoints.read(("params", "opt_state", "sums", "step"))


def wait_for_step(process, workdir, step):
    path, last = Path(workdir) / METRICS_FILE, 0
    while last < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
        lines = path.read_text().splitlines() if path.exists() else []
        last = json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(command(workdir, finished)))
    return workdir


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_one_that_was_not(finished, whole, tmp_path):
    """The kills come at random moments: while it starts, steps or saves."""
    rng, expected = random.Random(0), lines_of(whole)
    for kill in range(KILLS):
        process = start(command(tmp_path, finished))
        wait_for_step(process, tmp_path, (kill + 1) * STEPS // (KILLS + 2))
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.communicate()
    finish(start(command(tmp_path, finished)))
    assert [line["step"] for line in expected] == list(range(2, STEPS + 1, 2))
    assert lines_of(tmp_path) == expected
    jax.tree.map(np.testing.assert_array_equal, state_of(tmp_path), state_of(whole))


@pytest.mark.slow
def test_another_config_resumes_only_when_told(finished, whole, tmp_path, capsys):
    workdir, steps = tmp_path / "run", STEPS + 2
    shutil.copytree(whole, workdir)
    changed = command(workdir, finished, "--config.optimiser.power=0.5", steps=steps)
    assert main(changed[3:]) == 1
    error = capsys.readouterr().err
    assert "optimiser.power was 0.9, is 0.5" in error and "train.steps was 40, is 42" in error
    finish(start([*changed, "--change-config"]))
    assert lines_of(workdir)[:-1] == lines_of(whole) and lines_of(workdir)[-1]["step"] == steps
    assert load_config(workdir).optimiser.power == 0.5


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_hosts(arguments, count=2, devices=2):
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
    }
    return [start(arguments, devices, **shared, JAX_PROCESS_ID=str(i)) for i in range(count)]


@pytest.mark.slow
def test_two_hosts_train_as_one_device_does(finished, whole, tmp_path):
    """The first 16 steps' losses, before rounding grows; SIGTERM to one host stops both.

    The large parameters are split over both, the others are replicated.
    """
    arguments = command(tmp_path, finished, "--config.sharding.params=data")
    processes = start_hosts(arguments)
    wait_for_step(processes[0], tmp_path, 6)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [finish(process, TERMINATED) for process in processes]
    with Checkpoints(tmp_path) as checkpoints:
        saved = (
            f"saved at step {checkpoints.latest_step} of {STEPS}; run the same command to resume"
        )
    assert all(saved in output for output in outputs)
    for process in start_hosts(arguments):
        finish(process)
    lines, expected = lines_of(tmp_path), lines_of(whole)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    losses, expected = ([line["loss"] for line in x[:8]] for x in (lines, expected))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_train_as_one_does(finished, whole, tmp_path):
    """Two devices share the rows of an image; the large parameters are split over the others."""
    fields = ["--config.sharding.params=data", "--config.sharding.model=2"]
    process = start(command(tmp_path, finished, *fields), devices=8)
    wait_for_step(process, tmp_path, 16)
    process.send_signal(signal.SIGTERM)
    finish(process, TERMINATED)
    one, eight = lines_of(whole)[:8], lines_of(tmp_path)[:8]
    assert [line["step"] for line in eight] == [line["step"] for line in one]
    np.testing.assert_allclose(one[0]["gradient_norm"], eight[0]["gradient_norm"], rtol=1e-4)
    losses = [[line["loss"] for line in lines] for lines in (one, eight)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_environment_tells_the_number_of_processes():
    assert count_processes({}) == 1
    assert count_processes({"SLURM_STEP_NUM_TASKS": "4"}) == 4
    assert count_processes({"OMPI_COMM_WORLD_SIZE": "2", "JAX_NUM_PROCESSES": ""}) == 2
    assert count_processes({"TPU_WORKER_HOSTNAMES": "a,b,c"}) == 3
    assert count_processes({"TPU_WORKER_HOSTNAMES": "localhost"}) == 1
    assert count_processes({"TPU_WORKER_HOSTNAMES": "a,b,"}) == 2
    assert count_processes({"SLURM_STEP_NUM_TASKS": "4(x2)"}) == 1


def test_half_a_description_of_the_processes_is_refused():
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is set, but not JAX_COORDINATOR_ADD"):
        join({"JAX_NUM_PROCESSES": "2"})


def count_command(finished, kind, path, **fields):
    script = ROOT / "tests" / "support" / "evaluate_counts.py"
    return [sys.executable, script, kind, finished.workdir, path, json.dumps(fields)]


@pytest.fixture(scope="module")
def counted_alone(finished, tmp_path_factory):
    """The whole method's counts by one process with one device."""
    path = tmp_path_factory.mktemp("alone") / "counts.npz"
    finish(start(count_command(finished, "zegformer", path)))
    return read_counts(path)


def read_counts(path):
    with np.load(path) as arrays:
        return dict(arrays)


def assert_same_counts(actual, expected, matrices):
    """Every confusion matrix, how often classes occur, and the number of images: exactly."""
    assert actual.keys() == expected.keys()
    assert actual["images"] == shrunk.VALIDATION_SCENES
    confusion = [key for key, array in expected.items() if array.ndim == 2]
    assert len(confusion) == matrices and all(expected[key].sum() > 0 for key in confusion)
    for key, counts in expected.items():  # sums of fractions round by their order
        exact = counts.dtype == np.int64
        np.testing.assert_allclose(actual[key], counts, rtol=0 if exact else 1e-6, err_msg=key)


MATRICES = {"per_pixel": 2, "zegformer": 4 * 2 + 2}  # methods in two vocabularies, and two oracles


@pytest.mark.slow
def test_two_hosts_count_as_one_device_does(finished, counted_alone, tmp_path):
    """One host gets three of the five images and the other two, on two devices each."""
    path = tmp_path / "counts.npz"
    for process in start_hosts(count_command(finished, "zegformer", path)):
        finish(process)
    assert_same_counts(read_counts(path), counted_alone, MATRICES["zegformer"])


@pytest.mark.slow
def test_a_host_without_pictures_is_no_trouble(finished, tmp_path):
    """There is one picture, and so one host that reads none."""
    config = shrunk.beside(finished.workdir, "per_pixel")
    config.dataset.options.validation_scenes = 1
    record = open_split(config, finished.workdir, "validation")[0]  # generates it
    path = tmp_path / "counts.npz"
    for process in start_hosts(count_command(finished, "per_pixel", path, scenes=1), devices=1):
        finish(process)
    counts = read_counts(path)
    assert counts.pop("images") == 1 and len(counts) == MATRICES["per_pixel"]
    whole = counts["['openmoji_voc/per_pixel']"]
    labels = record["label"][record["label"] < len(whole)]
    np.testing.assert_array_equal(whole.sum(1), np.bincount(labels, minlength=len(whole)))


@pytest.mark.slow
def test_neither_devices_nor_batches_nor_chunks_count(finished, counted_alone, tmp_path):
    path, fields = tmp_path / "counts.npz", {"batch_size": 4, "clip_chunk": 3}
    finish(start(count_command(finished, "zegformer", path, **fields), devices=4))
    assert_same_counts(read_counts(path), counted_alone, MATRICES["zegformer"])
