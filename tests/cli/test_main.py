"""The commands in process: what they print, and one line and exit status 1 for every bad input."""

import json
import re
import shutil
from argparse import Namespace

import folders
import jax
import numpy as np
import pytest
import shrunk
from PIL import Image

from zegformer_jax.cli import config as config_flags
from zegformer_jax.cli import demo, demo_stages, main
from zegformer_jax.cli.predict import parse_classes, read_classes
from zegformer_jax.evaluation.report import files, predictions
from zegformer_jax.experiment.data import open_split
from zegformer_jax.experiment.workdir import load_config, load_variables, save_config
from zegformer_jax.runtime.errors import UserError

ROOT = config_flags.ROOT
OPENMOJI = f"--config={ROOT}/configs/openmoji.py"
COCO = f"--config={ROOT}/configs/coco_stuff.py"
MINE = f"--config={ROOT}/configs/folder.py:tiny"
SHRUNK = f"--config={ROOT}/tests/support/shrunk.py"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder; whatever appears in it was written by the command."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def error_of(arguments, capsys, here, status=1):
    """The line on standard error of a command that must fail and write nothing."""
    assert main.main([str(x) for x in arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("zegformer: ")
    assert not any(here.iterdir()), "something was written"
    return line.removeprefix("zegformer: ")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", OPENMOJI, "--workdir=w", "--config.train.step=1"], ["did you mean train.steps"]),
        (["train", OPENMOJI, "--workdir=w", "--config.train.steps=many"], ["steps", "many"]),
        (["train", OPENMOJI + ":vit", "--workdir=w"], ["openmoji.py:vit", "clip, classifier"]),
        (["train", "--config=configs/none.py", "--workdir=w"], ["configs/none.py", "no such"]),
        (["train", OPENMOJI, "--workdir=w"], ["w/per_pixel: no such file", "model.start_from"]),
        (
            ["train", OPENMOJI, "--workdir=w", "--config.model.start_from="],
            ["w/clip: no CLIP here", "let zegformer demo train", f"in {demo.WORKDIR}/clip"],
        ),
        (
            ["train", MINE, "--workdir=w"],
            ["no such file or workdir", "let zegformer demo train", f"in {demo.WORKDIR}"],
        ),
        (
            ["train", MINE, "--workdir=w", "--config.model.start_from="],
            ["mine: no such folder, neither here nor in w", "--config.dataset.directory=DIR"],
        ),
        (
            ["train", COCO, "--workdir=w", "--config.model.start_from="],
            ["frozen_batch", "norm=gro"],
        ),
        (["evaluate", OPENMOJI, "--workdir=w"], ["w: no checkpoint here: train"]),
        (["evaluate", OPENMOJI, "--workdir=w", "--config.eval.typo=1"], ["no field eval.typo"]),
        (["evaluate", "--workdir=w"], ["w: no trained model here"]),
        (["evaluate", "--checkpoint=model.pth"], ["model.pth: in no workdir", "--config"]),
        (["predict", "x.png", "--classes=cat", "--workdir=w"], ["w: no trained model here"]),
        (["predict", "x.png", "--classes-file=c.txt", "--workdir=w"], ["c.txt"]),
    ],
)
def test_bad_commands(arguments, words, capsys, here):
    line = error_of(arguments, capsys, here)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["name a command: demo, train, evaluate, predict"]),
        (["trian"], ["no command 'trian'; did you mean train?"]),
        (["xyz"], ["no command 'xyz', only demo, train"]),
        (["train", "--workdir=w"], ["zegformer train: ", "required: --config", "train --help"]),
        (["train", OPENMOJI], ["required: --workdir"]),
        (["train", OPENMOJI, "--workdir=w", "--wrong=1"], ["--wrong=1"]),
        (["train", OPENMOJI, "--workdir=w", "--change_config"], ["--change_config"]),
        (["train", OPENMOJI, "--workdir=w", "--change"], ["--change"]),
        (["train", OPENMOJI, "--workdir=w", "word"], ["word"]),
        (["evaluate", OPENMOJI], ["--workdir --checkpoint is required"]),
        (["evaluate", OPENMOJI, "--workdir=w", "--checkpoint=c"], ["not allowed with"]),
        (["predict", "x.png"], ["--classes --classes-file is required"]),
        (["predict", "x.png", "--classes=a", "--config=c.py"], ["--config=c.py"]),
        (["demo", "--seed=one"], ["--seed", "'one'"]),
    ],
)
def test_a_misused_command_line_is_exit_status_2(arguments, words, capsys, here):
    line = error_of(arguments, capsys, here, status=2)
    assert all(word in line for word in words), line


