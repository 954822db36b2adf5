"""Conversions: authors' checkpoints, CLIPs and backbones to ours, and trained models back."""

import importlib
import re
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import shrunk
from array_files import write_pth
from clips import CLIPS
from folders import make_folder
from PIL import Image

import zegformer_jax
from zegformer_jax.cli import main
from zegformer_jax.evaluation import loop
from zegformer_jax.evaluation.checkpoint import open_checkpoint
from zegformer_jax.evaluation.evaluator import Evaluator
from zegformer_jax.experiment import Experiment, conversion
from zegformer_jax.experiment.conversion import convert
from zegformer_jax.experiment.workdir import CONVERTED_FILE, load_config
from zegformer_jax.models.backbones.resnet import ResNet, torchvision_names
from zegformer_jax.pretrained import tables, zegformer
from zegformer_jax.pretrained.clip.tensors import OPENAI, parameter_shapes, published_tensors
from zegformer_jax.pretrained.formats import read_tensors
from zegformer_jax.pretrained.start import read_start
from zegformer_jax.runtime.checkpoints import Checkpoints
from zegformer_jax.training.initialise import start_from
from zegformer_jax.training.objectives import open_objective

CLIP = "sem_seg_head.predictor.clip_model."
HEADS = 4  # of the golden model, whose heads are narrower than the published ones
VOCABULARY = 49408
COCO = "configs/coco_stuff.py"


def config_of(name=COCO):
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    return module.get_config()


@pytest.fixture(scope="module")
def checkpoint(golden, tmp_path_factory):
    """A `.pth` as the authors publish it, CLIP inside, with the golden weights."""
    clip = golden("clip_weights")
    embedding = np.zeros((VOCABULARY, clip["token_embedding.values"].shape[1]), np.float32)
    embedding[clip.pop("token_embedding.rows")] = clip.pop("token_embedding.values")
    clip["token_embedding.weight"] = embedding
    tensors = golden("segmenter_weights") | {CLIP + name: x for name, x in clip.items()}
    path = tmp_path_factory.mktemp("published") / "zegformer.pth"
    write_pth(path, {name: np.asarray(x, np.float32) for name, x in tensors.items()})
    return path


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    """The workdir that the command makes of it."""
    workdir = tmp_path_factory.mktemp("converted") / "run"
    arguments = [str(checkpoint), str(workdir), f"--heads={HEADS}", "--config.eval.short_side=64"]
    assert main.main(["convert", *arguments]) == 0
    return workdir


@pytest.mark.slow
def test_a_checkpoint_becomes_a_workdir_that_segments(checkpoint, converted):
    segmenter = zegformer_jax.load(converted)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    result = segmenter(image, ["sheep", "sofa, couch", "tree"])
    assert result.labels.shape == (60, 80) and set(np.unique(result.labels)) <= {0, 1, 2}
    assert result.vocabulary.seen == (True, True, False)  # couch and sheep are COCO's seen classes
    config = load_config(converted)
    assert config.model.transformer.queries == 10 and config.clip.source == "clip"
    summary = (converted / CONVERTED_FILE).read_text()
    assert str(checkpoint) in summary and "left out" in summary


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_back_to_a_checkpoint_is_exact(checkpoint, converted, tmp_path, suffix):
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"again{suffix}"
    text = convert(converted, path, config_of(), with_clip=True)
    expected, actual = read_tensors(checkpoint), read_tensors(path)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name].reshape(tensor.shape), tensor, err_msg=name)
    assert f"{len(expected):,} tensors" in text


def test_without_clip_the_checkpoint_has_none(converted, tmp_path):
    convert(converted, tmp_path / "again.npz", config_of())
    assert not any(name.startswith(CLIP) for name in read_tensors(tmp_path / "again.npz"))


@pytest.mark.parametrize("flags, has_clip", [([], False), (["--with-clip"], True)])
def test_the_command_writes_clip_when_told(converted, tmp_path, flags, has_clip):
    path = tmp_path / "again.npz"
    assert main.main(["convert", str(converted), str(path), *flags]) == 0
    assert any(name.startswith(CLIP) for name in read_tensors(path)) == has_clip


