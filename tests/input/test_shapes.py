"""Labels as COCO's JSON or labelme's polygons, prepared as the label maps that they draw."""

import copy
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from folders import files_of
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from zegformer_jax.cli import main
from zegformer_jax.input import datasets
from zegformer_jax.input.folder import Folder, read_classes
from zegformer_jax.input.records import plan
from zegformer_jax.input.records.read import PreparedSource
from zegformer_jax.runtime.errors import UserError

HEIGHT, WIDTH = 20, 30
CLASSES = {"classes": [{"name": "sky"}, {"name": "Sofa, couch"}, {"name": "cat"}]}
SKY, SOFA, CAT, IGNORED = 0, 1, 2, 255


def rectangle(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def runs_of(mask):
    """Uncompressed run lengths down the columns, counted pixel by pixel."""
    runs, value = [0], False
    for pixel in mask.ravel(order="F"):
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def compressed(mask):
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return runs["counts"].decode()


def star():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:9, 11] = mask[6, 8:15] = True
    return mask


def coco_content():
    """Two images with polygons of two parts, a hole's outline, and run lengths of both kinds."""
    size = [HEIGHT, WIDTH]
    segmentations = [
        (1, "sky", [rectangle(0, 0, WIDTH, 12)]),
        (1, "COUCH", [[3.2, 4.1, 17.9, 5.3, 9.4, 18.8], rectangle(20, 2, 26.5, 9)]),
        (1, "cat", {"size": size, "counts": runs_of(star())}),
        (2, "cat", {"size": size, "counts": compressed(~star())}),
        (2, "sky", [rectangle(-3, -2, 5, 40)]),
    ]
    names = {"cat": 7, "sky": 3, "COUCH": 90}
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
            {"id": 2, "file_name": "inner/b.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": names[name], "segmentation": x}
            for i, (image, name, x) in enumerate(segmentations, 1)
        ],
        "categories": [{"id": id_, "name": name} for name, id_ in names.items()],
    }


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save_image(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def coco(tmp_path):
    """A folder as labelling tools export COCO."""
    root = tmp_path / "mine"
    for name in ("a.png", "inner/b.png"):
        save_image(root / "train/images" / name)
    write_json(root / "classes.json", CLASSES)
    write_json(root / "annotations/train.json", coco_content())
    return root


def labelme_content(*shapes, **fields):
    items = [{"label": label, "points": x, "shape_type": kind} for label, kind, x in shapes]
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {"version": "5.5.0", "shapes": items, "imageData": "AAAA"} | size | fields


@pytest.fixture
def labelme(tmp_path):
    """A folder of one image with labelme's file beside it."""
    root = tmp_path / "mine"
    save_image(root / "train/images/a.png")
    write_json(root / "classes.json", CLASSES)
    shapes = ("sky", "rectangle", [[0, 0], [30, 12]]), ("couch", "rectangle", [[9, 18], [3, 4]])
    write_json(root / "train/images/a.json", labelme_content(*shapes))
    return root


def prepare(root, *flags):
    flags = f"--source={root}", f"--destination={root}_records", "--workers=1", *flags
    return main.main(["prepare", "folder", *flags])


def labels_of(root, split="train"):
    source = PreparedSource(f"{root}_records", split)
    return {record["id"]: record["label"] for record in (source[i] for i in range(len(source)))}


def edit(path, change):
    content = json.loads(Path(path).read_text())
    change(content)
    write_json(path, content)


def draw_with_coco(path, image_id, background=IGNORED):
    """The label map from COCO's own masks, pixel by pixel the smallest mask that covers it."""
    tool = COCO(path)
    masks = [(tool.annToMask(x), x["category_id"]) for x in tool.imgToAnns[image_id]]
    masks.sort(key=lambda item: item[0].sum())
    label_hw = np.full((HEIGHT, WIDTH), background)
    for row, column in np.ndindex(HEIGHT, WIDTH):
        covering = [id_ for mask, id_ in masks if mask[row, column]]
        if covering:
            label_hw[row, column] = {3: SKY, 90: SOFA, 7: CAT}[covering[0]]
    return label_hw


def test_a_folder_with_cocos_annotations_is_prepared(coco):
    assert prepare(coco) == 0
    labels = labels_of(coco)
    assert sorted(labels) == ["a", "inner/b"]
    for image_id, id_ in enumerate(sorted(labels), 1):
        expected = draw_with_coco(coco / "annotations/train.json", image_id)
        np.testing.assert_array_equal(labels[id_], expected)
        assert labels[id_].dtype == np.uint8 and len(np.unique(expected)) > 1
    assert set(np.unique(labels["a"])) == {SKY, SOFA, CAT, IGNORED}


@pytest.mark.parametrize("images", ["train/images", "train", "val", "images", "."])
def test_the_images_of_cocos_annotations_may_be_in_these_folders(coco, images):
    split = "validation" if images == "val" else "train"
    (coco / "train/images").rename(coco / "moved")
    (coco / "train").rmdir()
    (coco / images).parent.mkdir(parents=True, exist_ok=True)
    if images == ".":
        for path in (coco / "moved").iterdir():
            path.rename(coco / path.name)
    else:
        (coco / "moved").rename(coco / images)
    (coco / "annotations/train.json").rename(coco / f"annotations/{split}.json")
    assert prepare(coco) == 0
    assert sorted(labels_of(coco, split)) == ["a", "inner/b"]


def test_pixels_outside_all_polygons_are_of_the_background_if_it_is_a_class(coco):
    edit(coco / "classes.json", lambda x: x["classes"].append({"name": "Wall, Background"}))
    assert prepare(coco) == 0
    expected = draw_with_coco(coco / "annotations/train.json", 1, background=3)
    np.testing.assert_array_equal(labels_of(coco)["a"], expected)
    assert (expected == 3).any()


@pytest.mark.parametrize("order", [1, -1])
def test_the_smaller_of_two_polygons_is_on_top_whatever_their_order(labelme, order):
    large = "sky", "rectangle", [[2, 3], [20, 15]]
    small = "cat", "rectangle", [[5, 5], [9, 9]]
    content = labelme_content(*(large, small)[::order])
    write_json(labelme / "train/images/a.json", content)
    assert prepare(labelme) == 0
    expected = np.full((HEIGHT, WIDTH), IGNORED)
    expected[3:15, 2:20] = SKY
    expected[5:9, 5:9] = CAT
    np.testing.assert_array_equal(labels_of(labelme)["a"], expected)


def test_of_two_polygons_of_the_same_size_the_later_one_is_on_top(labelme):
    first, second = [[2, 3], [8, 9]], [[5, 3], [11, 9]]
    content = labelme_content(("sky", "rectangle", first), ("cat", "rectangle", second))
    write_json(labelme / "train/images/a.json", content)
    assert prepare(labelme) == 0
    assert labels_of(labelme)["a"][4, 4:7].tolist() == [SKY, CAT, CAT]


@pytest.mark.parametrize("place", ["train/images", "train/annotations", "annotations"])
def test_a_folder_with_labelmes_files_is_prepared(labelme, place):
    if place == "annotations":
        (labelme / "train/images").rename(labelme / "images")
        (labelme / "train").rmdir()
        (labelme / "train.txt").write_text("a\n")
    (label,) = labelme.rglob("a.json")
    (labelme / place).mkdir(exist_ok=True)
    label.rename(labelme / place / "a.json")
    assert prepare(labelme) == 0
    expected = np.full((HEIGHT, WIDTH), IGNORED)
    expected[:12] = SKY
    expected[4:18, 3:9] = SOFA  # fewer pixels than the sky
    np.testing.assert_array_equal(labels_of(labelme)["a"], expected)


def test_labelmes_polygons_and_circles_are_drawn(labelme):
    content = labelme_content(
        ("sky", "polygon", [[2, 2], [12, 2], [12, 7], [7, 7], [7, 15], [2, 15]]),
        ("cat", "circle", [[20.5, 10], [26.5, 10]]),
    )
    del content["shapes"][0]["shape_type"]  # as old versions write it
    write_json(labelme / "train/images/a.json", content)
    assert prepare(labelme) == 0
    label_hw = labels_of(labelme)["a"]
    expected = np.full((HEIGHT, WIDTH), IGNORED)
    expected[2:7, 2:12] = expected[2:15, 2:7] = SKY
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    distance = np.hypot(rows - 10, columns - 20.5)
    expected[distance <= 6] = CAT
    sure = abs(distance - 6) > 0.25  # COCO's tools round corners to a fifth of a pixel
    np.testing.assert_array_equal(label_hw[sure], expected[sure])


def test_labelmes_points_are_those_of_the_upright_image(labelme):
    (labelme / "train/images/a.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright: 20 x 30 pixels are shown as 30 x 20
    save_image(labelme / "train/images/a.jpg", exif=exif)
    content = labelme_content(
        ("sky", "rectangle", [[0, 20], [10, 30]]), imageHeight=WIDTH, imageWidth=HEIGHT
    )
    write_json(labelme / "train/images/a.json", content)
    assert prepare(labelme) == 0
    expected = np.full((WIDTH, HEIGHT), IGNORED)
    expected[20:, :10] = SKY
    np.testing.assert_array_equal(labels_of(labelme)["a"], expected)


def test_annotations_without_the_images_size_are_taken(coco):
    expected = draw_with_coco(coco / "annotations/train.json", 1)
    for image in (content := coco_content())["images"]:
        del image["height"], image["width"]
    write_json(coco / "annotations/train.json", content)
    assert prepare(coco) == 0
    np.testing.assert_array_equal(labels_of(coco)["a"], expected)


def test_names_that_are_no_classes_are_counted_in_one_line(coco, capsys):
    edit(coco / "annotations/train.json", lambda x: x["categories"][0].update(name="tabby"))
    edit(coco / "annotations/train.json", lambda x: x["categories"][2].update(name="armchair"))
    assert prepare(coco) == 1
    line, last = [x for x in capsys.readouterr().err.splitlines() if x and "prepare: " not in x]
    assert line == (
        "name 'tabby' in 2 of 2 annotations, name 'armchair' in 1; if they mean no label, add "
        '"ignored_names": ["armchair", "tabby"] to classes.json, else list their classes there'
    )
    assert last.startswith("zegformer: 2 bad records")
    edit(coco / "classes.json", lambda x: x.update(ignored_names=["Armchair", "tabby"]))
    assert prepare(coco) == 0
    label_hw = labels_of(coco)["a"]
    assert set(np.unique(label_hw)) == {SKY, IGNORED}
    assert (label_hw[star()] == IGNORED).all()  # they cover the sky


def test_other_ignored_names_need_other_records(coco, capsys):
    assert prepare(coco) == 0
    edit(coco / "classes.json", lambda x: x.update(ignored_names=["tabby"]))
    assert prepare(coco) == 1
    assert "holds labels with other ignored ids or names" in capsys.readouterr().err


def test_finished_shards_are_drawn_again_if_the_order_of_the_classes_changed(labelme, monkeypatch):
    monkeypatch.setattr(plan, "RECORDS_PER_SHARD", 1)
    save_image(labelme / "train/images/b.png")
    assert prepare(labelme) == 1
    edit(labelme / "classes.json", lambda x: x["classes"].reverse())
    shutil.copy(labelme / "train/images/a.json", labelme / "train/images/b.json")
    assert prepare(labelme) == 0
    assert set(np.unique(labels_of(labelme)["a"])) == {1, 2, IGNORED}  # couch, sky


def test_a_name_that_may_be_two_classes_is_refused(coco, capsys):
    edit(coco / "classes.json", lambda x: x["classes"].append({"name": "bench, couch"}))
    assert prepare(coco) == 1
    err = capsys.readouterr().err
    assert "the name 'COUCH' may be 'Sofa, couch' or 'bench, couch'" in err
    edit(coco / "annotations/train.json", lambda x: x["categories"][2].update(name="couch, sofa"))
    assert prepare(coco) == 0


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_without_classes_a_message_shows_those_that_fit(kind, request, capsys):
    root = request.getfixturevalue(kind)
    (root / "classes.json").unlink()
    assert prepare(root) == 1
    (line,) = capsys.readouterr().err.splitlines()
    start, _, content = line.partition("for the names in the labels write ")
    assert start.endswith("mine/classes.json: no such file; ")
    names = ["sky", "COUCH", "cat"] if kind == "coco" else ["sky", "couch"]
    assert [x["name"] for x in json.loads(content)["classes"]] == names
    (root / "classes.json").write_text(content)
    assert prepare(root) == 0


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_training_on_polygons_says_to_prepare_them_first(kind, request):
    root = request.getfixturevalue(kind)
    with pytest.raises(UserError, match=rf"train.json|a.json: .* prepare folder --source={root} "):
        datasets.open_source("folder", "train", data_dir=root, vocabulary=read_classes(root))


def change_image(**fields):
    return lambda content: content["images"][0].update(fields)


def change_shape(place, value):
    return lambda content: content["annotations"][place].update(segmentation=value)


WRONG_SHAPES = [
    (change_shape(0, []), "annotation 1: has neither polygons nor run lengths; a box alone"),
    (change_shape(0, None), "annotation 1: has neither polygons nor run lengths"),
    (change_shape(0, [[1, 2, 3, 4]]), "annotation 1: a polygon must be a list of at least 3"),
    (change_shape(0, [[1, 2, 3, 4, 5, 6, 7]]), "annotation 1: a polygon must be a list of at"),
    (change_shape(0, [[1, 2, 3, 4, 5, "6"]]), "annotation 1: a polygon must be a list of at"),
    (change_shape(0, [1, 2, 3, 4, 5, 6]), "annotation 1: a polygon must be a list of at"),
    (change_shape(0, [[1, 2, 3, 4, 5, 1e9]]), "annotation 1: 1000000000.0 is far outside"),
    (change_shape(0, [[1, 2, 3, 4, 5, float("nan")]]), "annotation 1: nan is far outside"),
    (change_shape(2, {"size": [20, 30], "counts": [5, 9]}), "annotation 3: the runs of a mask do"),
    (change_shape(2, {"size": [20, 30], "counts": [-5, 605]}), "annotation 3: the runs of a mask"),
    (change_shape(2, {"size": [20, 30], "counts": "S"}), "annotation 3: .* runs 'S' are not"),
    (change_shape(2, {"size": [30, 20], "counts": [600]}), r"annotation 3: run .* \[30, 20\], but"),
    (change_image(height=21), r"expected the image's size: \(21, 30\), but a.png is \(20, 30\)"),
    (change_image(height=30, width=20), "is .* draw it on the image with its EXIF rotation"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG_SHAPES)
def test_a_damaged_shape_is_a_bad_record(coco, capsys, change, message):
    path = coco / "annotations/train.json"
    edit(path, change)
    assert prepare(coco) == 1
    line, last = [x for x in capsys.readouterr().err.splitlines() if x and "prepare: " not in x]
    assert line.startswith(f"train a: {path}: ")
    assert re.search(message, line)
    assert last.startswith("zegformer: 1 bad records")
    assert prepare(coco, "--skip-bad") == 0
    assert sorted(labels_of(coco)) == ["inner/b"]


def drop(key):
    return lambda content: content.pop(key)


WRONG_FILES = [
    (drop("images"), "'images' must be a list, found none"),
    (drop("categories"), "'categories' must be a list, found none"),
    (drop("annotations"), "'annotations' must be a list, found none"),
    (lambda x: x.update(images=[]), "the list 'images' is empty"),
    (change_image(id=2), "entry 2 of 'images': the id 2 is used twice"),
    (change_image(id="1"), "annotation 1: no image has the id 1"),
    (change_image(id=[1]), "entry 1 of 'images': 'id' must be a whole number or text, got [1]"),
    (change_image(file_name=""), "image 1: 'file_name' '' is no path below"),
    (change_image(file_name="\0"), r"image 1: 'file_name' '\x00' is no path below"),
    (change_image(file_name="../a.png"), "image 1: 'file_name' '../a.png' is no path below"),
    (change_image(file_name="/a.png"), "image 1: 'file_name' '/a.png' is no path below"),
    (change_image(file_name="inner/b.jpg"), "image 2: 'inner/b.png' has the same stem as an ear"),
    (change_image(height=0), "image 1: an image of 0 rows and 30 columns"),
    (change_image(height="20"), "image 1: 'height' must be a whole number, got '20'"),
    (lambda x: x["annotations"][1].update(category_id=5), "annotation 2: no category has the id 5"),
    (lambda x: x["annotations"].append(3), "annotation 6: 'image_id' must be a whole number or"),
    (lambda x: x["categories"][0].update(name=None), "entry 1 of 'categories': 'name' must"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG_FILES)
def test_a_damaged_coco_file_is_refused_before_anything_is_written(coco, capsys, change, message):
    path = coco / "annotations/train.json"
    edit(path, change)
    assert prepare(coco) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"zegformer: {path}: {message}")
    assert not Path(f"{coco}_records").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected a JSON object, as COCO and labelme write"),
        (b'{"images": "\xe9"}', "line 1: text in ISO-8859-1"),
    ],
)
def test_other_files_are_refused(coco, capsys, content, message):
    (coco / "annotations/train.json").write_bytes(content)
    assert prepare(coco) == 1
    assert f"train.json: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape, message",
    [
        (("sky", "line", [[1, 2], [3, 4]]), "shape 1: the shape_type 'line' is no area"),
        (("sky", "polygon", [[1, 2], [3, 4]]), "shape 1: a polygon must be a list of at least 3"),
        (("sky", "polygon", [1, 2]), "shape 1: 'points' must be pairs of x and y"),
        (("sky", "circle", [[1, 2], ["a", 4]]), "shape 1: a circle must have two points"),
        (("sky", "circle", [[1, 2], [1e300, 4]]), "shape 1: a circle must have two points"),
        (("sky", "circle", [[1, 2], [1e5, 4]]), "shape 1: 1000"),
        (("sky", "rectangle", [[1, 2], [10**400, 4]]), "shape 1: 1000"),
        (("sky", "rectangle", [[1, 2], [float("inf"), 4]]), "shape 1: inf is far outside"),
        (("sky", "circle", [[1, 2]]), "shape 1: a circle must have two points"),
        ((7, "circle", [[1, 2], [3, 4]]), "shape 1: 'label' must be text, got 7"),
        (("dog", "rectangle", [[1, 2], [3, 4]]), "no class has the name 'dog'; if it means no"),
    ],
)
def test_a_wrong_shape_of_labelme_is_named(labelme, capsys, shape, message):
    path = labelme / "train/images/a.json"
    write_json(path, labelme_content(shape))
    assert prepare(labelme) == 1
    assert f"train a: {path}: {message}" in capsys.readouterr().err