def test_help_lists_the_commands_with_their_summaries(capsys):
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "  train     Trains a model.\n" in out and "ZEGFORMER_CACHE=DIR" in out
    assert all(f"\n  {name} " in out for name in main.COMMANDS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_each_command_has_help_with_examples(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main.main([name, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: zegformer {name} ")
    examples = out.partition("\nExamples:\n")[2]
    assert examples.startswith(f"  zegformer {name}")
    assert max(map(len, out.splitlines())) <= 100
    assert "_" not in "".join(word for word in out.split() if word.startswith("--")).split("=")[0]


def fail(error):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize("error", [UserError("x.json: cut off"), PermissionError(13, "no", "x")])
def test_an_error_that_the_user_can_mend_is_one_line(error, capsys, monkeypatch, here):
    monkeypatch.setattr(demo, "run", fail(error))
    assert "x" in error_of(["demo"], capsys, here)
    monkeypatch.setenv("ZEGFORMER_DEBUG", "1")
    with pytest.raises(type(error)):
        main.main(["demo"])


@pytest.mark.parametrize("kind", [KeyError, AttributeError, ValueError, TypeError])
def test_a_bug_keeps_its_traceback(kind, monkeypatch):
    monkeypatch.setattr(demo, "run", fail(kind("a bug")))
    with pytest.raises(kind, match="a bug"):
        main.main(["demo"])


@pytest.mark.parametrize(
    "text, names",
    [
        ("sheep, cat,sofa", ["sheep", "cat", "sofa"]),
        ('sheep, "sofa, couch", cat', ["sheep", "sofa, couch", "cat"]),
        ('"a ""big"" dog"', ['a "big" dog']),
        ("  cat  ", ["cat"]),
        ("", []),
        ("sheep\ncat, sofa\r\n\ndog\n", ["sheep", "cat", "sofa", "dog"]),
    ],
)
def test_quotes_hold_synonyms_together(text, names):
    assert parse_classes(text) == names


@pytest.mark.parametrize("text", ['cat, "sofa, couch', 'bo"at, cat', '"sofa" bed', '"a\nb"'])
def test_a_quote_that_is_not_closed_is_no_part_of_a_name(text):
    with pytest.raises(UserError, match="--classes: a double quote in '.*' is not closed or stan"):
        parse_classes(text)


@pytest.mark.parametrize(
    "name, content, names",
    [
        ("words.txt", "\ufeffsheep\n\n sofa, couch \n", ["sheep", "sofa, couch"]),
        ("words.txt", '"sofa, couch"\r\ncat\n', ["sofa, couch", "cat"]),
        ("voc.JSON", '["sheep", "cat"]', ["sheep", "cat"]),
        ("voc.json", '\ufeff[{"name": "sheep"}]', ["sheep"]),
    ],
)
def test_files_of_classes(tmp_path, name, content, names):
    (tmp_path / name).write_text(content, "utf-8")
    options = Namespace(classes=None, classes_file=str(tmp_path / name))
    assert read_classes(options) == names


@pytest.mark.parametrize(
    "content, message",
    [
        (b'cat\n"sofa, couch\n', "line 2 is no class name: '\"sofa, couch'"),
        (b"sheep\n1\tboat\n", r"line 2 is no class name: '1\\tboat'; give one class a line"),
        (b'["sheep", "cat"]', r"line 1 is no class name: .* JSON in a file that ends in .json"),
        ("sheep\n".encode("utf-16"), "words.txt: text in UTF-16, as it seems.*iconv -f UTF-16"),
        ("sheep\n".encode("utf-16-le"), "words.txt: text in UTF-16"),
        (b"sheep\ncaf\xe9\n", "words.txt: line 2: text in ISO-8859-1"),
        (b"\n \n", "words.txt: the list of classes is empty"),
        (
            b"sofa, couch\n\nCouch, sofa\n",
            "words.txt: 'sofa, couch' and 'Couch, sofa' are one class",
        ),
    ],
)
def test_files_that_hold_no_classes(tmp_path, content, message):
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_classes(Namespace(classes=None, classes_file=str(tmp_path / "words.txt")))


@pytest.mark.parametrize(
    "classes, words",
    [
        ("", ["--classes: the list of classes is empty"]),
        ("cat, ,dog", ["--classes: entry 2 has an empty name"]),
        ("cat, dog, cat", ["--classes: 'cat' is listed twice (entries 1 and 3)"]),
        ("cat, dog, Cat", ["--classes: 'cat' and 'Cat' are one class in two spellings"]),
    ],
)
def test_classes_that_are_no_vocabulary(classes, words, capsys, here):
    """They are refused before the model is read."""
    line = error_of(["predict", "x.png", f"--classes={classes}", "--workdir=w"], capsys, here)
    assert all(word in line for word in words), line


@pytest.mark.slow
def test_a_missing_and_a_damaged_picture(finished, picture, tmp_path, capsys, here):
    rest = ["--classes=cat", "--workdir", finished.workdir, "--output", "out"]
    assert "none.png: no such image" in error_of(["predict", "none.png", *rest], capsys, here)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:500])
    line = error_of(["predict", damaged, *rest], capsys, here)
    assert "damaged.png: damaged or cut off" in line


@pytest.mark.slow
def test_evaluate_without_a_trained_model(finished, capsys, here, tmp_path):
    """The config is there, CLIP is there, and no checkpoint."""
    workdir = tmp_path / "untrained"
    shutil.copytree(finished.workdir / "clip", workdir / "clip")
    line = error_of(["evaluate", SHRUNK, f"--workdir={workdir}"], capsys, here)
    assert f"{workdir}: no checkpoint here: train" in line
    assert [path.name for path in workdir.iterdir()] == ["clip"]


@pytest.mark.slow
def test_training_with_another_config_names_the_field(finished, capsys, here):
    arguments = ["train", SHRUNK, f"--workdir={finished.workdir}", "--config.train.steps=7"]
    assert "train.steps was 3, is 7" in error_of(arguments, capsys, here)


@pytest.mark.slow
def test_predict_writes_what_it_says(finished, picture, capsys, here):
    arguments = ["predict", picture, "--classes", 'sheep, "sofa, couch", cat']
    arguments += ["--workdir", finished.workdir, "--output", "out"]
    assert main.main([str(x) for x in arguments]) == 0
    *areas, written = capsys.readouterr().out.splitlines()
    absent = areas.pop() if areas[-1].startswith("no pixel: ") else "no pixel: "
    assert written == "written: out/picture_overlay.png, picture_labels.png"
    assert {p.name for p in (here / "out").iterdir()} == {
        "picture_overlay.png",
        "picture_labels.png",
    }
    with Image.open(here / "out" / "picture_labels.png") as image:
        labels = np.asarray(image)
    assert labels.shape == (40, 36)
    kinds = ["sheep (unseen, label 0)", "sofa, couch (unseen, label 1)", "cat (seen, label 2)"]
    counts = np.bincount(labels.ravel(), minlength=3)
    expected = {
        f"{100 * n / labels.size:5.1f} %  {k}" for n, k in zip(counts, kinds, strict=True) if n
    }
    assert set(areas) == expected
    names = np.array(["sheep", "sofa, couch", "cat"])
    assert absent == f"no pixel: {'; '.join(names[counts == 0])}"


@pytest.mark.slow
def test_predict_changes_fields_of_eval_only(finished, picture, capsys, here):
    """With a gamma above all scores every pixel is of an unseen class."""
    arguments = ["predict", picture, "--classes=cat, sheep", "--workdir", finished.workdir]
    line = error_of([*arguments, "--output=out", "--config.seed=3"], capsys, here)
    assert "--config.seed=3: the model is trained; only fields of eval can change" in line
    arguments += ["--output=out", "--config.eval.gamma=100.0"]
    assert main.main([str(x) for x in arguments]) == 0
    assert "100.0 %  sheep (unseen, label 1)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_that_cannot_start_leaves_nothing(finished, tmp_path, capsys, here):
    """So the corrected command is not refused as another experiment."""
    start = f"--config.model.start_from={finished.workdir / 'nothing'}"
    data = f"--config.dataset.directory={finished.workdir / 'records'}"
    clip = f"--config.clip.source={finished.workdir / 'clip'}"
    arguments = ["train", SHRUNK, f"--workdir={tmp_path / 'run'}", start, data, clip]
    assert "nothing" in error_of(arguments, capsys, here)
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))


