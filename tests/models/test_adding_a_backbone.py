"""A new backbone is one module and a line in the registry: configs, models and weights have it."""

import importlib.util
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import base
from zegformer_jax.experiment.models import build_model, set_sizes
from zegformer_jax.models.backbones import BACKBONES
from zegformer_jax.pretrained import backbones, start, tables, zegformer

TOY = '''
import flax.linen as nn
import jax.numpy as jnp
from zegformer_jax.models.backbones.backbone import Backbone, Name


class Pyramid(nn.Module):
    """One convolution a stage.

    Attributes:
        width: channels of the first stage.
        growth: factor from one stage's channels to the next one's.
        dtype: compute dtype.
        remat: unused.
    """

    width: int = 6
    growth: int = 2
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images_bhwc, deterministic=True):
        x, maps = images_bhwc.astype(self.dtype), {}
        for stage, side in enumerate((4, 2, 2, 2)):
            conv = nn.Conv(
                self.width * self.growth**stage, (side, side), side, dtype=self.dtype,
                name=f"stage{stage}",
            )
            x = maps[f"res{stage + 2}"] = nn.relu(conv(x))
        return maps


def names(module):
    kernels = [Name(f"params/stage{i}/kernel", f"down.{i}.weight", "conv") for i in range(4)]
    return kernels + [Name(f"params/stage{i}/bias", f"down.{i}.bias") for i in range(4)]


def infer_sizes(tensors):
    first, second = (tensors.shape(f"down.{i}.weight", 4)[0] for i in (0, 1))
    return {"width": first, "growth": second // first}


BACKBONE = Backbone(
    module=Pyramid,
    variants={"toy": {}, "toy_wide": {"width": 10, "growth": 1}},
    marks=("down.0.weight",),
    names=names,
    infer_sizes=infer_sizes,
    left_out=(("down[.]seed", "a count"),),
    optimiser_groups=((".*stage0.*", {"learning_rate": 0.0}),),
    starts={"toy_wide": "https://toys/wide.pth"},
)
'''


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    spec = importlib.util.spec_from_file_location("toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(BACKBONES, "toy", module.BACKBONE)  # the line in the registry
    return module


@pytest.fixture
def config():
    config = base.get_config().unlock()
    base.set_variant(config, "toy_wide", baseline_backbone="toy")
    config.model.transformer.update(queries=5, width=32, layers=1, heads=1, mlp_width=16)
    config.model.pixel_decoder.update(width=32, mask_width=16)
    return config.lock()


@pytest.fixture
def case(config):
    """A grouper on the toy, with random weights."""
    model = build_model(config, embed_dim=24)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 64, 96, 3)).astype(np.float32)
    text = rng.normal(size=(3, 24)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, text)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return SimpleNamespace(model=model, variables=variables, images=images, text=text)


def test_a_config_has_its_section_and_its_rules(config):
    assert config.model.backbone.to_dict() == {"name": "toy", "width": 10, "growth": 1}
    assert config.optimiser.groups[-1] == (".*stage0.*", {"learning_rate": 0.0})
    assert config.model.start_from == "https://toys/wide.pth"
    with pytest.raises(AttributeError):
        config.model.backbone.blocks = (1, 1, 1, 1)
    with pytest.raises(ValueError, match="choose per_pixel or .*swin_l, toy, toy_wide"):
        base.set_variant(base.get_config().unlock(), "vit", baseline_backbone="toy")


@pytest.mark.slow
def test_a_grouper_runs_on_it(case):
    output, state = case.model.apply(
        case.variables, case.images, case.text, capture_intermediates=True
    )
    assert output.class_logits_lbqc.shape == (1, 2, 5, 4)
    assert output.mask_logits_lbqhw.shape == (1, 2, 5, 16, 24)
    (maps,) = state["intermediates"]["backbone"]["__call__"]
    assert maps["res5"].shape == (2, 2, 3, 10)
    weights = case.variables["params"]["backbone"]["stage0"]
    patches = case.images.reshape(2, 16, 4, 24, 4, 3)
    expected = np.einsum("bhiwjc,ijcd->bhwd", patches, weights["kernel"]) + weights["bias"]
    np.testing.assert_allclose(maps["res2"], np.maximum(expected, 0), rtol=1e-4, atol=1e-5)


def assert_same(actual, expected):
    actual, expected = tables.flatten(actual), tables.flatten(expected)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)


def test_a_whole_checkpoint_is_written_and_read(case, config):
    sizes = config.model.to_dict()
    tensors = zegformer.to_checkpoint(case.variables, sizes)
    kernel = case.variables["params"]["backbone"]["stage1"]["kernel"]
    np.testing.assert_array_equal(tensors["backbone.down.1.weight"], kernel.transpose(3, 2, 0, 1))
    checkpoint = zegformer.from_checkpoint(tensors | {"backbone.down.seed": np.ones(1)}, "x")
    assert checkpoint.sizes["backbone"] == {"name": "toy", "width": 10, "growth": 1}
    assert checkpoint.summary.left_out["backbone.down.seed"] == "a count"
    assert_same(checkpoint.variables, case.variables)
    other = base.get_config().unlock()
    set_sizes(other.model, checkpoint.sizes)
    assert other.model.backbone.to_dict() == config.model.backbone.to_dict()
    del tensors["backbone.down.2.bias"]
    with pytest.raises(ValueError, match="no tensor 'backbone.down.2.bias', which params/backbone"):
        zegformer.from_checkpoint(tensors, "x")


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_file_with_the_backbone_alone_is_written_and_read(case, prefix):
    own = {"params": {"backbone": case.variables["params"]["backbone"]}}
    sizes = {"name": "toy", "width": 10, "growth": 1}
    tensors = backbones.write(sizes, own)
    assert set(tensors) == {f"down.{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")}
    found = start.read_backbone({prefix + name: x for name, x in tensors.items()}, "x")
    assert json.loads(json.dumps(found.sizes)) == sizes
    assert_same(found.variables, own)


def test_what_no_backbone_has_is_refused_by_the_names_of_all():
    with pytest.raises(ValueError, match="'stem.conv1.weight' .*'down.0.weight' .toy."):
        start.read_backbone({"conv.weight": np.ones((2, 3, 4, 4))}, "x")