def test_images_of_another_size_than_labelmes_are_refused(labelme, capsys):
    edit(labelme / "train/images/a.json", lambda x: x.update(imageHeight=40))
    assert prepare(labelme) == 1
    message = f"a.json: expected the image's size: (40, {WIDTH}), but a.png is ({HEIGHT}, {WIDTH})"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["images", "annotations"])
def test_an_image_that_nobody_labelled_is_named(labelme, capsys, place):
    save_image(labelme / "train/images/b.png")
    (labelme / "train" / place).mkdir(exist_ok=True)
    (labelme / "train/images/a.json").rename(labelme / "train" / place / "a.json")
    assert prepare(labelme) == 1
    message = f"train b: {labelme}/train/{place}/b.json: no such file"
    assert message in capsys.readouterr().err
    assert prepare(labelme, "--skip-bad") == 0


@pytest.mark.parametrize("other", ["train.txt", "train/annotations", "annotations/val.json"])
def test_two_kinds_of_labels_for_a_split_are_refused(coco, capsys, other):
    if other == "annotations/val.json":
        write_json(coco / other, coco_content())
        other = "annotations/validation.json"
        write_json(coco / other, coco_content())
    elif other.endswith(".txt"):
        (coco / other).write_text("a\n")
    else:
        (coco / other).mkdir()
    assert prepare(coco) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is there, too; keep one of them" in line and Path(other).name[:5] in line


