"""Evaluations that go on, or begin anew, with a model that takes every class for the next one."""

import json
import os
from types import SimpleNamespace

import folders
import numpy as np
import pytest
import shrunk
from array_source import ArraySource
from etils import epath

from zegformer_jax.evaluation import loop as evaluate
from zegformer_jax.evaluation.counts import OVERLAP
from zegformer_jax.evaluation.resume import Interrupted, identify_records
from zegformer_jax.evaluation.subsets import load_subsets
from zegformer_jax.input import datasets
from zegformer_jax.input.folder import Folder
from zegformer_jax.input.records import write
from zegformer_jax.text.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_names(["a", "b", "c"], [True, True, False])
RECORDS = 5


class NextClass:
    """An evaluator without a model."""

    vocabulary, shown = VOCABULARY, "per_pixel"
    subsets = load_subsets((), VOCABULARY, "words")

    def __init__(self):
        self.ids = []

    def identity(self, config):
        return config.to_json_best_effort()

    def __call__(self, batch):
        self.ids += [id_ for id_ in batch["id"].tolist() if id_]
        predictions = (batch["label"] + 1) % 3
        matrix = np.zeros((3, 3), np.int32)
        inside = batch["label"] < 3
        np.add.at(matrix, (batch["label"][inside], predictions[inside]), 1)
        sizes = np.stack([(batch["label"] == c).any((1, 2)).sum() for c in range(3)])
        overlap = np.stack([0.5 * sizes, 0.25 * sizes, sizes]).astype(np.float32)
        return {("per_pixel", "words"): matrix, OVERLAP: overlap}, predictions


class Maps:
    """Takes label maps, and interrupts at one of them."""

    def __init__(self, kinds=(), stop_at=0):
        self.kinds, self.stop_at, self.ids = kinds, stop_at, []

    def __call__(self, id_, labels_hw):
        self.ids.append(id_)
        if len(self.ids) == self.stop_at:
            raise KeyboardInterrupt


