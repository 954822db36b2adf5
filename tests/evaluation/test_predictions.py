"""Label maps on disk, read back by Pillow, by hand and by COCO's own tools."""

import json

import cv2
import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from etils import epath
from folders import CLASSES, make_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from toy_experiment import LEVELS, Records, ToyExperiment

from zegformer_jax.cli.evaluate import evaluate_on
from zegformer_jax.evaluation import loop
from zegformer_jax.evaluation.checkpoint import Source
from zegformer_jax.evaluation.evaluation import Interrupted
from zegformer_jax.evaluation.report.coco import (
    class_segments,
    connected_segments,
    encode_segments,
    make_categories,
    number_images,
)
from zegformer_jax.evaluation.report.predictions import (
    KINDS,
    LabelMapWriter,
    parse_kinds,
    write_label_png,
    write_segment_png,
)
from zegformer_jax.evaluation.resume import ResumeFile
from zegformer_jax.evaluation.targets import Target
from zegformer_jax.input.decoding import LABEL_MODES
from zegformer_jax.input.folder import Folder
from zegformer_jax.runtime import processes
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import load_vocabulary

label_maps = hnp.arrays(
    np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 2)
)


def run_lengths(text):
    """The run lengths in COCO's text: base 32, 48 the digit 0, differences to the last but one."""
    runs, place = [], 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            digit = ord(text[place]) - 48
            value |= (digit & 31) << shift
            place, shift, more = place + 1, shift + 5, bool(digit & 32)
            if not more and digit & 16:
                value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def decode(rle):
    """Writes the runs pixel by pixel: down the first column, then the next, from 0 on."""
    height, width = rle["size"]
    mask = np.zeros((height, width), bool)
    place = 0
    for turn, count in enumerate(run_lengths(rle["counts"])):
        for _ in range(count):
            mask[place % height, place // height] = turn % 2 == 1
            place += 1
    assert place == height * width
    return mask


def test_run_lengths_by_hand():
    """The second segment's columns are 0 1 1, 1 0 0."""
    first, second = encode_segments(np.array([[1, 2], [2, 1], [2, 1]]))
    assert second == {"size": [3, 2], "counts": "132"}  # and 2 is 1 + 1
    assert run_lengths(first["counts"]) == [0, 1, 3, 2]
    (whole,) = encode_segments(np.ones((2, 3), int))
    assert run_lengths(whole["counts"]) == [0, 6]


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_run_lengths_are_those_of_pycocotools(labels):
    segments = class_segments(labels)
    encoded = json.loads(json.dumps(encode_segments(segments.ids_hw)))
    for index, rle in zip(segments.classes_s, encoded, strict=True):
        np.testing.assert_array_equal(decode(rle), labels == index)
        theirs = coco_mask.encode(np.asfortranarray(labels == index, np.uint8))
        assert rle["counts"] == theirs["counts"].decode() and rle["size"] == list(theirs["size"])


@given(label_maps)
def test_segments_are_connected_components(labels):
    """OpenCV finds the same ones; the segments are numbered without gaps."""
    ids, classes = connected_segments(labels)
    assert np.unique(ids).tolist() == list(range(1, len(classes) + 1))
    np.testing.assert_array_equal(classes[ids - 1], labels)
    for index in range(3):
        count, components = cv2.connectedComponents(np.uint8(labels == index), connectivity=8)
        pairs = set(zip(components[labels == index], ids[labels == index], strict=True))
        assert len(pairs) == count - 1 == np.count_nonzero(classes == index)


def test_components_touch_at_corners():
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]])
    ids, classes = connected_segments(labels)
    assert classes.tolist() == [0, 1, 1]
    assert ids.tolist() == [[2, 1, 1], [1, 2, 1], [1, 1, 1], [3, 1, 1]]


@pytest.mark.parametrize(
    "ids, numbers",
    [
        (["000000000139", "000000000285"], [139, 285]),
        (["2007_000032", "2007_000033"], [1, 2]),  # Python reads these as numbers, too
        (["01", "1"], [1, 2]),
        (["12", "street/1"], [1, 2]),
        (["12", "٣"], [1, 2]),
        (["1", "20240101123456789012"], [1, 2]),  # more than 64 bits
        ([], []),
    ],
)
def test_images_are_numbered_by_their_own_numbers_where_they_have_some(ids, numbers):
    assert number_images(ids) == numbers


@pytest.mark.parametrize(
    "dataset, vocabulary, known",
    [
        ("coco_stuff", "coco_stuff_171", {"person": 1, "traffic light": 10, "toothbrush": 90}),
        ("ade20k_150", "ade20k_150", {"wall": 1, "sky": 3, "flag": 150}),
        ("pascal_voc", "pascal_voc_20", {"aeroplane": 1, "tvmonitor": 20}),
        ("pascal_voc_20b", "pascal_voc_20b", {"aeroplane": 1, "bicycle": 2}),
        ("pascal_context_459", "pascal_context_459", {"accordion": 1, "aeroplane": 2}),
        ("ade20k_full", "ade20k_full_847", {"wall": 2978}),
    ],
)
def test_categories_have_the_data_sets_own_ids(dataset, vocabulary, known):
    categories = make_categories(load_vocabulary(vocabulary), dataset)
    ids = {category["name"]: category["id"] for category in categories}
    assert known.items() <= ids.items() and len(set(ids.values())) == len(categories)


