"""Files of a user that are damaged: every command ends in one line that names the file."""

import json

import numpy as np
import pytest
from clips import RESNET, VIT, random_params
from folders import make_folder
from ml_collections import ConfigDict

from configs import openmoji
from zegformer_jax.cli import main
from zegformer_jax.experiment.workdir import load_variables
from zegformer_jax.input.records import read
from zegformer_jax.pretrained.clip import load
from zegformer_jax.runtime.checkpoints import Checkpoints
from zegformer_jax.runtime.errors import UserError, reading
from zegformer_jax.text.tokenizer import Tokenizer
from zegformer_jax.text.word_vectors import load_word_vectors
from zegformer_jax.training.log import METRICS_FILE, read_metrics

CONFIG = json.loads(openmoji.get_config().to_json_best_effort())
DAMAGED_JSON = [b"", b'{"a": 1', b"\xff\xfe{}", b"[1, 2]", b"null", b"7", b"[" * 100_000]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line_of(capsys, *arguments):
    """The one line that a command ends with."""
    assert main.main([str(x) for x in arguments]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and len(line) < 1000
    return line


WITHOUT_LOSS = json.dumps({k: v for k, v in CONFIG.items() if k != "loss"}).encode()
WITH_TYPO = json.dumps(CONFIG | {"loss": CONFIG["loss"] | {"typo": 1}}).encode()


@pytest.mark.parametrize("content", [*DAMAGED_JSON, WITHOUT_LOSS])
def test_the_config_of_a_workdir(content, here, capsys):
    (here / "experiment.json").write_bytes(content)
    line = line_of(capsys, "predict", "x.png", "--classes=cat", "--workdir=.")
    assert "experiment.json: " in line
    line = line_of(capsys, "train", "--config=configs/openmoji.py:clip", "--workdir=.")
    assert "experiment.json: " in line


@pytest.mark.parametrize(
    "section, field, value, message",
    [
        ("eval", "gamma", "0.3", "EvalSettings: gamma is '0.3'; its type is float"),
        ("train", "steps", 2.5, "TrainSettings: steps is 2.5; its type is int"),
        ("train", "remat", 1, "TrainSettings: remat is 1; its type is bool"),
        ("input", "short_sides", [48, "x"], "InputSettings: short_sides is (48, 'x')"),
        ("optimiser", "learning_rate", float("nan"), "OptimiserSettings: learning_rate is nan"),
    ],
)
def test_fields_of_another_type_in_a_config(section, field, value, message, here, capsys):
    content = CONFIG | {section: CONFIG[section] | {field: value}}
    (here / "experiment.json").write_text(json.dumps(content))
    line = line_of(capsys, "predict", "x.png", "--classes=cat", "--workdir=.")
    assert f"experiment.json: {message}" in line


def test_a_config_of_another_version(here, capsys):
    (here / "experiment.json").write_bytes(WITH_TYPO)
    line = line_of(capsys, "predict", "x.png", "--classes=cat", "--workdir=.")
    assert "LossSettings: the config has an unknown field 'typo'" in line


@pytest.mark.parametrize("content", [*DAMAGED_JSON, b'{"classes": [3]}', b'{"classes": {}}'])
def test_a_vocabulary(content, here, capsys):
    (here / "c.json").write_bytes(content)
    assert "c.json: " in line_of(capsys, "predict", "x.png", "--classes-file=c.json")
    folder = make_folder(here / "mine")
    (folder / "classes.json").write_bytes(content)
    flags = f"--source={folder}", f"--destination={here / 'records'}"
    assert "classes.json: " in line_of(capsys, "prepare", "folder", *flags)


def test_a_list_of_classes_in_another_encoding(here, capsys):
    (here / "c.txt").write_bytes("canapé".encode("latin-1"))
    line = line_of(capsys, "predict", "x.png", "--classes-file=c.txt")
    assert "c.txt: line 1: text in ISO-8859-1, as it seems, and not in UTF-8; convert it" in line


@pytest.fixture
def vit(here):
    load.save_clip(here / "clip", VIT, random_params(VIT), Tokenizer.openai(VIT.context_length))
    return here / "clip"


@pytest.fixture
def resnet(here):
    tokenizer = Tokenizer.openai(RESNET.context_length)
    load.save_clip(here / "clip", RESNET, random_params(RESNET), tokenizer)
    return here / "clip"


def as_json(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    return json.dumps(fields).encode()


VIT_DAMAGE = [
    lambda fields: fields.update(text_config=7),
    lambda fields: fields["vision_config"].update(hidden_size="wide"),
    lambda fields: fields["vision_config"].update(num_attention_heads=0),
    lambda fields: fields["vision_config"].update(num_hidden_layers=0),
    lambda fields: fields.update(projection_dim=-1),
]


@pytest.mark.parametrize("content", DAMAGED_JSON)
def test_a_config_of_clip(content, vit, capsys):
    (vit / "config.json").write_bytes(content)
    assert "config.json: " in line_of(capsys, "convert", vit, "out")


@pytest.mark.parametrize("change", VIT_DAMAGE)
def test_fields_of_a_config_of_clip(change, vit, capsys):
    (vit / "config.json").write_bytes(as_json(vit / "config.json", change))
    assert "config.json: " in line_of(capsys, "convert", vit, "out")


RESNET_DAMAGE = [
    lambda fields: fields.update(model_cfg=[1]),
    lambda fields: fields["model_cfg"].update(vision_cfg=7),
    lambda fields: fields["model_cfg"]["vision_cfg"].update(head_width=0),
    lambda fields: fields["model_cfg"]["vision_cfg"].update(width="wide"),
    lambda fields: fields["model_cfg"]["vision_cfg"].update(width=0),
    lambda fields: fields["model_cfg"]["vision_cfg"].update(layers=[1, 2]),
    lambda fields: fields.update(preprocess_cfg={"mean": "grey"}),
]


@pytest.mark.parametrize("change", RESNET_DAMAGE)
def test_fields_of_a_config_of_open_clip(change, resnet, capsys):
    path = resnet / "open_clip_config.json"
    path.write_bytes(as_json(path, change))
    assert "open_clip_config.json: " in line_of(capsys, "convert", resnet, "out")


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x81\xa1a", b"text", b"\x07"])
def test_flax_weights_of_clip(content, vit, capsys):
    (vit / "model.safetensors").unlink()
    (vit / "flax_model.msgpack").write_bytes(content)
    assert "flax_model.msgpack: " in line_of(capsys, "convert", vit, "out")


@pytest.mark.parametrize("content", [*DAMAGED_JSON[1:], b'{"name": "x", "splits": {}}'])
def test_the_summary_of_prepared_records(content, tmp_path):
    (tmp_path / read.INFO_FILE).write_bytes(content)
    with pytest.raises(UserError, match=rf"{read.INFO_FILE}: "):
        read.read_info(tmp_path)


@pytest.mark.parametrize("line", [b'{"step": 1', b"[1]", b"\xff", b'{"loss": 1}', b""])
def test_the_metrics_of_a_run(line, tmp_path):
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1, "loss": 2}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"{METRICS_FILE}: damaged"):
        read_metrics(tmp_path)
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1, "loss": 2}\n{"step"')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2}]  # a line that a killed run began


@pytest.mark.parametrize("size", [0, 30, 300])
def test_word_vectors_that_are_cut_short(size, tmp_path):
    path = tmp_path / "words.npz"
    np.savez(path, names=np.array(["cat"]), vectors=np.ones((1, 300)))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="words.npz: damaged"):
        load_word_vectors(path, ["cat"])


def test_a_checkpoint(tmp_path):
    variables = {"params": {"x": np.arange(1000.0)}, "constants": {}, "ema": {}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, variables)
    for path in (tmp_path / "checkpoints" / "3" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="checkpoints/3: cannot be read"):
        load_variables(tmp_path)


def test_only_errors_of_parsing_are_turned_into_one_line():
    with pytest.raises(UserError, match=r"^a.json: damaged \(KeyError: 'x'\): get it again$"):
        with reading("a.json", "get it again"):
            {}["x"]
    with pytest.raises(UserError, match="^more exact$"), reading("a.json", ""):
        raise UserError("more exact")
    with pytest.raises(PermissionError), reading("a.json", ""):
        raise PermissionError(13, "denied", "a.json")
    with pytest.raises(KeyboardInterrupt), reading("a.json", ""):
        raise KeyboardInterrupt


def test_a_saved_config_is_read_back(tmp_path):
    (tmp_path / "experiment.json").write_text(json.dumps(CONFIG))
    from zegformer_jax.experiment import Experiment

    experiment = Experiment.open(None, tmp_path)
    expected = Experiment.open(ConfigDict(CONFIG), tmp_path)
    assert (experiment.loss, experiment.eval) == (expected.loss, expected.eval)
