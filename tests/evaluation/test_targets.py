"""Tests of the data sets an evaluation runs on, and of the requests refused before it starts."""

import json

import folders
import numpy as np
import pytest
import shrunk
from etils import epath

from configs import coco_stuff
from zegformer_jax.evaluation.targets import choose
from zegformer_jax.experiment import Experiment
from zegformer_jax.input.folder import Folder
from zegformer_jax.input.openmoji import builder as openmoji_voc
from zegformer_jax.input.records import write
from zegformer_jax.runtime.files import write_bytes
from zegformer_jax.text.vocabulary import load_vocabulary, mark_seen


@pytest.fixture
def mine(tmp_path):
    return folders.make_folder(tmp_path / "mine", train=1, validation=2)


@pytest.fixture
def any_records(monkeypatch):
    """Directories hold whatever is asked of them; returns what was opened."""
    opened = []
    monkeypatch.setattr(Experiment, "open_split", lambda *args: opened.append(args))
    return opened


def experiment_on(directory, workdir, **dataset):
    """The experiment on COCO-Stuff with its records in a directory."""
    config = coco_stuff.get_config().unlock()
    config.dataset.update(directory=str(directory), **dataset)
    return Experiment.open(config.lock(), workdir)


def as_dict(experiment):
    return json.loads(experiment.config_json)


def test_without_names_it_is_the_experiments_own(tmp_path):
    experiment = experiment_on("records", tmp_path)
    (target,) = choose("", experiment)
    assert target == ("coco_stuff", experiment, "coco_stuff", None)


def test_a_name_alone_lies_beside_the_experiments_own(tmp_path, any_records):
    for name in ("coco", "ade20k_150", "pascal_voc"):
        (tmp_path / "records" / name).mkdir(parents=True)
    experiment = experiment_on(tmp_path / "records" / "coco", tmp_path / "w")
    text = f"coco_stuff, ade20k_150,pascal_voc={tmp_path}/records/pascal_voc/"
    targets = choose(text, experiment)
    assert [(x.name, x.results) for x in targets] == [
        (name, name) for name in ("coco_stuff", "ade20k_150", "pascal_voc")
    ]
    places = [x.experiment.dataset_directory.name for x in targets]
    assert places == ["coco", "ade20k_150", "pascal_voc"]
    own, other, _ = targets
    assert as_dict(own.experiment) == as_dict(experiment) and own.trained is None
    dataset = other.experiment.dataset
    assert (dataset.name, dataset.vocabulary) == ("ade20k_150", "ade20k_150")
    assert other.trained == experiment.vocabulary
    assert any_records == [(target.experiment, "validation") for target in targets]


def test_on_its_own_data_set_elsewhere_the_experiment_is_as_it_is(tmp_path):
    config = coco_stuff.get_config().unlock()
    config.dataset.update(directory="records", all_seen=True)
    config.eval.update(vocabularies=("pascal_voc_20",), gamma=0.3)
    experiment = Experiment.open(config.lock(), tmp_path)
    there, trained = experiment.on_dataset("coco_stuff", "elsewhere")
    assert trained is None and there.dataset.directory == "elsewhere"
    assert there.eval == experiment.eval and there.eval.gamma == 0.3
    back, _ = there.on_dataset("coco_stuff", "records")
    assert as_dict(back) == as_dict(experiment)


def test_another_data_set_keeps_its_classes_and_knows_what_was_seen(tmp_path):
    experiment = Experiment.open(shrunk.get_config(), tmp_path)
    other, trained = experiment.on_dataset("ade20k_150", "records/ade")
    assert (other.dataset.name, other.dataset.vocabulary) == ("ade20k_150", "ade20k_150")
    assert other.eval.gamma == 0 and other.eval.vocabularies == ()
    assert other.build_model(8) == experiment.build_model(8)
    marked = mark_seen(load_vocabulary("ade20k_150"), trained)
    by_name = dict(zip(marked.names, marked.seen, strict=True))
    assert by_name["bicycle"] and not by_name["sofa"] and not by_name["wall"]


def test_the_clip_that_came_with_a_model_is_that_on_every_data_set(tmp_path):
    experiment = Experiment.open(shrunk.get_config(), tmp_path)
    experiment.clip = object()
    other, _ = experiment.on_dataset("ade20k_150", "records/ade")
    assert other.clip is experiment.clip


def test_two_folders_are_two_data_sets(mine, tmp_path):
    other = folders.make_folder(tmp_path / "more" / "other", train=0, validation=1)
    experiment = experiment_on(mine, tmp_path, name="folder", vocabulary="")
    targets = choose(f"folder={mine}/,folder={other}", experiment)
    assert [target.results for target in targets] == ["folder_mine", "folder_other"]
    gammas = [target.experiment.eval.gamma for target in targets]
    assert gammas == [experiment.eval.gamma, 0] and gammas[0] > 0
    assert [target.experiment.dataset.name for target in targets] == ["folder", "folder"]


