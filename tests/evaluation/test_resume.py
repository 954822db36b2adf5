"""Evaluations that resume, or start from the beginning, with a model that shifts every class."""

import os
from types import SimpleNamespace

import folders
import numpy as np
import pytest
from toy_experiment import Records, ToyExperiment

from zegformer_jax.evaluation import loop
from zegformer_jax.evaluation.evaluation import Interrupted
from zegformer_jax.evaluation.evaluator import Evaluator
from zegformer_jax.evaluation.resume import ResumeFile
from zegformer_jax.input import datasets
from zegformer_jax.input.folder import Folder
from zegformer_jax.input.records import write

RECORDS = 5
SHIFT = "words/shift"  # key of the shown metric


@pytest.fixture
def run(tmp_path):
    """Evaluates; returns the result, the open resume file and the ids that the model saw."""

    def evaluate_on(source=None, keep=None, note="", **fields):
        experiment = ToyExperiment(source or Records(), **fields)
        evaluator, ids = Evaluator(experiment), []

        class Watched:
            plan, metrics, nothing = evaluator.plan, evaluator.metrics, evaluator.nothing
            identity = staticmethod(evaluator.identity)

            def __call__(self, batch):
                ids.extend(id_ for id_ in batch["id"].tolist() if id_)
                return evaluator(batch)

        resume = ResumeFile(tmp_path / "partial", note)
        result = loop.evaluate(
            experiment, evaluator=Watched(), keep=keep, resume=resume, progress=False
        )
        return SimpleNamespace(result=result, ids=ids, resume=resume)

    return evaluate_on


@pytest.fixture
def interrupted(run, tmp_path):
    """Interrupts after two images; returns the file that is left."""

    def leave(**arguments):
        before, kept = files_of(tmp_path), []

        def stop(id_, labels_hw):
            kept.append(id_)
            if len(kept) == 3:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted) as stopped:
            run(keep=stop, **arguments)
        assert stopped.value.evaluation.images == 2 and stopped.value.evaluation.partial
        (file,) = files_of(tmp_path) - before
        return file

    return leave


def files_of(tmp_path):
    return set((tmp_path / "partial").glob("*"))


def finish(ran):
    """Ends an evaluation as a command does once its tables are written."""
    with ran.resume:
        pass


def expected(source, shift=1):
    """The counts, pixel by pixel."""
    matrix = np.zeros((3, 3), np.int64)
    for label in np.concatenate([label.ravel() for label in source.labels]):
        if label < 3:
            matrix[label, (label + shift) % 3] += 1
    return matrix


def assert_whole(ran, source):
    assert ran.result.images == ran.result.of == len(source) and not ran.result.partial
    np.testing.assert_array_equal(ran.result.states[SHIFT], expected(source))
    np.testing.assert_array_equal(ran.result.states["words/stay"], expected(source, shift=0))
    assert ran.result.states[SHIFT].dtype == np.int64


def test_what_was_counted_is_not_counted_again(run, interrupted):
    file, source = interrupted(), Records()
    ran = run(source)
    assert len(ran.ids) == RECORDS - 2
    assert_whole(ran, source)
    assert file.exists(), "the tables are not written yet"
    with pytest.raises(OSError), ran.resume:
        raise OSError("no space for the tables")
    assert file.exists()
    finish(ran)
    assert not file.exists()


def test_nothing_is_left_where_no_file_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Evaluator, "identity", pytest.fail)  # a training's validations need none
    result = loop.Validation(ToyExperiment())({"shift": np.int32(2)})
    assert result.images == RECORDS and not any(tmp_path.iterdir())
    np.testing.assert_array_equal(result.states[SHIFT], expected(Records(), shift=2))


@pytest.mark.parametrize("changed", [{"gamma": 0.2}, {"shift": 2}, {"methods": ("shift",)}])
def test_another_model_or_config_neither_takes_nor_removes_the_file(run, interrupted, changed):
    file = interrupted()
    content = file.read_bytes()
    second = interrupted(**changed)
    ran = run(gamma=0.3)
    assert len(ran.ids) == RECORDS
    finish(ran)
    assert file.read_bytes() == content and second.exists()
    ran = run(**changed)
    assert len(ran.ids) == RECORDS - 2
    finish(ran)
    assert file.read_bytes() == content and not second.exists()
    assert len(run().ids) == RECORDS - 2