@pytest.mark.slow
def test_predict_with_a_file_of_classes(finished, picture, tmp_path, capsys, here):
    file = tmp_path / "classes.txt"
    file.write_text("sheep\n\nsofa, couch\n")
    arguments = ["predict", picture, "--classes-file", file, "--workdir", finished.workdir]
    assert main.main([str(x) for x in [*arguments, "--output", "out"]]) == 0
    *areas, last = capsys.readouterr().out.splitlines()[:-1]
    areas += [] if last.startswith("no pixel: ") else [last]
    assert areas and all("sheep (" in line or "sofa, couch (" in line for line in areas)


def unbroken(text):
    """Lines that were broken because of a long path, in one."""
    return text.replace("\n  ", " ")


@pytest.mark.slow
def test_evaluate_prints_the_scores(finished, capsys):
    workdir = finished.workdir / "per_pixel"
    assert main.main(["evaluate", f"--workdir={workdir}"]) == 0
    out, err = capsys.readouterr()
    name, heading, *rows = out.splitlines()
    origin = f"{workdir}, step 2 of 2"
    scores = ["seen", "unseen", "harmonic", "mIoU", "mIoU*", "fwIoU", "accuracy", "pixels"]
    assert name == f"openmoji_voc: {origin}" and heading.split() == [
        "vocabulary",
        "method",
        *scores,
    ]
    assert [row.split()[:-8] for row in rows[:2]] == [
        [">", "pascal_voc_20", "per_pixel"],
        ["openmoji_voc", "per_pixel"],
    ]
    for row in rows[:2]:
        result = finished.report.find(demo_stages.METHOD_NAMES["per_pixel"], row.split()[-10])
        found = dict(zip(scores, map(float, row.split()[-8:]), strict=True))
        np.testing.assert_allclose(
            [found[name] for name in scores],
            [100 * result.values[name] for name in scores],
            atol=0.051,
        )
    assert rows[-1] == f"written: {workdir}/evaluation/openmoji_voc"
    report = json.loads((workdir / "evaluation/openmoji_voc/report.json").read_text())
    assert report["data"] == str(finished.workdir / "records")
    assert report["model"] == {
        "place": str(workdir), "step": 2, "steps": 2, "finished": True,
    }  # fmt: skip
    lines = re.split(r"[\r\n]+", unbroken(err))
    assert re.fullmatch(r"devices: \d+ x cpu", lines[0]) and lines[1] == f"model: {origin}"
    assert lines[2:5] == [
        f"data: openmoji_voc in {finished.workdir}/records, 5 images (validation)",
        "vocabulary: openmoji_voc, 236 classes: 216 seen, 20 unseen",
        f"CLIP: {finished.workdir}/clip",
    ]
    assert any(line.endswith("| 0/5 images, compiling ...") for line in lines)
    assert re.search(r"\| 5/5 images(, [\d.]+ images/s, 00:00 left)?$", err.rstrip())