def test_results_of_another_folder_of_the_same_name_are_not_replaced(mine, tmp_path):
    other = folders.make_folder(tmp_path / "more" / "mine", train=0, validation=1)
    results = epath.Path(tmp_path / "results")
    experiment = experiment_on(mine, tmp_path, name="folder", vocabulary="")
    for folder in (mine, other):
        (target,) = choose(f"folder={folder}", experiment)
        target.check_results(results)
        assert target.place == str(folder)
    write_bytes(results / "report.json", json.dumps({"data": str(mine)}).encode())
    (target,) = choose(f"folder={other}", experiment)
    with pytest.raises(ValueError, match=f"results: has the results of {mine}, and those of"):
        target.check_results(results)
    (target,) = choose(f"folder={mine}/../mine", experiment)
    target.check_results(results)


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("ade20k", ValueError, "no data set 'ade20k'; there are folder, openmoji_voc, .*ade20k_1"),
        ("ade20k=DIR/mine", ValueError, "no data set 'ade20k'; there are"),
        ("folder=", ValueError, "has 'folder=': give NAME=DIR, DIR with"),
        ("folder=DIR/none", FileNotFoundError, "'folder=.*/none': .*/none is no directory"),
        ("pascal_voc", FileNotFoundError, "'pascal_voc': .*/pascal_voc is no directory"),
        ("folder=DIR/mine,folder=DIR/mine/", ValueError, "both be written to folder_mine"),
        ("folder=DIR/mine,folder=DIR/x/mine", ValueError, "both be written to folder_mine"),
    ],
)
def test_what_is_wrong_is_told(mine, tmp_path, any_records, text, error, message):
    (tmp_path / "x" / "mine").mkdir(parents=True)
    experiment = experiment_on(tmp_path / "coco_stuff", tmp_path / "w")
    text = text.replace("DIR", str(tmp_path))
    with pytest.raises(error, match=message):
        choose(f"folder={tmp_path / 'x'},{text}", experiment)
    assert not any_records


def test_records_are_looked_at_before_any_evaluation(mine, tmp_path):
    """A directory of something else, and one with a list of classes but no pictures."""
    experiment, empty = experiment_on("coco_stuff", tmp_path), tmp_path / "empty"
    with pytest.raises(FileNotFoundError, match="no records of 'ade20k_150' are prepared here"):
        choose(f"folder={mine},ade20k_150={mine}", experiment)
    write.prepare(Folder.open(mine), mine, tmp_path / "ready", workers=1)
    with pytest.raises(ValueError, match="ready: holds the data set 'folder', not 'ade20k_150'"):
        choose(f"ade20k_150={tmp_path}/ready", experiment)
    empty.mkdir()
    (empty / "classes.json").write_bytes((mine / "classes.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="empty/validation: no such folder"):
        choose(f"folder={mine},folder={empty}", experiment)


@pytest.mark.parametrize("answer, found", [(True, True), (False, False), (OSError("no net"), True)])
def test_a_bucket_is_asked_as_far_as_it_answers(tmp_path, monkeypatch, any_records, answer, found):
    asked, make = [], epath.Path

    class Bucket(type(make("gs://x"))):
        def is_dir(self):
            asked.append(str(self))
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(epath, "Path", lambda x: Bucket(x) if "://" in str(x) else make(x))
    experiment = experiment_on("gs://data/coco_stuff", tmp_path)
    if found:
        (target,) = choose("ade20k_150", experiment)
        assert target.experiment.dataset.directory == "gs://data/ade20k_150"
    else:
        with pytest.raises(FileNotFoundError, match="gs://data/ade20k_150 is no directory"):
            choose("ade20k_150", experiment)
    assert asked == ["gs://data/ade20k_150"] and not any_records


@pytest.mark.slow
def test_the_embedded_benchmark_is_a_data_set_as_others_are(finished, tmp_path, monkeypatch):
    """Here with as few scenes as there are already."""
    make = openmoji_voc.prepare
    options = shrunk.get_config().dataset.options
    monkeypatch.setattr(openmoji_voc, "prepare", lambda data_dir: make(data_dir, **options))
    text = f"openmoji_voc={finished.workdir}/records"
    (target,) = choose(text, experiment_on("coco_stuff", tmp_path))
    source = target.experiment.open_split("validation")
    vocabulary = target.experiment.vocabulary
    assert len(source) == shrunk.VALIDATION_SCENES and len(vocabulary) == 236
    assert np.isin(source[0]["label"], [*range(236), 255]).all()