@pytest.mark.parametrize(
    "source", [Records(RECORDS - 1), Records(RECORDS + 1), Records(prefix="s")]
)
def test_other_records_start_from_the_beginning(run, interrupted, source):
    interrupted()
    ran = run(source)
    assert len(ran.ids) == len(source)
    assert_whole(ran, source)


def test_other_files_beside_the_counts_start_from_the_beginning(run, interrupted):
    """Else the images that were counted before would lack theirs."""
    interrupted(note="png")
    assert len(run(note="png,rle").ids) == RECORDS
    assert len(run(note="png").ids) == RECORDS - 2


def test_counts_are_saved_in_between(run, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_SAVES", 0.0)
    done = []
    save = ResumeFile.save
    monkeypatch.setattr(
        ResumeFile, "save", lambda self, x: [done.append(int(x.done.sum())), save(self, x)]
    )
    ran = run()
    assert done == [2, 4, 5] and len(files_of(tmp_path)) == 1
    finish(ran)
    assert not files_of(tmp_path)


def changed(change):
    """Returns a function that changes the arrays in a file."""

    def write(file):
        with np.load(file) as arrays:
            content = dict(arrays)
        change(content)
        np.savez(file, **content)

    return write


MATRIX, DONE = "arr_0", "arr_2"  # the states of "words/shift" and "words/stay", then the records
DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: os.truncate(file, file.stat().st_size // 2),
    "no archive": lambda file: file.write_bytes(b"\x00" * 5000),
    "of JSON": lambda file: file.write_text("{}"),
    "fewer records": changed(lambda x: x.update({DONE: x[DONE][:-1]})),
    "records as numbers": changed(lambda x: x.update({DONE: x[DONE].astype(int)})),
    "a smaller matrix": changed(lambda x: x.update({MATRIX: x[MATRIX][:2, :2]})),
    "a matrix of fractions": changed(lambda x: x.update({MATRIX: x[MATRIX] / 2})),
    "pickled": changed(lambda x: x.update({MATRIX: x[MATRIX].astype(object)})),
    "another metric": changed(lambda x: x.update(arr_9=x[MATRIX])),
    "a metric less": changed(lambda x: x.pop(MATRIX)),
    "without records": changed(lambda x: x.pop(DONE)),
    "without key": changed(lambda x: x.pop("key")),
    "of another": changed(lambda x: x.update(key=str(x["key"])[:12] + "0" * 52)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_ignored(run, interrupted, caplog, damage):
    file, source = interrupted(), Records()
    DAMAGES[damage](file)
    ran = run(source)
    assert len(ran.ids) == RECORDS
    assert_whole(ran, source)
    assert f"{file.name}: no partial evaluation" in caplog.text
    finish(ran)
    assert not file.exists()


def test_records_are_told_apart_without_decoding_them(tmp_path, monkeypatch):
    """A folder's by its files; prepared ones by a hash of theirs."""
    mine = folders.make_folder(tmp_path / "mine", train=1, validation=2)
    label = mine / "validation" / "annotations" / "001.png"
    prepared = [tmp_path / name for name in ("first", "again", "changed")]

    def identify(directory):
        vocabulary = Folder.open(mine).classes
        source = datasets.open_source(
            "folder", "validation", data_dir=directory, vocabulary=vocabulary
        )
        with monkeypatch.context() as patched:
            patched.setattr(type(source), "__getitem__", pytest.fail)
            return source.fingerprint()

    for directory in prepared[:2]:
        write.prepare(Folder.open(mine), mine, directory, workers=1)
    before = identify(mine)
    assert identify(mine) == before
    folders.Image.new("L", folders.Image.open(label).size, 3).save(label)
    assert identify(mine) != before
    write.prepare(Folder.open(mine), mine, prepared[2], workers=1)
    first, again, other = map(identify, prepared)
    assert first == again != other


def test_only_what_is_asked_for_is_cut_out_of_a_batch(run, monkeypatch):
    """Label maps by id, without padding; examples, which also need labels, only if asked for."""
    kept, made, source, make = {}, [], Records(), loop._Run._example
    monkeypatch.setattr(loop._Run, "_example", lambda *x: made.append(x) or make(*x))
    run(source, keep=kept.__setitem__)
    assert not made and kept.keys() == set(source.ids)
    for id_, image in zip(source.ids, source.images, strict=True):
        np.testing.assert_array_equal(kept[id_], (image[..., 0] // 50 + 1) % 3)
        assert kept[id_].dtype == np.uint8