def test_label_images_are_preferred_to_shapes_of_the_same_stem(labelme):
    (labelme / "train/annotations").mkdir()
    Image.new("L", (WIDTH, HEIGHT), CAT).save(labelme / "train/annotations/a.png")
    assert prepare(labelme) == 0
    assert (labels_of(labelme)["a"] == CAT).all()


def test_several_processes_draw_the_same(coco, monkeypatch):
    monkeypatch.setattr(plan, "RECORDS_PER_SHARD", 1)
    assert prepare(coco) == prepare(coco, "--workers=2", f"--destination={coco}_two") == 0
    assert files_of(f"{coco}_records") == files_of(f"{coco}_two")


def test_polygons_of_one_class_alone_need_a_background(labelme, capsys):
    write_json(labelme / "classes.json", {"classes": [{"name": "sky"}]})
    edit(labelme / "train/images/a.json", lambda x: x["shapes"].pop())
    assert prepare(labelme) == 0
    assert 'if the labels are polygons, list a class "background"' in capsys.readouterr().err
    Path(f"{labelme}_records").rename(labelme / "old")
    edit(labelme / "classes.json", lambda x: x["classes"].append({"name": "background"}))
    assert prepare(labelme) == 0
    assert "warning" not in capsys.readouterr().err


def test_an_annotation_file_that_changed_is_read_again(coco):
    opened = Folder.open(coco)
    (first, _) = opened.examples(coco, "train")
    assert (opened.read(first)[1] == CAT).any()
    edit(coco / "annotations/train.json", lambda x: x["annotations"][2].update(category_id=3))
    assert not (opened.read(first)[1] == CAT).any()