@pytest.mark.slow
def test_ctrl_c_leaves_a_table_that_says_it_is_partial(finished, capsys, tmp_path, monkeypatch):
    """The next run completes it, with or without a table: no counts or label map are missing."""
    workdir, written = finished.workdir / "per_pixel", []
    arguments = ["evaluate", f"{SHRUNK}:per_pixel", f"--workdir={workdir}", f"--output={tmp_path}"]
    arguments.append("--predictions=png")
    write_map, folder = predictions.LabelMapWriter.__call__, tmp_path / "openmoji_voc"

    def stop(self, id_, labels_hw):
        written.append(id_)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_map(self, id_, labels_hw)

    with monkeypatch.context() as patched:
        patched.setattr(predictions.LabelMapWriter, "__call__", stop)
        assert main.main(arguments) == 130
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == [
        f"openmoji_voc: {workdir}, step 2 of 2",
        "PARTIAL: 2 of 5 images",
    ]
    assert err.splitlines()[-1] == "zegformer: interrupted; run the same command to resume"
    report = json.loads((folder / "report.json").read_text())
    assert report["partial"] and (report["images"], report["of"]) == (2, 5)
    assert {path.stem for path in folder.glob("png/*")} == set(written[:2])

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_evaluation", fail)
        assert main.main(arguments) == 1
    assert "no space" in capsys.readouterr().err and list(folder.glob("partial*"))
    assert main.main(arguments) == 0
    assert "PARTIAL" not in capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert not report["partial"] and (report["images"], report["of"]) == (5, 5)
    expected = finished.report.find(demo_stages.METHOD_NAMES["per_pixel"], "pascal_voc_20")
    assert report["scores"][0]["pixels"] == pytest.approx(expected.values["pixels"], abs=1e-3)
    assert not list(folder.glob("partial*"))
    maps = {path.stem: path for path in folder.glob("png/*")}
    config = shrunk.get_config("per_pixel")
    source = open_split(config, workdir, "validation")
    shapes = {source[i]["id"]: source[i]["label"].shape for i in range(len(source))}
    assert maps.keys() == shapes.keys() and len(maps) == 5
    for id_, path in maps.items():
        with Image.open(path) as picture:
            assert picture.size[::-1] == shapes[id_]


