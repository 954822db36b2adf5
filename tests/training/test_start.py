"""Weights that a training starts from: fetched when they are published, refused when missing."""

import pickle
from types import SimpleNamespace

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shrunk
from web import serve

from configs import pascal_voc
from zegformer_jax.experiment import Experiment
from zegformer_jax.experiment.workdir import load_variables
from zegformer_jax.models.backbones import backbone_fields, build_backbone
from zegformer_jax.models.backbones.resnet import CAFFE2_NORM, caffe2_names, names
from zegformer_jax.pretrained import start as published
from zegformer_jax.pretrained import tables
from zegformer_jax.pretrained.formats import write_tensors
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.training.initialise import locate_start
from zegformer_jax.training.loop import train
from zegformer_jax.training.objective import Objective
from zegformer_jax.training.objectives import OBJECTIVES

START = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
FILE = START.replace("://", "/")


class Decay(Objective):
    """Draws a backbone's parameters towards 0: nothing of the network is compiled."""

    metrics = ("loss",)
    constants = {}

    def __init__(self, experiment, module):
        self.experiment, self._module = experiment, module

    def init(self, key):
        shapes = jax.eval_shape(self._module.init, key, jnp.zeros((1, 32, 32, 3)))
        variables = jax.tree.map(lambda x: jnp.full(x.shape, 0.25), shapes)
        return {kind: {"backbone": tree} for kind, tree in variables.items()}

    def loss(self, params, constants, batch, totals, key):
        loss = sum((x**2).mean() for x in jax.tree.leaves(params)) * batch["x"].mean()
        return loss, {"loss": loss}

    def batches(self, start_step):
        for _ in range(start_step, self.experiment.train.steps):
            yield {"x": np.ones(self.experiment.input.batch_size, np.float32)}


@pytest.fixture
def config(monkeypatch):
    """A training of a small backbone with frozen norms."""
    config = shrunk.get_config().unlock()

    def open_objective(experiment):
        return Decay(experiment, build_backbone(config.model.backbone.to_dict()))

    monkeypatch.setitem(OBJECTIVES, "decay", open_objective)
    config.model.kind, config.model.backbone.norm = "decay", "frozen_batch"
    config.train.update(steps=1, tensorboard=False)
    return config


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server that stands for all others, and an empty cache."""
    monkeypatch.setenv("ZEGFORMER_CACHE", str(tmp_path / "cache"))
    with serve(monkeypatch) as web:
        zoo = (published.DETECTRON2[0], web.address("detectron2/"))
        monkeypatch.setattr(published, "DETECTRON2", zoo)
        yield web


@pytest.fixture
def weights(config):
    """Random variables of the backbone, and the same as the tensors of MSRA's files."""
    module = build_backbone(config.model.backbone.to_dict())
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    rng, arrays = np.random.default_rng(0), {}
    for path, shape in tables.shapes_of(shapes).items():
        arrays[path] = rng.uniform(0.5, 1, shape).astype(np.float32)
    tensors = {
        row.name: arrays[row.path].transpose(3, 2, 0, 1)
        if row.layout == "conv"
        else arrays[row.path]
        for row in names(module, lambda layer: caffe2_names(layer, CAFFE2_NORM))
    }
    return SimpleNamespace(arrays=arrays, tensors=tensors | {"fc1000_b": np.zeros(10)})


def run(config, workdir, **options):
    return train(Experiment.open(config, workdir), progress=False, **options)


