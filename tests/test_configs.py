"""Every config and variant: complete, locked, and with no field that nothing reads."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from slow_but import slow_but

from configs import base
from zegformer_jax.cli import demo, demo_stages
from zegformer_jax.experiment.data import dataset_vocabulary
from zegformer_jax.experiment.models import build_model
from zegformer_jax.models.backbones import BACKBONES, backbone_fields, backbone_variants
from zegformer_jax.models.clip.model import CLIP, ClipConfig
from zegformer_jax.models.grouper import Grouper
from zegformer_jax.models.pixel_decoder import PixelDecoder
from zegformer_jax.models.transformer import TransformerDecoder
from zegformer_jax.segmentation.classifiers import CLASSIFIERS
from zegformer_jax.text.vocabulary import load_vocabulary
from zegformer_jax.training.optim import group_factors, make_optimiser

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("zegformer", "per_pixel", "classifier", "clip")
BACKBONE_VARIANTS = tuple((name,) for name in backbone_variants())
VARIANTS = {
    "base": [()],
    "openmoji": [(), *((kind,) for kind in KINDS)],
    "coco_stuff": [(), ("per_pixel",), ("r101,supervised",), *BACKBONE_VARIANTS],
    "pascal_voc": [(), ("per_pixel",), ("r50,30k",), *BACKBONE_VARIANTS],
    "ade20k_full": [(), ("per_pixel",), *BACKBONE_VARIANTS],
    "folder": [(), ("tiny",), ("per_pixel",), *BACKBONE_VARIANTS],
}
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]
FREE = ("dataset.options",)  # of the data set's own builder; tests below
# Sections that are handed over whole, and the class whose attributes they are.
MODULES = {
    "model": Grouper,
    "model.backbone": BACKBONES[base.get_config().model.backbone.name].module,
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
    complete = base.get_config().unlock()
    complete.model.backbone = backbone_fields(config.model.backbone.name)
    expected, actual = fields(complete), fields(config)
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


def test_a_variant_for_own_data_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="folder.py:vit: choose tiny, per_pixel, r50, r101"):
        importlib.import_module("configs.folder").get_config("vit")


def test_two_calls_share_nothing():
    first = base.get_config()
    first.train.steps = 1
    assert base.get_config().train.steps != 1


def test_every_field_has_a_comment():
    lines = (ROOT / "configs" / "base.py").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s+config\.[\w.]+ = (?!ConfigDict)", line):
            assert "#" in line or lines[number - 1].lstrip().startswith("#"), line


@pytest.mark.parametrize("name", BACKBONES)
def test_every_field_of_a_backbone_is_an_attribute_that_its_module_explains(name):
    own = backbone_fields(name)
    assert own.pop("name") == name
    module = BACKBONES[name].module
    assert own.keys() <= module.__dataclass_fields__.keys()
    explained = re.findall(r"^ {8}(\w+): ", module.__doc__, re.MULTILINE)
    assert own.keys() <= set(explained)


def test_a_field_of_another_backbone_is_refused():
    config = base.get_config().unlock()
    config.model.backbone.name = "swin"
    with pytest.raises(ValueError, match="swin has no field 'blocks' but width, .*variant"):
        build_model(config, 512)
    config.model.backbone.name = "vit"
    with pytest.raises(ValueError, match="model.backbone.name 'vit': choose one of resnet, swin"):
        build_model(config, 512)


@functools.cache
def attributes_read() -> set[tuple[str, str]]:
    """Attributes that the package reads, each with the name of the object that it is of."""
    found = set()
    for file in (ROOT / "zegformer_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                found.add((name.lstrip("_"), node.attr))
    return found


def keywords_read(section: str) -> set[str]:
    """Fields of a section that are handed over by their names."""
    if section == "optimiser":
        return set(inspect.signature(make_optimiser).parameters)
    kinds = CLASSIFIERS.values() if section == "eval" else [MODULES[section]]
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("path", fields(base.get_config()))
def test_every_field_is_read_somewhere(path):
    section, _, field = path.rpartition(".")
    if section in {*MODULES, "optimiser", "eval"} and field in keywords_read(section):
        return
    # `experiment.eval.gamma`, or `settings.gamma` and the like.
    owners = {section.rpartition(".")[2] or "config", "settings", f"{section}_settings"}
    owners |= {"weights"} if section == "loss" else set()
    read = {owner for owner, name in attributes_read() if name == field}
    assert read & owners, f"nothing reads config.{path}"


# Trainable parameters and frozen constants, on text embeddings of 512 numbers (openmoji's: 128).
# ResNets: the published models' counts. Swins: the published backbones' without their heads
# (27,517,818 for Swin-T) and the parts around them.
COUNTS = {
    "r50": (41_348_032, 106_240),
    "r101": (60_287_936, 210_688),
    "swin_t": (41_850_298, 0),
    "swin_s": (63_168_202, 0),
    "swin_b": (101_922_680, 0),
    "swin_l": (211_668_916, 0),
    "tiny": (2_588_192, 0),  # openmoji's grouper
}
DEFAULTS = {
    "base": "r50",
    "coco_stuff": "r101",
    "pascal_voc": "r101",
    "ade20k_full": "r50",
    "folder": "tiny",
}
BASELINES = {"r50": (31_126_976, 106_240), "r101": (50_066_880, 210_688)}
OPENMOJI = {
    "zegformer": (2_588_192, 0),
    "per_pixel": (1_923_424, 0),
    "classifier": (1_508_768, 0),
    "clip": (1_547_009, 0),
}


def expected_counts(name, variant):
    """A KeyError where a config has no count."""
    chosen = variant[0].split(",")[0] if variant else ""
    if name == "openmoji":
        return OPENMOJI[chosen or "zegformer"]
    if chosen == "per_pixel":
        return BASELINES[DEFAULTS[name]]
    return COUNTS[chosen or DEFAULTS[name]]


def abstract_variables(config, width):
    """Builds the model for text embeddings of some width, without computing anything."""
    if config.model.kind == "clip":
        sizes = {k: v for k, v in config.clip.items() if k in ClipConfig.__dataclass_fields__}
        model, side, length = CLIP(ClipConfig(**sizes)), sizes["image_size"], 4
        inputs = ((1, side, side, 3), np.float32), ((1, length), np.int32)
    else:
        model = build_model(config, width)
        inputs = ((1, 64, 64, 3), np.float32), ((1, width), np.float32)
    shapes = [jax.ShapeDtypeStruct(*x) for x in inputs]
    return jax.eval_shape(model.init, jax.random.key(0), *shapes)


# One file with all the backbones, of which the others have the same.
BUILT = [(name, x) for name, x in CASES if name in ("coco_stuff", "openmoji") or len(x) == 0]


@pytest.mark.parametrize(
    "name, variant", slow_but([x for x in BUILT if x[0] != "coco_stuff"], BUILT)
)
def test_every_config_builds_with_its_number_of_parameters(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(*variant)
    small = name == "openmoji" or config.model.start_from == demo.WORKDIR
    variables = abstract_variables(config, 128 if small else 512)
    counts = [
        sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables.get(collection, {})))
        for collection in ("params", "constants")
    ]
    assert tuple(counts) == expected_counts(name, variant)


def test_only_the_published_coco_evaluation_has_other_prompts():
    """The published COCO R-101 was evaluated with `single`, though trained with the other set."""
    others = {
        (name, variant): importlib.import_module(f"configs.{name}").get_config(*variant)
        for name, variant in CASES
    }
    found = {case for case, config in others.items() if config.eval.grouper_prompts}
    assert found == {("coco_stuff", ()), ("coco_stuff", ("r101",))}
    assert {others[case].eval.grouper_prompts for case in found} == {"single"}


@pytest.mark.parametrize("name, variant", CASES)
def test_a_published_training_starts_from_weights_of_its_backbone(name, variant):
    """By the sizes in their files' names; a model with frozen norms cannot start without."""
    model = importlib.import_module(f"configs.{name}").get_config(*variant).model
    if name in ("base", "openmoji") or variant in ((), ("tiny",)) and name == "folder":
        assert "://" not in model.start_from
    elif model.backbone.name == "resnet":
        depth = 2 + 3 * sum(model.backbone.blocks)
        assert re.fullmatch(rf"detectron2://.*/R-{depth}\.pkl", model.start_from)
    else:
        size, side = re.fullmatch(
            r"https://.*/swin_(\w+)_patch4_window(\d+)_\d+(?:_22k)?\.pth", model.start_from
        ).groups()
        sizes = BACKBONES["swin"].variants[f"swin_{size[0]}"]
        assert {k: model.backbone[k] for k in sizes} == sizes and int(side) == sizes["window"]