def make_source(count=RECORDS, prefix="r"):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 9 + i, 3), np.uint8) for i in range(count)]
    labels = [rng.choice([0, 1, 2, 255], (8, 9 + i)).astype(np.uint8) for i in range(count)]
    return ArraySource(images, labels, [f"{prefix}{i}" for i in range(count)])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Evaluates; gives the result, and the ids of what the model was shown."""

    def evaluate_on(source=None, keep=None, gamma=0.1):
        config = shrunk.get_config("per_pixel")
        config.eval.gamma = gamma
        evaluator, source = NextClass(), source or make_source()
        monkeypatch.setattr(evaluate, "open_split", lambda *_: source)
        arguments = dict(progress=False, keep=keep, partial=tmp_path / "partial")
        result = evaluate.run(config, epath.Path(tmp_path), evaluator, **arguments)
        return SimpleNamespace(result=result, ids=evaluator.ids)

    return evaluate_on


@pytest.fixture
def interrupted(run, tmp_path):
    """Leaves what two pictures gave; gives its file."""

    def leave(**arguments):
        before = files_of(tmp_path)
        with pytest.raises(Interrupted) as stopped:
            run(keep=Maps(arguments.pop("kinds", ()), stop_at=3), **arguments)
        assert stopped.value.result.pictures == 2
        (file,) = files_of(tmp_path) - before
        return file

    return leave


def files_of(tmp_path):
    return set((tmp_path / "partial").glob("*"))


def expected(source):
    """The counts, pixel by pixel."""
    matrix = np.zeros((3, 3), np.int64)
    for label in np.concatenate([label.ravel() for label in source.labels]):
        if label < 3:
            matrix[label, (label + 1) % 3] += 1
    return matrix


def assert_whole(ran, source):
    assert ran.result.pictures == ran.result.of == len(source)
    np.testing.assert_array_equal(ran.result.confusion["per_pixel", "words"], expected(source))
    present = sum(np.isin(range(3), label) for label in source.labels)
    np.testing.assert_array_equal(ran.result.overlap, present * [[0.5], [0.25], [1]])


def test_what_was_counted_is_not_counted_again(run, interrupted):
    file, source = interrupted(), make_source()
    ran = run(source)
    assert len(ran.ids) == RECORDS - 2
    assert_whole(ran, source)
    assert file.exists(), "the tables are not written yet"
    ran.result.finish()
    assert not file.exists()


def test_nothing_is_left_where_no_folder_is_given(run, tmp_path, monkeypatch):
    monkeypatch.setattr(NextClass, "identity", pytest.fail)  # a training's validations need none
    monkeypatch.setattr(evaluate, "open_split", lambda *_: make_source())
    config = shrunk.get_config("per_pixel")
    result = evaluate.run(config, epath.Path(tmp_path), NextClass(), progress=False)
    result.finish()
    assert result.pictures == RECORDS and not any(tmp_path.iterdir())


def test_another_config_neither_takes_nor_removes_the_file(run, interrupted):
    file = interrupted()
    content = file.read_bytes()
    second = interrupted(gamma=0.2)
    ran = run(gamma=0.3)
    assert len(ran.ids) == RECORDS
    ran.result.finish()
    assert file.read_bytes() == content and second.exists()
    ran = run(gamma=0.2)
    assert len(ran.ids) == RECORDS - 2
    ran.result.finish()
    assert file.read_bytes() == content and not second.exists()
    assert len(run().ids) == RECORDS - 2


@pytest.mark.parametrize(
    "source", [make_source(RECORDS - 1), make_source(RECORDS + 1), make_source(prefix="s")]
)
def test_other_records_begin_anew(run, interrupted, source):
    interrupted()
    ran = run(source)
    assert len(ran.ids) == len(source)
    assert_whole(ran, source)


def test_who_writes_other_files_begins_anew(run, interrupted):
    """Else the pictures that were counted before would lack theirs."""
    interrupted(kinds=("png",))
    maps = Maps(("png", "rle"))
    run(keep=maps)
    assert len(maps.ids) == RECORDS
    maps = Maps(("png",))
    run(keep=maps)
    assert len(maps.ids) == RECORDS - 2


def changed(change):
    """What writes a file again with other arrays in it."""

    def write(file):
        with np.load(file) as arrays:
            content = dict(arrays)
        change(content)
        np.savez(file, **content)

    return write


MATRIX = json.dumps(("per_pixel", "words"))
DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: os.truncate(file, file.stat().st_size // 2),
    "no archive": lambda file: file.write_bytes(b"\x00" * 5000),
    "of JSON": lambda file: file.write_text("{}"),
    "fewer records": changed(lambda x: x.update(done=x["done"][:-1])),
    "records as numbers": changed(lambda x: x.update(done=x["done"].astype(int))),
    "a smaller matrix": changed(lambda x: x.update({MATRIX: x[MATRIX][:2, :2]})),
    "a matrix of fractions": changed(lambda x: x.update({MATRIX: x[MATRIX] / 2})),
    "pickled": changed(lambda x: x.update({MATRIX: x[MATRIX].astype(object)})),
    "other classes": changed(lambda x: x.update({'["clip", "others"]': x[MATRIX]})),
    "no key": changed(lambda x: x.update({"clip": x[MATRIX]})),
    "without records": changed(lambda x: x.pop("done")),
    "without identity": changed(lambda x: x.pop("identity")),
    "of another": changed(lambda x: x.update(identity=str(x["identity"])[:12] + "0" * 52)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_was_written_is_as_none(run, interrupted, caplog, damage):
    file, source = interrupted(), make_source()
    DAMAGES[damage](file)
    ran = run(source)
    assert len(ran.ids) == RECORDS
    assert_whole(ran, source)
    assert f"{file.name}: not what an evaluation leaves" in caplog.text
    ran.result.finish()
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
            return identify_records(source, directory)

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
    """Label maps by id, without padding; of the examples, which also need truths, no more."""
    kept, made, source, make = {}, [], make_source(), evaluate.example_of
    monkeypatch.setattr(evaluate, "example_of", lambda *x: made.append(x) or make(*x))
    run(source, keep=kept.__setitem__)
    assert not made and kept.keys() == set(source.ids)
    for id_, label in zip(source.ids, source.labels, strict=True):
        np.testing.assert_array_equal(kept[id_], (label + 1) % 3)
        assert kept[id_].dtype == np.uint8