def test_training_does_not_go_on_in_a_converted_workdir(converted, capsys):
    arguments = [f"--config={COCO}", f"--workdir={converted}"]
    assert main.main(["train", *arguments]) == 1
    assert "holds converted weights" in capsys.readouterr().err


def test_a_destination_that_is_taken_is_left_alone(checkpoint, converted, capsys):
    before = sorted(converted.rglob("*"))
    assert main.main(["convert", str(checkpoint), str(converted)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert sorted(converted.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["save_config", "save_clip"])
def test_a_conversion_that_fails_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys, stage):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(conversion, stage, fail)
        arguments = ["convert", str(checkpoint), str(tmp_path / "run"), f"--heads={HEADS}"]
        assert main.main(arguments) == 1
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    assert main.main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {"clip", "checkpoints", "experiment.json"} <= {x.name for x in tmp_path.glob("run/*")}


def random_resnet(seed=0):
    """A small ResNet as torchvision names it, and the same arrays by our paths."""
    model = ResNet(blocks=(1, 1, 1, 1), stem_width=8, bottleneck_width=8, stage_width=16)
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    shapes = tables.shapes_of({kind: {"backbone": tree} for kind, tree in variables.items()})
    rng = np.random.default_rng(seed)
    arrays = {path: rng.uniform(0.5, 1, shape).astype(np.float32) for path, shape in shapes.items()}
    tensors = {}
    for path, array in arrays.items():
        _, _, *layer, part, leaf = path.split("/")
        name = torchvision_names("/".join(layer))["kernel" if part == "conv" else leaf]
        tensors[name] = array.transpose(3, 2, 0, 1) if part == "conv" else array
    return tensors | {"fc.weight": np.zeros((10, 128)), "fc.bias": np.zeros(10)}, arrays


def test_a_backbone_becomes_detectron2s(tmp_path, capsys):
    tensors, arrays = random_resnet()
    write_pth(tmp_path / "resnet.pth", tensors)
    path = tmp_path / "backbone.safetensors"
    assert main.main(["convert", str(tmp_path / "resnet.pth"), str(path)]) == 0
    assert "ImageNet's classifier" in capsys.readouterr().out
    written = read_tensors(path)
    assert "stem.conv1.norm.running_var" in written and "fc.weight" not in written
    again = tables.flatten(read_start(path).variables)
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.slow
def test_a_training_starts_from_a_backbones_file(finished, tmp_path):
    tensors, arrays = random_resnet()
    write_pth(tmp_path / "resnet.pth", tensors)
    config = shrunk.beside(finished.workdir)
    config.unlock().model.backbone.norm = "frozen_batch"
    config.model.start_from = str(tmp_path / "resnet.pth")

    def first_variables():
        experiment = Experiment.open(config, tmp_path / "run")
        init = jax.jit(open_objective(experiment).init)
        return start_from(experiment, init(jax.random.key(0)))

    flat = tables.flatten(first_variables())
    for path, array in arrays.items():
        np.testing.assert_array_equal(flat[path], array)
    config.model.backbone.stem_width = 16
    with pytest.raises(ValueError, match=r"resnet.pth: its params/.*model.backbone differ"):
        first_variables()


@pytest.mark.slow
def test_a_maskformer_checkpoint_is_a_start_and_no_model(golden, tmp_path):
    weights = {
        name: np.asarray(x, np.float32)
        for name, x in golden("segmenter_weights").items()
        if not name.endswith("bg_feature") and "projection_layer" not in name
    }
    weights.pop("sem_seg_head.predictor.logit_scale")
    weights["sem_seg_head.predictor.class_embed.weight"] = np.zeros((134, 32), np.float32)
    weights["sem_seg_head.predictor.class_embed.bias"] = np.zeros(134, np.float32)
    write_pth(tmp_path / "maskformer.pth", weights)
    with pytest.raises(ValueError, match="start_from"):
        convert(tmp_path / "maskformer.pth", tmp_path / "run", config_of(), heads=HEADS)
    assert not (tmp_path / "run").exists()
    start = read_start(tmp_path / "maskformer.pth")
    assert "class_projection" not in start.variables["params"]
    assert {"backbone", "pixel_decoder", "transformer"} <= set(start.variables["params"])


@pytest.mark.slow
def test_a_clip_becomes_a_directory(finished, tmp_path, capsys):
    arguments = [str(finished.workdir / "clip"), str(tmp_path / "clip")]
    assert main.main(["convert", *arguments]) == 0
    assert "CLIP:" in capsys.readouterr().out
    before = read_tensors(finished.workdir / "clip" / "model.safetensors")
    after = read_tensors(tmp_path / "clip" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("nothing.pth", None, "nothing.pth: no such file"),
        ("nothing", None, "nothing: no CLIP here"),
        ("text.pth", b"some words", "text.pth: "),
        ("cut.pth", b"PK\x03\x04 cut short", "cut.pth: "),
        ("drive.pth", b"<!DOCTYPE html><html>", "drive.pth: a web page, not weights"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main.main(["convert", str(path), str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_an_image_file_is_no_source(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert main.main(["convert", str(tmp_path / "image.png"), str(tmp_path / "run")]) == 1
    assert "image.png" in capsys.readouterr().err


FULL_SIZE = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}


def random_checkpoint(name, with_clip):
    """A full-size checkpoint in the authors' layout, with random weights of a sane size."""
    config = importlib.import_module("configs.coco_stuff").get_config(name)
    sizes = config.model.to_dict() | {"embed_dim": 512}
    rng = np.random.default_rng(0)

    def draw(path, shape):
        if path.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        fan_in = max(int(np.prod(shape[:-1])), 1)
        return (rng.standard_normal(shape, np.float32) / np.sqrt(fan_in)).astype(np.float32)

    arrays = {path: draw(path, shape) for path, shape in zegformer.shapes(sizes).items()}
    tensors = zegformer.to_checkpoint(tables.unflatten(arrays), sizes)
    if with_clip:
        shapes = parameter_shapes(CLIPS["ViT-B/16"])
        flat = {path: draw(path, shape) for path, shape in shapes.items()}
        flat["logit_scale"] = np.float32(np.log(100))
        inside = published_tensors(tables.unflatten(flat), CLIPS["ViT-B/16"], OPENAI)
        tensors |= {CLIP + key: tensor for key, tensor in inside.items()}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("name, with_clip", [("r50", True), ("r101", False)])
def test_full_size_there_and_back(tmp_path, name, with_clip):
    tensors = random_checkpoint(name, with_clip)
    write_pth(tmp_path / "model.pth", tensors)
    config = importlib.import_module("configs.coco_stuff").get_config(name).unlock()
    config.model.transformer.queries = 3  # the checkpoint's sizes win
    summary = convert(tmp_path / "model.pth", tmp_path / "run", config)
    assert "left out" in summary
    converted = load_config(tmp_path / "run")
    assert tuple(converted.model.backbone.blocks) == FULL_SIZE[name]
    assert converted.model.transformer.queries == 100
    convert(tmp_path / "run", tmp_path / "again.safetensors", config, with_clip=with_clip)
    again = read_tensors(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key].reshape(tensor.shape), tensor, err_msg=key)


@pytest.fixture(scope="module")
def small_config(converted, tmp_path_factory):
    """Returns a config with the golden model's sizes, on a folder of small images."""
    folder = make_folder(tmp_path_factory.mktemp("images"))
    config = load_config(converted).unlock()
    config.dataset.update(name="folder", directory=str(folder), vocabulary="")
    config.eval.update(vocabularies=(), batch_size=2, oracles=False)
    return config.lock()


@pytest.mark.slow
def test_a_checkpoints_file_is_evaluated_as_its_workdir_is(checkpoint, converted, small_config):
    source = open_checkpoint(str(checkpoint), partial(Experiment.open, small_config))
    assert str(source.results) == str(checkpoint.parent / "evaluation" / "zegformer.pth")
    evaluator = Evaluator(source.experiment, source.variables)
    result = loop.evaluate(source.experiment, evaluator=evaluator, progress=False)
    expected = loop.evaluate(Experiment.open(small_config, converted), progress=False)
    assert result.images == 3 and result.states.keys() == expected.states.keys()
    for key, matrix in expected.states.items():
        assert matrix.sum() > 0
        np.testing.assert_array_equal(result.states[key], matrix)


@pytest.mark.slow
def test_the_clip_inside_a_checkpoint_takes_other_image_sizes(checkpoint, small_config):
    config = small_config.copy_and_resolve_references().unlock()
    open_experiment = partial(Experiment.open, config)
    size = open_checkpoint(str(checkpoint), open_experiment).experiment.clip.config.image_size
    config.clip.input_size = 2 * size
    clip = open_checkpoint(str(checkpoint), open_experiment).experiment.clip
    assert clip.config.image_size == 2 * size and clip.config.grid_size**2 + 1 == len(
        clip.params["visual"]["position_embedding"]
    )


def evaluate_error(capsys, *flags):
    """The line that evaluation of a bad checkpoint ends with."""
    assert main.main(["evaluate", f"--config={COCO}", *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_checkpoint_of_other_sizes_names_the_fields(checkpoint, capsys):
    line = evaluate_error(
        capsys, f"--checkpoint={checkpoint}", f"--config.model.transformer.heads={HEADS}"
    )
    assert f"{checkpoint}: has other sizes than the config" in line
    assert "model.transformer.queries is 10, not 100" in line and "heads" not in line
    assert "the config's variant" in line and "zegformer convert" in line


def test_files_that_are_no_checkpoint_of_a_model(checkpoint, tmp_path, capsys):
    write_pth(tmp_path / "resnet.pth", random_resnet()[0])
    line = evaluate_error(capsys, f"--checkpoint={tmp_path}/resnet.pth")
    assert "resnet.pth: not a whole model" in line and "--config.model.start_from=" in line
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:1000])
    assert "cut.pth" in evaluate_error(capsys, f"--checkpoint={tmp_path}/cut.pth")
    assert "none.pth: no such checkpoint" in evaluate_error(capsys, "--checkpoint=none.pth")


@pytest.fixture
def run_of_two_steps(tmp_path):
    workdir = tmp_path / "run"
    with Checkpoints(workdir) as checkpoints:
        for step in (7, 12):
            state = {"params": {"x": np.full(3, step, np.float32)}, "constants": {}, "ema": {}}
            checkpoints.save(step, state)
    return workdir


@pytest.mark.parametrize("ending", ["", "/"])
def test_one_step_of_a_run_is_read(run_of_two_steps, monkeypatch, ending):
    monkeypatch.chdir(run_of_two_steps)
    for step in (7, 12):
        open_experiment = partial(Experiment.open, config_of())
        source = open_checkpoint(f"checkpoints/{step}{ending}", open_experiment)
        assert source.variables["params"]["x"].tolist() == [step] * 3
        assert str(source.experiment.workdir) == str(run_of_two_steps)
        assert str(source.results) == f"{run_of_two_steps}/evaluation/step_{step}"


@pytest.mark.parametrize(
    "place, words",
    [
        ("checkpoints/8", "no such checkpoint; there is 7, 12"),
        ("checkpoints", "name a step's folder, WORKDIR/checkpoints/STEP (there is 7, 12)"),
        ("", "(there is 7, 12), or a file in the authors' layout; a whole workdir is --workdir"),
        ("..", "no single checkpoint: name a step's folder, WORKDIR/checkpoints/STEP, or a file"),
        ("checkpoints/12", "cannot be read, name another step"),
    ],
)
def test_places_without_a_checkpoint(run_of_two_steps, capsys, place, words):
    if place.endswith("12"):
        shutil.rmtree(run_of_two_steps / place / "state")
    path = run_of_two_steps / place
    line = evaluate_error(capsys, f"--checkpoint={path}")
    assert f"{path}: " in line and words in line, line