def test_own_data_on_a_laptop_start_from_what_the_demo_trains():
    tiny = importlib.import_module("configs.folder").get_config("tiny")
    trained = importlib.import_module("configs.openmoji").get_config()
    assert tiny.model.start_from == demo.WORKDIR and demo_stages.FOLDERS["zegformer"] == "."
    assert tiny.clip.source == f"{demo.WORKDIR}/{demo_stages.FOLDERS['clip']}"
    for config in (tiny, trained):
        config.model.start_from = ""
    assert tiny.model == trained.model


@pytest.mark.parametrize("variant", VARIANTS["folder"])
def test_own_data_have_the_classes_of_their_own_list(variant):
    config = importlib.import_module("configs.folder").get_config(*variant)
    assert (config.dataset.name, config.dataset.vocabulary) == ("folder", "")
    assert config.eval.vocabularies == () and len(config.dataset.options) == 0


@pytest.mark.parametrize("name", ["coco_stuff", "pascal_voc", "ade20k_full"])
def test_a_variant_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match="no variant 'vit': choose per_pixel or r50, r101"):
        importlib.import_module(f"configs.{name}").get_config("vit")


@pytest.mark.parametrize(
    "name, words", [("coco_stuff", "supervised or nothing"), ("pascal_voc", "30k or nothing")]
)
def test_only_what_is_known_comes_after_the_comma(name, words):
    with pytest.raises(ValueError, match=f"configs/{name}.py:r50,40k: after the comma .* {words}"):
        importlib.import_module(f"configs.{name}").get_config("r50,40k")


