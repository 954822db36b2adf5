"""Labels that look wrong: classes without pixels, and the reasons that users stumble over."""

import numpy as np
import pytest
from PIL import Image

from zegformer_jax.input.datasets import open_source
from zegformer_jax.input.label_counts import READ_AT_ONCE, LabelCounts, count_labels, describe_fault
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import Vocabulary


def describe(ids, pixels, ignored=0, **fields):
    """The fault of labels with these pixels of the classes a, b, ..., all of them wanted."""
    classes = Vocabulary(tuple("abcdefghijkl"[: len(ids)]), (True,) * len(ids), ids, **fields)
    return describe_fault(LabelCounts(np.array(pixels), ignored), classes, range(len(ids)))


def test_masks_of_0_and_255_are_told_how_to_name_255():
    assert describe((0, 1), [300, 0], 100) == (
        "no pixel shows 'b' (id 1); 25.0% of the pixels are 255, which means no label: if 255 is a "
        'class, give it "id": 255 in classes.json'
    )
    assert describe((0, 255), [300, 100]) == ""


def test_masks_with_0_without_a_label_are_told_how_to_name_255():
    found = describe((1,), [0], 400, ignored_ids=(0,))
    assert found == (  # one class is no sign of a shift
        "no pixel has a label; 100.0% of the pixels are 255 or 0, which mean no label: if 255 or 0 "
        'is a class, give it that "id" in classes.json'
    )


def test_one_class_of_id_0_beside_255_must_be_said_to_be_meant():
    """A list of one name alone gives it the id 0, which is the rest of the image."""
    assert describe((0,), [300], 100) == (
        "'a' (id 0) is the only class, and 25.0% of the pixels are 255, which means no label: if "
        '255 is the class, write "id": 255 for it in classes.json; if the labels are polygons, '
        'list a class "background" for the rest; if 255 means no label, add "ignored_ids": [255]'
    )
    assert describe((0,), [300], 100, ignored_ids=(255,)) == ""
    assert describe((0,), [300]) == describe((3,), [300], 100) == ""


@pytest.mark.parametrize(
    "ids, ignored_ids, pixels, advice",
    [
        (
            (1, 2, 3),
            (0,),
            [5, 5, 0],
            """if the labels count from 0, write "id": 0 for 'a', and so""",
        ),
        (
            (3, 1, 2),
            (0,),
            [0, 5, 5],
            """if the labels count from 0, write "id": 0 for 'b', and so""",
        ),
        (
            (0, 1, 2),
            (3,),
            [0, 5, 5],
            """if the labels count from 1, write "id": 1 for 'a', and so""",
        ),
        ((1, 2, 3), (0,), [5, 0, 5], ""),
        ((1, 2, 3), (), [5, 5, 0], ""),
        ((1, 2, 3), (0,), [5, 5, 5], None),
    ],
)
def test_labels_that_are_shifted_by_one_are_recognised(ids, ignored_ids, pixels, advice):
    found = describe(ids, pixels, 7, ignored_ids=ignored_ids)
    assert found == "" if advice is None else advice in found
    assert ("count from" in found) == bool(advice)


def test_many_missing_classes_are_counted():
    found = describe(tuple(range(12)), [4] + [0] * 11)
    assert found == (
        "no pixel shows 11 of 12 classes: 'b' (id 1), 'c' (id 2), 'd' (id 3), 'e' (id 4), "
        "'f' (id 5), 'g' (id 6), 'h' (id 7), 'i' (id 8), and 3 more"
    )


def test_missing_colours_are_named():
    found = describe((0, 1), [4, 0], 9, colours=((0, 0, 0), (128, 0, 0)))
    assert found == "no pixel shows 'b' (colour [128, 0, 0])"


CLASSES = Vocabulary.from_names(["a", "b", "c"])


def test_labels_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    labels = [rng.choice([0, 1, 255], (3, 5 + i)).astype(np.uint8) for i in range(40)]
    found = count_labels(labels.__getitem__, 40, CLASSES, [0, 1, 2])
    assert found.pixels.tolist() == [sum((x == c).sum() for x in labels) for c in range(3)]
    assert found.ignored == sum((x == 255).sum() for x in labels)


def test_reading_stops_once_every_class_was_found():
    """Though the files are sorted by what they show."""
    read, count = [], 20 * READ_AT_ONCE

    def read_label(index):
        read.append(index)
        return np.full((2, 2), index * 3 // count, np.uint8)

    assert count_labels(read_label, count, CLASSES, [0, 1, 2]).pixels.all()
    assert len(read) == READ_AT_ONCE
    read.clear()
    assert not count_labels(lambda i: read_label(i) // 2, count, CLASSES, [0, 1, 2]).pixels[2]
    assert sorted(read) == list(range(count))


@pytest.fixture
def folder(tmp_path):
    """Sixteen images in two folders; labels of 0 and 1, and those with an odd number of 11."""
    for index in range(16):
        for kind, pixels in (
            ("images", np.zeros((2, 2, 3), np.uint8)),
            ("annotations", np.array([[0, 1], [1, 11 if index % 2 else 0]], np.uint8)),
        ):
            path = tmp_path / "train" / kind / "ab"[index // 8] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path


def open_train(folder):
    return open_source("folder", "train", data_dir=folder, vocabulary=CLASSES)


def test_an_unknown_id_in_many_labels_is_one_line(folder):
    with pytest.raises(UserError) as error:
        open_train(folder).count_labels([0, 1, 2])
    assert str(error.value) == (
        f"{folder}/train/annotations: id 11 in 8 of 16 annotations; if it means no label, add "
        '"ignored_ids": [11] to classes.json, else list its class there'
    )


def test_an_unknown_id_in_one_label_names_it(folder):
    for index in range(3, 16, 2):
        (folder / "train/images" / "ab"[index // 8] / f"{index}.png").unlink()
    with pytest.raises(
        UserError, match=f"^{folder}/train/annotations/a/1.png: id 11 at row 1, col"
    ):
        open_train(folder).count_labels([0, 1, 2])