def test_categories_of_a_folder_have_the_ids_of_its_classes(tmp_path):
    vocabulary = Folder.open(make_folder(tmp_path / "mine", train=1, validation=1)).classes
    categories = make_categories(vocabulary, "folder")
    assert [(x["id"], x["name"]) for x in categories] == [(x["id"], x["name"]) for x in CLASSES]


@pytest.fixture
def evaluate(tmp_path):
    """Evaluates as the command does; returns the folder of the results."""

    def run(kinds, source=None):
        experiment = ToyExperiment(source or Records(), batch_size=2)
        folder = epath.Path(tmp_path / "out")
        target = Target("words", experiment, "words")
        evaluate_on(target, Source(experiment, folder), folder, parse_kinds(kinds))
        return tmp_path / "out"

    return run


def maps_of(source):
    """The label maps that the toy model makes, by id: each class is taken for the next."""
    maps = [(image[..., 0].astype(int) // LEVELS + 1) % 3 for image in source.images]
    return dict(zip(source.ids, maps, strict=True))


def open_results(folder, kind):
    """Opens a list of results as COCO's users do."""
    return COCO(str(folder / "images_and_categories.json")).loadRes(str(folder / f"{kind}.json"))


def assert_results(folder, source, kind="rle"):
    """Asserts that pycocotools finds every label map."""
    results, maps = open_results(folder, kind), maps_of(source)
    images = {image["file_name"]: image for image in results.dataset["images"]}
    assert images.keys() == maps.keys()
    assert {x["id"]: x["name"] for x in results.loadCats(results.getCatIds())} == {
        0: "a",
        1: "b",
        2: "c",
    }
    for id_, labels in maps.items():
        image = images[id_]
        assert (image["height"], image["width"]) == labels.shape
        painted = np.full(labels.shape, -1)
        for result in results.loadAnns(results.getAnnIds(image["id"])):
            mask = results.annToMask(result) == 1
            assert result["score"] == 1 and result["area"] == mask.sum()
            assert np.all(painted[mask] == -1), "segments overlap"
            painted[mask] = result["category_id"]
        np.testing.assert_array_equal(painted, labels)


@pytest.mark.parametrize("kind", ["rle", "instances"])
def test_cocos_tools_load_the_results(evaluate, kind):
    source = Records()
    folder = evaluate(kind, source)
    assert_results(folder, source, kind)
    results = json.loads((folder / f"{kind}.json").read_text("utf-8"))
    assert (
        {type(x["image_id"]) for x in results} == {type(x["category_id"]) for x in results} == {int}
    )
    pairs = [(x["image_id"], x["category_id"]) for x in results]
    assert (len(set(pairs)) == len(pairs)) is (kind == "rle")
    assert not list(folder.glob("partial*")) and (folder / "report.json").exists()


def test_images_with_numbers_keep_them(evaluate):
    folder = evaluate("rle", Records(3, prefix="00000000013"))
    assert open_results(folder, "rle").getImgIds() == [130, 131, 132]


def test_cocos_evaluation_of_right_instances_is_perfect(evaluate, capsys):
    source = Records(3)
    folder = evaluate("instances", source)
    truth = json.loads((folder / "images_and_categories.json").read_text("utf-8"))
    truth["annotations"], numbers = [], {x["file_name"]: x["id"] for x in truth["images"]}
    for id_, labels in maps_of(source).items():
        for index in range(3):
            count, components = cv2.connectedComponents(np.uint8(labels == index))
            for component in range(1, count):
                mask = components == component
                rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
                annotation = {"id": 1 + len(truth["annotations"]), "image_id": numbers[id_]}
                annotation |= {"category_id": index, "segmentation": rle, "iscrowd": 0}
                truth["annotations"].append(annotation | {"area": int(mask.sum())})
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    scores = COCOeval(coco, coco.loadRes(str(folder / "instances.json")), "segm")
    for step in (scores.evaluate, scores.accumulate, scores.summarize):
        step()
    assert scores.stats[0] == pytest.approx(1)


def test_the_panoptic_form_gives_back_the_label_maps(evaluate):
    """As in COCO's specification: a PNG's pixel is a segment of the JSON."""
    source = Records()
    folder = evaluate("panoptic", source)
    content = json.loads((folder / "panoptic.json").read_text("utf-8"))
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert names == {0: "a", 1: "b", 2: "c"}
    assert all(category["isthing"] == 1 for category in content["categories"])
    assert len(content["annotations"]) == len(images) == len(source)
    for annotation in content["annotations"]:
        with Image.open(folder / "panoptic" / annotation["file_name"]) as picture:
            assert picture.mode == "RGB"
            red, green, blue = np.moveaxis(np.asarray(picture, int), -1, 0)
        ids = red + 256 * green + 256**2 * blue
        categories = {x["id"]: x["category_id"] for x in annotation["segments_info"]}
        assert len(categories) == len(annotation["segments_info"])
        assert set(np.unique(ids)) == set(categories) and 0 not in categories
        labels = maps_of(source)[images[annotation["image_id"]]["file_name"]]
        np.testing.assert_array_equal(np.vectorize(categories.get)(ids), labels)


def test_ids_of_segments_fill_three_channels(tmp_path):
    write_segment_png(tmp_path / "a" / "1.png", np.array([[1, 255, 256], [65535, 65536, 70000]]))
    with Image.open(tmp_path / "a" / "1.png") as picture:
        assert np.asarray(picture).tolist() == [
            [[1, 0, 0], [255, 0, 0], [0, 1, 0]],
            [[255, 255, 0], [0, 0, 1], [112, 17, 1]],
        ]


@pytest.mark.parametrize("kinds", ["rle", "png,rle,instances,panoptic"])
def test_an_evaluation_that_was_interrupted_has_all_results(evaluate, monkeypatch, kinds):
    source, written, write = Records(), [], LabelMapWriter.__call__

    def stop(self, id_, labels_hw):
        written.append(id_)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(self, id_, labels_hw)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(LabelMapWriter, "__call__", stop)
        evaluate(kinds, source)

    monkeypatch.setattr(LabelMapWriter, "__call__", lambda *x: [written.append(x[1]), write(*x)])
    folder = evaluate(kinds, source)
    assert sorted(written[:2] + written[3:]) == sorted(source.ids)
    assert_results(folder, source)
    assert not list(folder.glob("partial*"))
    if "png" in kinds:
        for kind in ("png", "panoptic"):
            assert {path.stem for path in (folder / kind).iterdir()} == set(source.ids)


def test_an_interrupted_evaluation_leaves_the_results_of_the_one_before(evaluate, monkeypatch):
    folder = evaluate("rle")
    before = (folder / "rle.json").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(LabelMapWriter, "finish", stop)
        patched.setattr(loop, "add", stop)
        evaluate("rle", Records(4, prefix="s"))
    assert (folder / "rle.json").read_bytes() == before
    evaluate("rle", Records(4, prefix="s"))
    assert_results(folder, Records(4, prefix="s"))


@pytest.fixture
def as_process(evaluate, monkeypatch):
    """Evaluates as one of two processes, which neither add their counts nor wait for each other."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop, "sum_over_processes", lambda tree: tree)
    monkeypatch.setattr(processes, "wait_for_all", lambda reason: None)

    def run(index):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        return evaluate("rle", Records())

    return run


def test_the_first_of_two_processes_joins_what_both_wrote(as_process):
    folder = as_process(1)
    (parts,) = folder.iterdir()
    assert parts.name.startswith("partial_") and len(list(parts.iterdir())) == 2
    as_process(0)
    assert_results(folder, Records())
    assert not parts.exists()


def test_processes_that_share_no_folder_are_told(as_process):
    with pytest.raises(UserError, match="out: 3 of 5 images are in partial_.*: name an --output"):
        as_process(0)


def test_kinds_of_files(tmp_path):
    assert parse_kinds("png, rle,instances ,panoptic,") == KINDS and parse_kinds("") == ()
    message = "--predictions: no 'jpg'; choose of png, rle, instances, panoptic"
    with pytest.raises(UserError, match=message):
        parse_kinds("png,jpg")


def test_label_maps_are_files_by_id(tmp_path):
    labels = np.array([[0, 1], [1, 1]], np.uint8)
    folder, resume = epath.Path(tmp_path / "out"), ResumeFile(tmp_path)
    writer = LabelMapWriter(folder, ["png"], [], resume)
    writer("street/1", labels)
    writer.finish(1)
    assert [path.name for path in folder.iterdir()] == ["png"]
    with Image.open(tmp_path / "out" / "png" / "street" / "1.png") as image:
        np.testing.assert_array_equal(np.asarray(image), labels)


@pytest.mark.parametrize(
    "dtype, most, mode",
    [
        ("uint8", 255, "L"),
        ("uint16", 3, "I;16"),
        ("uint16", 65535, "I;16"),
        ("int32", 255, "L"),
        ("int64", 256, "I;16"),
    ],
)
def test_labels_are_read_back_from_png(tmp_path, dtype, most, mode):
    labels = np.array([[0, 1, 2], [3, most, 0]], dtype)
    path = tmp_path / "a" / "b.png"
    write_label_png(path, labels)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == mode in LABEL_MODES
        np.testing.assert_array_equal(np.asarray(picture), labels)
    assert [item.name for item in path.parent.iterdir()] == ["b.png"]


@pytest.mark.parametrize("label", [-1, 65536])
def test_labels_that_no_png_holds_are_told(tmp_path, label):
    with pytest.raises(ValueError, match=rf"b.png: labels .*{label}.*0\.\.65535"):
        write_label_png(tmp_path / "b.png", np.array([[0, label]]))
    assert not list(tmp_path.iterdir())
