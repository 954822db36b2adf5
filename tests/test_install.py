"""The wheel: installed in an environment of its own, it runs without the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import zegformer_jax
from zegformer_jax.cli.main import COMMANDS

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("zegformer_jax", "configs", "data")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing of an earlier build gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        shutil.copytree(REPOSITORY / name, folder / "source" / name, ignore=ignored)
    for name in FILES:
        shutil.copy(REPOSITORY / name, folder / "source")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, folder / "source")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel.

    Its dependencies are those of the environment that runs the tests, by a path to them; the
    package comes from the wheel alone.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    dependencies = Path(packages.stdout.strip()) / "dependencies.pth"
    dependencies.write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}

    def call(program, *arguments):
        return run(folder / "env" / "bin" / program, *arguments, cwd=folder, env=environment)

    return SimpleNamespace(folder=folder, call=call)


def test_the_wheel_holds_the_package_its_data_and_its_configs(wheel):
    def files(folder):
        paths = (path for path in (REPOSITORY / folder).rglob("*") if path.is_file())
        return {str(x.relative_to(REPOSITORY)) for x in paths if "__pycache__" not in x.parts}

    expected = files("zegformer_jax")
    expected |= {f"zegformer_jax/assets/{name}" for name in files("configs") | files("data")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_nothing_comes_from_the_repository(installed):
    code = "import importlib.util, sys, zegformer_jax; from zegformer_jax.runtime import assets\n"
    code += "print(zegformer_jax.__file__, assets.ROOT, zegformer_jax.__version__, sep='\\n')\n"
    code += "print(importlib.util.find_spec('configs'), *sys.path, sep='\\n')"
    package, root, version, spec, *path = installed.call("python", "-P", "-c", code).stdout.split()
    assert Path(package).is_relative_to(installed.folder)
    assert Path(root).is_relative_to(installed.folder) and root.endswith("zegformer_jax/assets")
    assert version == zegformer_jax.__version__
    assert spec == "None" and str(REPOSITORY) not in path


def test_the_command_lists_its_commands(installed):
    out = installed.call("zegformer", "--help").stdout
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_it_trains_two_steps_by_a_users_config(installed, finished):
    """The config file imports the package's own configs."""
    shutil.copy(REPOSITORY / "tests" / "support" / "shrunk.py", installed.folder / "mine.py")
    flags = [f"--config.dataset.directory={finished.workdir}/records", "--config.train.steps=2"]
    out = installed.call(
        "zegformer", "train", "--config=mine.py:clip", "--workdir=run", *flags
    ).stdout
    assert out.splitlines()[-1].startswith("run: finished, 2 steps, loss ")
    assert (installed.folder / "run" / "experiment.json").is_file()


def test_the_packages_configs_are_found_from_any_folder(installed):
    code = "from zegformer_jax.cli import config; c = config.load('configs/coco_stuff.py:r50')\n"
    code += "print(c.dataset.name, *c.model.backbone.blocks)"
    assert installed.call("python", "-P", "-c", code).stdout == "coco_stuff 3 4 6 3\n"


def test_it_segments_an_image(installed, finished):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)
    Image.fromarray(pixels).save(installed.folder / "image.png")
    flags = ["--classes=sheep, cat", f"--workdir={finished.workdir}", "--output=out"]
    out = installed.call("zegformer", "predict", "image.png", *flags).stdout
    assert out.splitlines()[-1] == "written: out/image_overlay.png, image_labels.png"
    with Image.open(installed.folder / "out" / "image_labels.png") as labels:
        assert labels.size == (36, 40) and set(np.unique(labels)) <= {0, 1}
