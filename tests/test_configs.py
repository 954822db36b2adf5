"""Every config and variant: complete, locked, and with no field that nothing reads."""

import importlib
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from zegformer_jax.models.clip import ClipConfig
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.pixel_decoder import PixelDecoder
from zegformer_jax.models.resnet import ResNet
from zegformer_jax.models.transformer import TransformerDecoder

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("zegformer", "per_pixel", "classifier", "clip")
VARIANTS = {"base": [()], "openmoji": [(), *((kind,) for kind in KINDS)]}
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]
FREE = ("dataset.options",)  # of the data set's own builder; tests below
# Sections that are handed over whole, and the class whose attributes they are.
MODULES = {
    "model": Grouper,
    "model.backbone": ResNet,
    "model.pixel_decoder": PixelDecoder,
    "model.transformer": TransformerDecoder,
    "clip": ClipConfig,
}


def fields(config, prefix=""):
    """Leaf fields by dotted path; the free sections are leaves."""
    found = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, ConfigDict) and path not in FREE:
            found |= fields(value, f"{path}.")
        else:
            found[path] = value
    return found


def test_every_file_is_tested():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert files == VARIANTS.keys()


@pytest.mark.parametrize("name, variant", CASES)
def test_a_config_has_the_fields_of_the_base_and_is_locked(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(*variant)
    expected, actual = fields(base.get_config()), fields(config)
    assert actual.keys() == expected.keys()
    for path, value in actual.items():
        assert isinstance(value, type(expected[path])), path
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.model.typo = 1
    with pytest.raises(KeyError):
        config.optimiser.update(typo=1)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="openmoji.py:vit: choose clip"):
        importlib.import_module("configs.openmoji").get_config("vit")


def test_two_calls_share_nothing():
    first = base.get_config()
    first.train.steps = 1
    assert base.get_config().train.steps != 1


def test_every_field_stands_beside_a_comment():
    lines = (ROOT / "configs" / "base.py").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s+config\.[\w.]+ = (?!ConfigDict)", line):
            assert "#" in line or lines[number - 1].lstrip().startswith("#"), line


@pytest.mark.parametrize("path", fields(base.get_config()))
def test_every_field_is_read_somewhere(path):
    section, _, field = path.rpartition(".")
    if section in MODULES and field in MODULES[section].__dataclass_fields__:
        return
    sources = "\n".join(file.read_text() for file in (ROOT / "zegformer_jax").rglob("*.py"))
    # `config.eval.gamma`, or `settings.gamma` and the like where the section has another name.
    names = {"": r"config\.", "loss": r"weights\.", "eval": r"settings\.", "clip": r"prompts\."}
    pattern = rf"\bconfig\.{re.escape(path)}\b"
    if section in names:
        pattern += rf"|\b{names[section]}{field}\b"
    assert re.search(pattern, sources), f"nothing reads config.{path}"
