"""A day in a user's life: own photographs, from the first command to COCO's tools.

The messages alone say how the folder is mended; the test does what they say and nothing else.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import shrunk
from flax import traverse_util
from PIL import Image
from pycocotools.coco import COCO

from configs import folder
from zegformer_jax.cli import main
from zegformer_jax.cli.config import ROOT

TRAIN, VALIDATION = 8, 3
HEIGHT, WIDTH = 48, 64
FORGOTTEN = "IMG_004"  # the photograph that nobody labelled
TRAINING = ["train", f"--config={ROOT}/configs/folder.py:tiny", "--workdir=runs/mine"]


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """The current folder of a user who ran the demo, with photographs and masks of 0 and 255."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "openmoji").symlink_to(finished.workdir)
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VALIDATION)):
        for kind in ("images", "annotations"):
            (tmp_path / "mine" / split / kind).mkdir(parents=True)
        for index in range(count):
            image, mask = make_photograph(rng)
            image.save(tmp_path / "mine" / split / "images" / f"IMG_{index:03d}.jpg")
            mask.save(tmp_path / "mine" / split / "annotations" / f"IMG_{index:03d}.png")
    (tmp_path / "mine" / "train" / "annotations" / f"{FORGOTTEN}.png").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_photograph(rng):
    """A red disc before blurred colours, with noise; and its mask of 0 and 255."""
    colours = Image.fromarray(rng.integers(40, 160, (6, 8, 3), np.uint8))
    pixels_hw3 = np.array(colours.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float64)
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    centre_y, centre_x = rng.integers(15, HEIGHT - 15), rng.integers(15, WIDTH - 15)
    disc_hw = np.hypot(y - centre_y, x - centre_x) < rng.integers(8, 14)
    pixels_hw3[disc_hw] = (220, 60, 50)
    pixels_hw3 += rng.normal(0, 8, pixels_hw3.shape)
    image = Image.fromarray(pixels_hw3.clip(0, 255).astype(np.uint8))
    return image, Image.fromarray(np.where(disc_hw, 255, 0).astype(np.uint8))


def shrinking():
    """Flags that give the config the sizes of the shrunk demo's models, and few steps."""
    small, usual = (
        traverse_util.flatten_dict(module.get_config().model.to_dict(), sep=".")
        for module in (shrunk, folder)
    )
    sizes = {f"model.{name}": value for name, value in small.items() if value != usual[name]}
    del sizes["model.start_from"]
    sizes |= {"input.crop_size": 64, "input.batch_size": 4, "eval.short_side": 48}
    sizes |= {"train.steps": 3, "train.log_every": 1}
    return [f"--config.{name}={value}" for name, value in sizes.items()]


def follow_advice(line):
    """Does what an error message says."""
    classes = Path("mine/classes.json")
    if match := re.search(r"^mine/classes.json: no such file; .* such as (\{.*\}): ", line):
        classes.write_text(match[1])
        return
    if match := re.search(r"^mine/(\w+)/annotations/(\w+).png: no such file .* take its", line):
        Path(f"mine/{match[1]}/images/{match[2]}.jpg").unlink()
        return
    content = json.loads(classes.read_text())
    if match := re.search(r"id (\d+) in \d+ of \d+ annotations; .* else list its class", line):
        content["classes"].append({"id": int(match[1]), "name": "background"})
    else:
        match = re.search(r"no pixel shows '(\w+)' .* give it \"id\": (\d+) in classes.json", line)
        (shown,) = (item for item in content["classes"] if item["name"] == match[1])
        shown["id"] = int(match[2])
    classes.write_text(json.dumps(content))


def read_masks(folder):
    """Every image's class ids by its name, from COCO's files as its tools read them."""
    truth = COCO(folder / "images_and_categories.json")
    results = truth.loadRes(str(folder / "rle.json"))
    maps = {}
    for number, image in truth.imgs.items():
        segments = results.loadAnns(results.getAnnIds(number))
        masks = [results.annToMask(segment) for segment in segments]
        np.testing.assert_array_equal(np.sum(masks, 0), 1)  # each pixel has one class
        ids = [segment["category_id"] for segment in segments]
        maps[image["file_name"]] = np.einsum("nhw,n->hw", np.int64(masks), ids)
    return {category["name"]: id_ for id_, category in truth.cats.items()}, maps


def read_labels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def run(capsys, *arguments):
    """Runs a command; returns its exit status, output and last line on standard error."""
    status = main.main(arguments)
    out, err = capsys.readouterr()
    return status, out, err.splitlines()[-1] if err else ""


@pytest.mark.slow
def test_own_photographs_from_the_first_command_to_cocos_tools(here, capsys):
    training, advice = [*TRAINING, *shrinking()], []
    status, out, line = run(capsys, *training)
    while status:
        assert (status, out) == (1, "") and not Path("runs/mine/experiment.json").exists()
        advice.append(line.removeprefix("zegformer: "))
        assert len(advice) <= 4, "the advice does not help"
        follow_advice(advice[-1])
        status, out, line = run(capsys, *training)
    assert len(advice) == 4 and "runs/mine: finished, 3 steps, loss " in out

    status, out, _ = run(capsys, "evaluate", "--workdir=runs/mine", "--predictions=rle")
    results = Path("runs/mine/evaluation/folder")
    assert status == 0 and f"written: {results}" in out
    categories, maps = read_masks(results)
    assert categories == {"boat": 255, "background": 0}
    truth = {path.stem: read_labels(path) for path in Path("mine/val/annotations").iterdir()}
    assert maps.keys() == truth.keys() and len(maps) == VALIDATION
    right = np.mean([maps[name] == truth[name] for name in maps])
    report = json.loads((results / "report.json").read_text())
    (row,) = (row for row in report["scores"] if row["name"] == report["shown"])
    assert row["pixels"] == pytest.approx(right, abs=1e-6)

    image, classes = "mine/val/images/IMG_001.jpg", "--classes-file=mine/classes.json"
    status, out, _ = run(capsys, "predict", image, classes, "--workdir=runs/mine")
    folder = Path("runs/mine/predictions")
    assert status == 0 and f"written: {folder}/IMG_001_overlay.png" in out
    assert (folder / "IMG_001_overlay.png").exists()
    labels_hw = np.array([255, 0])[read_labels(folder / "IMG_001_labels.png")]
    assert np.mean(labels_hw == maps["IMG_001"]) > 0.99  # batches round otherwise