@pytest.mark.parametrize("variant, seen", [("r101", 156), ("r101,supervised", 171)])
def test_a_supervised_training_sees_every_class(variant, seen, tmp_path):
    config = importlib.import_module("configs.coco_stuff").get_config(variant)
    vocabulary = dataset_vocabulary(config, tmp_path)
    assert len(vocabulary) == 171 and len(vocabulary.seen_indices) == seen
    file = load_vocabulary("coco_stuff_171")
    assert (vocabulary.names, vocabulary.ids) == (file.names, file.ids)
    table = vocabulary.training_table()
    assert np.count_nonzero(table[:171] != vocabulary.ignore_label) == seen


@pytest.mark.parametrize("name", ["coco_stuff", "pascal_voc", "ade20k_full"])
def test_the_baseline_has_the_backbone_of_the_published_model(name):
    get_config = importlib.import_module(f"configs.{name}").get_config
    baseline, grouper = get_config("per_pixel"), get_config()
    assert (baseline.model.kind, grouper.model.kind) == ("per_pixel", "zegformer")
    assert baseline.model.backbone == grouper.model.backbone


def test_a_swins_position_biases_are_not_decayed():
    config = importlib.import_module("configs.coco_stuff").get_config("swin_t")
    params = {"backbone": {"res2_0": {"attention": {"relative_position_bias": 0, "kernel": 0}}}}
    decays = group_factors(params, config.optimiser.groups, "weight_decay")
    attention = decays["backbone"]["res2_0"]["attention"]
    assert attention == {"relative_position_bias": 0.0, "kernel": 1.0}