@pytest.mark.slow
def test_a_training_starts_from_the_file_that_its_config_names(
    web, weights, config, tmp_path, capsys
):
    """It is fetched once, as detectron2 writes it; a run that resumes needs it no more."""
    content = {"model": weights.tensors, "__author__": "MSRA", "matching_heuristics": True}
    web.files[FILE] = pickle.dumps(content)
    config.model.start_from = START
    run(config, tmp_path / "run")
    assert "SHA-256" in capsys.readouterr().err
    trained = load_variables(tmp_path / "run")
    for path, array in weights.arrays.items():
        collection, _, rest = path.partition("/")
        found = tables.flatten(trained)[f"{collection}/backbone/{rest}"]
        tolerance = 0 if collection == "constants" else 2 * config.optimiser.learning_rate
        np.testing.assert_allclose(found, array, rtol=0, atol=tolerance, err_msg=path)
    assert locate_start(Experiment.open(config, tmp_path / "another")).is_file()
    config.train.steps, config.model.start_from = 2, ""
    assert [x["step"] for x in run(config, tmp_path / "run", change_config=True)] == [1, 2]
    assert web.requests == [f"GET {FILE}"]


def test_frozen_norms_without_a_start_are_refused(config, tmp_path):
    """With both remedies."""
    config.model.start_from = ""
    with pytest.raises(UserError, match="frozen_batch") as problem:
        run(config, tmp_path / "run")
    line = str(problem.value)
    assert "--config.model.start_from=detectron2://" in line
    assert "--config.model.backbone.norm=group" in line
    assert not (tmp_path / "run").exists()
    config.model.backbone.norm = "group"
    assert locate_start(Experiment.open(config, tmp_path / "run")) is None


@pytest.mark.parametrize("start", [START, "runs/none.pkl", "none", "gs://b/x"])
def test_a_start_that_is_not_there_leaves_no_workdir(web, config, tmp_path, start):
    config.model.start_from = start
    with pytest.raises(UserError, match=f"{start.partition('//')[2]}.*: .*(404|no such|copy)"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(web.requests) == start.startswith("detectron2")


@pytest.mark.parametrize("change", [{"kind": "clip"}, {"backbone": backbone_fields("swin")}])
def test_what_has_no_frozen_norms_needs_no_start(config, tmp_path, change):
    for field, value in change.items():
        config.model[field] = value
    config.model.start_from = ""
    assert locate_start(Experiment.open(config, tmp_path)) is None


def test_every_publisher_of_the_published_configs_is_asked_by_https():
    for variant in ("r50", "r101", "swin_t", "swin_s", "swin_b", "swin_l"):
        source = pascal_voc.get_config(variant).model.start_from
        address = source.replace(*published.DETECTRON2)
        assert address.startswith("https://") and "://" not in address.removeprefix("https://")


@pytest.fixture
def hub(web, tmp_path, monkeypatch):
    """The server in the Hub's place."""
    constants = huggingface_hub.constants
    template = web.address("{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", web.address().rstrip("/"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return web


def test_a_name_on_the_hub_is_fetched_once(hub, weights, config, tmp_path, monkeypatch):
    write_tensors(tmp_path / "x.safetensors", weights.tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    hub.files["timm/resnet.tv_in1k/resolve/main/pytorch_model.bin"] = data
    config.model.start_from = "timm/resnet.tv_in1k"
    experiment = Experiment.open(config, tmp_path / "run")
    assert locate_start(experiment).read_bytes() == data
    asked = len(hub.requests)
    assert asked > 0
    assert locate_start(experiment).read_bytes() == data and len(hub.requests) == asked
    (tmp_path / "timm" / "resnet.tv_in1k").mkdir(parents=True)  # a workdir here goes first
    assert locate_start(experiment).samefile("timm/resnet.tv_in1k")


def test_a_workdir_is_no_name_on_the_hub(hub, config, tmp_path):
    config.model.start_from = "runs/openmoji"
    with pytest.raises(FileNotFoundError, match="runs/openmoji: no such file or workdir; .* demo"):
        locate_start(Experiment.open(config, tmp_path / "run"))
    assert not hub.requests


@pytest.mark.parametrize("offline", [False, True])
def test_a_name_that_the_hub_does_not_give(hub, config, tmp_path, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    config.model.start_from = "timm/none"
    message = r"timm/none: no file or workdir here, .*get its model.safetensors on another machine"
    with pytest.raises(MissingFile, match=message):
        locate_start(Experiment.open(config, tmp_path / "run"))