@pytest.mark.slow
def test_a_model_is_evaluated_on_its_own_data_set_and_on_a_folder(finished, capsys, tmp_path):
    """One command does both: only the first has the model's own vocabularies and gamma."""
    mine, out, workdir = tmp_path / "mine", tmp_path / "out", finished.workdir / "per_pixel"
    folders.make_folder(mine, train=0, validation=3)
    text = f"--datasets=openmoji_voc,folder={mine}"
    arguments = ["evaluate", f"{SHRUNK}:per_pixel", f"--workdir={workdir}", f"--output={out}", text]
    assert main.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines if "step 2 of 2" in line] == [
        "openmoji_voc",
        "folder_mine",
    ]
    own, other = (
        json.loads((out / name / "report.json").read_text())
        for name in ("openmoji_voc", "folder_mine")
    )
    gamma = shrunk.get_config("per_pixel").eval.gamma
    assert (own["settings"]["gamma"], other["settings"]["gamma"]) == (gamma, 0) and gamma > 0
    assert (own["images"], other["images"]) == (5, 3)
    assert [row["vocabulary"] for row in own["scores"]] == ["pascal_voc_20", "openmoji_voc"]
    assert [row["vocabulary"] for row in other["scores"]] == ["folder"]
    expected = finished.report.find(demo_stages.METHOD_NAMES["per_pixel"], "pascal_voc_20")
    assert own["scores"][0]["seen"] == pytest.approx(expected.values["seen"], abs=1e-3)
    assert other["data"] == str(mine)
    another = folders.make_folder(tmp_path / "another" / "mine", train=0, validation=1)
    before = folders.files_of(out)
    arguments[-1] = f"--datasets=openmoji_voc,folder={another}"
    assert main.main(arguments) == 1
    assert f"has the results of {mine}, and those of {another} would" in capsys.readouterr().err
    assert folders.files_of(out) == before


def test_no_data_set_is_evaluated_on_if_one_is_wrong(capsys, here, tmp_path, monkeypatch):
    monkeypatch.setattr("zegformer_jax.evaluation.loop.evaluate", pytest.fail)
    folders.make_folder(tmp_path / "mine", train=0, validation=1)
    text = f"--datasets=folder={tmp_path / 'mine'},ade20k_150"
    line = error_of(["evaluate", SHRUNK, f"--workdir={tmp_path / 'w'}", text], capsys, here)
    assert line == (
        f"--datasets: 'ade20k_150': {tmp_path / 'w' / 'ade20k_150'} is no directory; give NAME=DIR"
    )


