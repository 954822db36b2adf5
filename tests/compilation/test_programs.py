"""The compiled programs are those that train and evaluate run; estimates and advice."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
import shrunk

from zegformer_jax.cli.main import main
from zegformer_jax.compilation import programs, report
from zegformer_jax.compilation.estimate import DoesNotFit, estimate
from zegformer_jax.compilation.programs import lower_evaluation, lower_training
from zegformer_jax.compilation.sizes import without_weights
from zegformer_jax.evaluation import evaluator
from zegformer_jax.experiment import Experiment
from zegformer_jax.input import pipeline
from zegformer_jax.runtime.cloud_tpu import CHIPS, Topology, has_libtpu, open_topology
from zegformer_jax.runtime.mesh import to_devices
from zegformer_jax.training import loop

GIB = 2**30
SHRUNK = f"--config={shrunk.__file__}"
needs_libtpu = pytest.mark.skipif(
    not has_libtpu(), reason="libtpu is not installed; ./run.sh test installs it"
)


def here():
    """This machine's devices in a slice's place."""
    return Topology("here", CHIPS["v5e"], jax.devices()[:2])


@pytest.fixture
def experiment():
    config = shrunk.get_config().unlock()
    config.train.update(ema=0.9, accumulate=2)
    config.sharding.params = "data"
    return Experiment.open(config.lock(), "nowhere")


@pytest.mark.slow
def test_the_step_is_the_one_that_is_trained(finished, tmp_path, monkeypatch):
    """Its text is that of the training's own program, with its shapes, shardings and donation."""

    class Compiling(Exception):
        pass

    def stop(self, constants, batch):
        raise Compiling(self._step.lower(self.state, constants, batch, self._key).as_text())

    monkeypatch.setattr(loop.Loop, "_compile", stop)
    config = shrunk.beside(finished.workdir, accumulate=2, ema=0.9).unlock()
    config.sharding.params = "data"
    config.model.start_from = ""
    experiment = Experiment.open(config, tmp_path)
    with pytest.raises(Compiling) as trained:
        loop.train(experiment, progress=False)
    assert lower_training(experiment, here()).as_text() == str(trained.value)


@pytest.mark.slow
def test_the_step_is_the_one_that_evaluates(finished, monkeypatch):
    """On a batch of images of the size that is compiled for."""
    experiment = Experiment.open(shrunk.beside(finished.workdir), finished.workdir)
    batch = next(
        pipeline.eval_batches(
            experiment.open_split("validation"), experiment.vocabulary, batch_size=2,
            short_sides=(shrunk.SIDE,), max_long_side=2048,
        )
    )  # fmt: skip
    monkeypatch.setattr(programs, "IMAGE_SIZE", (shrunk.SIDE, shrunk.SIDE))
    ours = evaluator.Evaluator(experiment)
    arrays = {name: x for name, x in batch.items() if name not in evaluator.ON_HOST}
    wanted = ours._count.lower(ours._weights, ours._text, to_devices(arrays, ours._mesh))
    assert lower_evaluation(experiment, here()).as_text() == wanted.as_text()


@pytest.mark.slow
def test_no_weights_are_read(experiment):
    clip = without_weights(experiment).clip
    assert clip.config.embed_dim == 16
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(clip.params))
    config = shrunk.get_config().unlock()
    config.clip.update(source="openai/clip-vit-large-patch14", input_size=336)
    published = without_weights(Experiment.open(config, "nowhere")).clip
    assert published.config.grid_size == 24
    parameters = sum(x.size for x in jax.tree.leaves(published.params))
    assert parameters == 427_944_193  # of openai/clip-vit-large-patch14-336