WRONG_VALUES = [None, True, -1, 1e308, 10**30, float("nan"), "x", "a\0b", [], {}, [[]], [[1, 2]]]
BYTES = b'0123456789[]{},:"-.eE\xff\\'


def places_in(value, place=()):
    """The keys and indices that lead to every value in JSON's content."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*place, key)
        if isinstance(inner, dict | list):
            yield from places_in(inner, (*place, key))


def spoil(content, rng):
    """The file's bytes with a few other ones, or with a wrong value in one place."""
    if rng.random() < 0.5:
        data = bytearray(json.dumps(content).encode())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice(BYTES)
        return bytes(data)
    *path, last = rng.choice(list(places_in(content)))
    content = inner = copy.deepcopy(content)
    for key in path:
        inner = inner[key]
    inner[last] = rng.choice(WRONG_VALUES)
    return json.dumps(content).encode()


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_a_spoilt_file_is_an_error_in_words_or_a_label_map(kind, count, request):
    root, rng = request.getfixturevalue(kind), random.Random(count)
    path = next(path for path in root.rglob("*.json") if path.name != "classes.json")
    content, ends = json.loads(path.read_text()), []
    for _ in range(count):
        path.write_bytes(spoil(content, rng))
        try:
            folder = Folder.open(root)
            for example in folder.examples(root, "train"):
                image, label_hw = folder.read(example)
                assert label_hw.shape == image.shape[:2]
                assert np.isin(label_hw, [SKY, SOFA, CAT, IGNORED]).all()
            ends.append("read")
        except UserError as error:
            assert str(error).startswith(str(root)) and len(str(error)) < 700
            ends.append("refused")
    assert {"read", "refused"} == set(ends)