def test_the_demos_data_lie_in_its_workdir(tmp_path, here, monkeypatch):
    """Though there is a folder `data` here, as in the repository, and another beside it."""
    (here / "records").mkdir()
    (tmp_path / "records").mkdir()
    found = []

    def train(experiment):
        found.append(experiment.dataset_directory.resolve())

    def evaluate(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(demo_stages, "train", train)
    monkeypatch.setattr(demo_stages, "evaluate", evaluate)
    with pytest.raises(InterruptedError):
        main._run(["demo"])
    assert found == [here / "runs" / "openmoji" / "records"] * 4


@pytest.mark.slow
def test_train_says_what_runs_and_that_it_is_finished(finished, tmp_path, capsys):
    """A new run, one that resumes, and one that was finished before."""
    workdir, source = tmp_path / "run", finished.workdir
    arguments = [
        "train", f"{SHRUNK}:per_pixel", f"--workdir={workdir}",
        f"--config.clip.source={source / 'clip'}", "--config.train.tensorboard=False",
        f"--config.dataset.directory={source / 'records'}",
        f"--config.model.start_from={source / 'classifier'}", "--config.train.checkpoint_every=2",
    ]  # fmt: skip

    def train(steps, *flags):
        assert main.main([*arguments, f"--config.train.steps={steps}", *flags]) == 0
        out, err = capsys.readouterr()
        assert max(len(line) for line in re.split(r"[\r\n]+", err)) <= 100
        return unbroken(out).splitlines(), err

    lines, err = train(2)
    assert re.fullmatch(r"devices: \d+ x cpu", lines[0])
    parameters = sum(x.size for x in jax.tree.leaves(load_variables(workdir)["params"]))
    assert lines[1:8] == [
        f"model: per_pixel, {parameters:,} trained parameters",
        f"start weights: {source}/classifier",
        f"data: openmoji_voc in {source}/records, 16 images (train)",
        "vocabulary: openmoji_voc, 236 classes: 216 seen, 20 unseen",
        f"CLIP: {source}/clip",
        "starts at step 0 of 2, with 4 images a step",
        "compiling ...",
    ]
    assert re.fullmatch(r"compiled in \d+ s; a step: [\d.]+ GiB at its peak, .*", lines[8])
    assert re.fullmatch(rf"{workdir}: finished, 2 steps, loss \d+\.\d{{4}}", lines[9])
    last = r"\| 2/2 steps, loss \d+\.\d{3}, [\d.]+ images/s, 00:00 left$"
    assert re.search(last, err.rstrip()), err
    lines, _ = train(4, "--change-config")
    assert lines[6] == "resumes after step 2 of 4, with 4 images a step"
    lines, _ = train(4)
    assert lines[6] == "finished before, at step 4 of 4: nothing is left to train"
    assert lines[7].startswith(f"{workdir}: finished, 4 steps, loss ") and len(lines) == 8


@pytest.mark.slow
def test_a_model_that_is_not_trained_to_its_end_is_said_to_be_so(finished, tmp_path, capsys):
    workdir = tmp_path / "per_pixel"
    shutil.copytree(finished.workdir, tmp_path, dirs_exist_ok=True)
    config = load_config(workdir).unlock()
    config.train.steps = 5000
    save_config(config, workdir)
    assert main.main(["evaluate", f"--workdir={workdir}"]) == 0
    out, err = capsys.readouterr()
    origin = f"{workdir}, step 2 of 5,000: NOT TRAINED TO ITS END"
    assert out.startswith(f"openmoji_voc: {origin}\n")
    assert f"\nmodel: {origin}\n" in unbroken(err)
    report = json.loads((workdir / "evaluation/openmoji_voc/report.json").read_text())
    assert (report["model"]["step"], report["model"]["finished"]) == (2, False)


@pytest.mark.slow
def test_demo_says_where_the_result_is(finished, capsys, monkeypatch):
    shrunk_file = f"{ROOT}/tests/support/shrunk.py"
    monkeypatch.setattr(demo, "CONFIG", shrunk_file)
    assert main.main(["demo", f"--workdir={finished.workdir}"]) == 0
    out = capsys.readouterr().out
    assert f"report: {finished.workdir}/report.md" in out
    for name in demo_stages.METHOD_NAMES.values():
        assert name in out
