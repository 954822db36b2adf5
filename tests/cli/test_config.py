"""The flags `--config` and `--config.FIELD`: config files from anywhere, fields by their types."""

import argparse
import importlib
import re
import subprocess
import sys

import pytest

from configs import base
from zegformer_jax.cli import config
from zegformer_jax.runtime.errors import MissingFile, UserError

COCO = "configs/coco_stuff.py"


@pytest.fixture
def coco():
    return config.load(COCO)


@pytest.mark.parametrize("variant", ["", "r50", "per_pixel", "swin_t,supervised"])
def test_the_projects_configs_are_found_from_any_folder(variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    loaded = config.load(f"{COCO}:{variant}" if variant else COCO)
    expected = importlib.import_module("configs.coco_stuff").get_config(*filter(None, [variant]))
    assert loaded.to_dict() == expected.to_dict() and loaded.is_locked
    assert sys.path == path_before


def test_a_users_file_goes_first_and_imports_the_projects_base(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / COCO).write_text(
        "def get_config():\n"
        "    from configs import base\n"
        "    config = base.get_config().unlock()\n"
        "    config.seed = 77\n"
        "    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = config.load(COCO)
    assert loaded.seed == 77 and loaded.is_locked


@pytest.mark.slow
def test_without_the_repository_on_the_path(tmp_path):
    """Config files import `configs`, which is no top-level package in an installed copy."""
    code = (
        "import importlib.util, pathlib, sys; from zegformer_jax.cli import config\n"
        "sys.path = [x for x in sys.path if not pathlib.Path(x, 'configs').is_dir()]\n"
        "assert importlib.util.find_spec('configs') is None\n"
        f"print(config.load('{COCO}:r50').dataset.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(config.ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "coco_stuff\n", done.stderr


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("train.steps=7", 7),
        ("train.steps=1_000", 1000),
        ("seed=-1", -1),
        ("eval.gamma=1", 1.0),
        ("eval.gamma=1e-3", 1e-3),
        ("eval.flip=true", True),
        ("eval.flip=false", False),
        ("eval.more_short_sides=(400, 500)", (400, 500)),
        ("eval.more_short_sides=400,500", (400, 500)),
        ("eval.more_short_sides=400", (400,)),
        ("eval.more_short_sides=()", ()),
        ("eval.vocabularies=ade20k_150", ("ade20k_150",)),
        ("dataset.directory=gs://b/x=y", "gs://b/x=y"),
        ("dataset.directory=", ""),
        ("word_vectors=a", None),
    ],
)
def test_values_are_of_their_fields_types(coco, argument, expected):
    if expected is None:
        argument, expected = f"model.{argument}", "a"
    config.override(coco, [f"--config.{argument}"])
    value = coco
    for name in argument.partition("=")[0].split("."):
        value = value[name]
    assert value == expected and type(value) is type(expected)


def test_of_the_same_field_twice_the_last_value_stays(coco):
    config.override(coco, ["--config.seed=1", "--config.train.steps=5", "--config.seed=2"])
    assert (coco.seed, coco.train.steps) == (2, 5)
    config.override(
        coco, ["--config.eval.more_short_sides=1,2", "--config.eval.more_short_sides=3"]
    )
    assert coco.eval.more_short_sides == (3,)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("train.step=5", "no field train.step; did you mean train.steps?"),
        ("trian.steps=5", "no field trian.steps; did you mean train.steps?"),
        ("learning_rate=1", "no field learning_rate; did you mean optimiser.learning_rate?"),
        ("zzz=5", "no field zzz; configs/base.py lists all fields"),
        ("train=5", "train is a section; give one of its fields, such as --config.train."),
        ("train.steps", "--config.train.steps: write --config.train.steps=VALUE"),
        ("train.steps=many", "--config.train.steps=many: give a whole number, such as 60000"),
        ("train.steps=1.5", "--config.train.steps=1.5: give a whole number"),
        ("eval.gamma=x", "--config.eval.gamma=x: give a number, such as 0.1"),
        ("eval.flip=maybe", "--config.eval.flip=maybe: give true or false"),
    ],
)
def test_a_wrong_field_or_value_says_what_to_write(coco, argument, message):
    before = coco.to_dict()
    with pytest.raises(UserError) as error:
        config.override(coco, [f"--config.{argument}"])
    assert str(error.value).startswith(message)
    assert coco.to_dict() == before


@pytest.mark.parametrize(
    "name, message",
    [
        ("configs/none.py", "configs/none.py: no such config file; the project's are configs/ade"),
        ("configs/base.py:r50", "configs/base.py:r50: this config has no variants"),
        ("README.md", "a config file's name ends in .py"),
        ("zegformer_jax/_version.py", "has no function get_config"),
    ],
)
def test_files_that_are_no_configs(name, message):
    with pytest.raises(UserError, match=message) as error:
        config.load(name)
    assert isinstance(error.value, MissingFile) == ("no such" in message)


def test_fields_with_a_space_are_no_positional_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    config.add_arguments(parser, default=COCO)
    options = config.parse(parser, ["--config.eval.more_short_sides=(1, 2)", "a.pth"])
    assert options.source == "a.pth"
    assert config.read(options).eval.more_short_sides == (1, 2)


def test_help_names_every_field():
    text = config.describe_fields()
    named = set(re.findall(r"[a-z]\w*(?:\.\w+|\.\*)*", text.partition("):\n")[2]))
    fields = {name for name, _ in config._fields(base.get_config())}
    whole = {f"{name.rpartition('.')[0]}.*" for name in fields} & named
    assert whole == {"model.backbone.*"}
    assert named - whole - {"dataset.options.*"} == {
        name for name in fields if not name.startswith("model.backbone.")
    }
    assert max(map(len, text.splitlines())) <= 100


def test_help_names_the_fields_of_the_sections_that_are_read():
    text = config.describe_fields(["eval"])
    assert "  eval.vocabularies, " in text and "eval.top_segments" in text
    assert "train." not in text and "seed" not in text
