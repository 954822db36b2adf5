"""The files that prediction writes: named after their images, and never another image's."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from zegformer_jax.cli import main
from zegformer_jax.cli.predict import Output, describe, name_outputs, save
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.segmenter import Segmentation
from zegformer_jax.text.vocabulary import Vocabulary


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with images of the same name in two folders."""
    for name in ("a/rgb.png", "b/rgb.jpg", "b/rgb.png", "b/c/rgb.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result_of(names=("cat", "sofa, couch", "deer")):
    """A segmented image of 4 pixels, three of the first class and one of the second."""
    labels = np.array([[0, 0], [0, 1]], np.int32)
    vocabulary = Vocabulary.from_names(names, [True, False, True][: len(names)])
    return Segmentation(np.zeros((2, 2, 3), np.uint8), labels, vocabulary)


def test_folders_below_the_common_one_are_mirrored(here):
    outputs = name_outputs(["a/rgb.png", str(here / "b/rgb.jpg"), "b/c/../c/rgb.png"], here / "out")
    places = [path.relative_to(here / "out").as_posix() for _, *both in outputs for path in both]
    assert places == [
        "a/rgb_overlay.png", "a/rgb_labels.png",
        "b/rgb_overlay.png", "b/rgb_labels.png",
        "b/c/rgb_overlay.png", "b/c/rgb_labels.png",
    ]  # fmt: skip
    (alone,) = name_outputs(["b/c/rgb.png"], here / "out")
    assert alone.labels == here / "out" / "rgb_labels.png"


def test_two_images_of_one_name_are_refused(here):
    message = "^b/rgb.png: b/rgb.jpg would be written to the same .*out/b/rgb_labels.png"
    with pytest.raises(UserError, match=message):
        name_outputs(["a/rgb.png", "b/rgb.jpg", "b/rgb.png"], here / "out")
    with pytest.raises(MissingFile, match="^a/none.png: no such image$"):
        name_outputs(["a/rgb.png", "a/none.png"], here / "out")


def test_files_of_another_image_are_not_replaced(here):
    """Those of the same image are, also from another folder."""
    (output,) = name_outputs(["a/rgb.png"], here / "out")
    save(result_of(), output)
    before = {path: path.read_bytes() for path in (output.overlay, output.labels)}
    message = "rgb_labels.png: is of ../a/rgb.png, and b/rgb.jpg would replace it: name another"
    with pytest.raises(UserError, match=message):
        name_outputs(["b/rgb.jpg"], here / "out")
    assert before == {path: path.read_bytes() for path in before}
    save(result_of(("dog", "boat")), name_outputs([str(here / "a/rgb.png")], here / "out")[0])
    shutil.copy("b/rgb.jpg", output.overlay)
    with pytest.raises(UserError, match="rgb_overlay.png: was not written by this command, and"):
        name_outputs(["a/rgb.png"], here / "out")


def test_written_labels_are_the_results(here):
    output = Output("a/rgb.png", here / "out" / "o.png", here / "out" / "l.png")
    save(result_of(), output)
    with Image.open(output.labels) as image:
        np.testing.assert_array_equal(np.asarray(image), [[0, 0], [0, 1]])
    assert describe(result_of(), output).splitlines() == [
        " 75.0 %  cat (seen, label 0)",
        " 25.0 %  sofa, couch (unseen, label 1)",
        "no pixel: deer",
        f"written: {output.overlay}, l.png",
    ]


def run(capsys, *arguments):
    assert main.main(["predict", *map(str, arguments)]) == 0
    return capsys.readouterr()


@pytest.mark.slow
def test_what_runs_is_said_beside_the_results(finished, here, capsys):
    flags = f"--workdir={finished.workdir}", "--classes=cat, sheep, deer", "--output=out"
    out, err = run(capsys, "a/rgb.png", "b/rgb.jpg", *flags)
    assert re.fullmatch(
        r"devices: \d+ x cpu\n"
        rf"model: {finished.workdir}, step 3 of 3\n"
        rf"CLIP: {finished.workdir}/clip\n"
        r"classes: 3, of which the training had 2\n"
        r"note: this model was trained on OpenMoji drawings and does not know photographs,"
        r"[^\n]*docs/images.md[^\n]*\n"
        r"compiling ...\n",
        err.replace("\n  ", " "),  # long lines are broken
    ), err
    lines = out.splitlines()
    assert lines[0] == "a/rgb.png:" and "b/rgb.jpg:" in lines
    assert lines[-1] == "written: out/b/rgb_overlay.png, rgb_labels.png"
    assert len(list(here.glob("out/*/rgb_*.png"))) == 4


@pytest.mark.slow
def test_a_larger_image_than_pillow_allows_is_taken_when_told(finished, here, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    flags = f"--workdir={finished.workdir}", "--classes=cat", "--output=out"
    assert main.main(["predict", "a/rgb.png", *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a/rgb.png: more than 1,000 pixels" in line and not (here / "out").exists()
    assert "100.0 %  cat" in run(capsys, "a/rgb.png", *flags, "--max-pixels=1440").out