@pytest.mark.parametrize(
    "field, lower, change",
    [
        ("input.batch_size", lower_training, lambda config: config.input.update(batch_size=3)),
        ("eval.batch_size", lower_evaluation, lambda config: config.eval.update(batch_size=3)),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(field, lower, change):
    config = shrunk.get_config().unlock()
    change(config)
    with pytest.raises(ValueError, match=f"{field}: a batch of 3 does not divide by 2 devices"):
        lower(Experiment.open(config, "nowhere"), here())


def test_kinds_without_images_of_a_known_size_are_refused():
    experiment = Experiment.open(shrunk.get_config("clip"), "nowhere")
    with pytest.raises(ValueError, match="'clip': only zegformer or per_pixel can be compiled"):
        lower_training(experiment, here())


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 20.5G of 512M hbm.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.5G) exceeds "
        "available HBM (512M).",
    ],
)
def test_too_little_memory_is_told_with_what_helps(experiment, message):
    def fail():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    with pytest.raises(DoesNotFit) as problem:
        estimate("train", SimpleNamespace(compile=fail), here(), 2, 4)
    assert (problem.value.used, problem.value.available) == (20.5 * GIB, GIB / 2)
    advice = report.advise("train", experiment, problem.value)
    assert "20.50 GiB of 0.50 GiB" in advice
    assert "--config.train.accumulate=4, --config.train.remat=True, a smaller" in advice
    assert "eval.clip_chunk" in report.advise("evaluate", experiment, problem.value)


def test_other_failures_of_the_compiler_are_not_hidden():
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        estimate("train", SimpleNamespace(compile=fail), here(), 2, 4)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "2x2", "v5e:"])
def test_names_of_no_form_are_refused(capsys, name):
    assert main(["compile", SHRUNK, f"--topology={name}"]) == 1
    assert f"--topology={name}: give GENERATION:SHAPE, such as v5e:2x2" in capsys.readouterr().err


def test_programs_that_do_not_exist_are_refused(capsys):
    assert main(["compile", SHRUNK, "--topology=v5e:2x2", "--what=train,serve"]) == 1
    assert "--what=train,serve: choose among train, evaluate" in capsys.readouterr().err


@needs_libtpu
def test_slices_that_libtpu_does_not_know_are_refused():
    with pytest.raises(ValueError, match="--topology=v5e:3x3: .*give GENERATION:SHAPE"):
        open_topology("v5e:3x3")


@needs_libtpu
@pytest.mark.parametrize(
    "name, chips, hosts", [("v5e:1x1", 1, 1), ("v5e:4x4", 16, 4), ("v4:2x2x1", 4, 1)]
)
def test_a_slice_has_a_device_a_chip(name, chips, hosts):
    topology = open_topology(name)
    assert len(topology.devices) == chips == hosts * len(topology.host_devices)
    assert {device.platform for device in topology.devices} == {"tpu"}


@needs_libtpu
@pytest.mark.slow
def test_a_training_is_compiled_for_four_chips(tmp_path):
    arguments = ["compile", SHRUNK, "--topology=v5e:2x2", "--what=train", "--json"]
    command = [sys.executable, "-m", "zegformer_jax.cli.main", *arguments]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not list(tmp_path.iterdir())  # a program cannot be read back without its device
    found = json.loads(ran.stdout)
    assert found["fits"] and (found["chips"], found["images"]) == (4, 4)
    objective = programs.objective_of(
        without_weights(Experiment.open(shrunk.get_config(), "nowhere"))
    )
    params = jax.eval_shape(objective.init, jax.random.key(0))["params"]
    size = sum(4 * x.size for x in jax.tree.leaves(params))
    assert size < found["collectives"]["all-reduce"] < 1.5 * size  # every gradient, once
    assert found["memory"] > 3 * size  # parameters and Adam's two moments
    assert 0 < found["share_of_peak"] < 1 and found["seconds"] > 0
    assert len(found["costliest"]) == 10
    own = [line["source"] for line in found["costliest"] if line["source"].startswith("training/")]
    assert own and all(os.path.exists(f"zegformer_jax/{x.split(':')[0]}") for x in own)
