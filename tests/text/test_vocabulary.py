import dataclasses
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.cleaning import plain_name
from zegformer_jax.text.vocabulary import Vocabulary, mark_seen

VOCABULARIES = sorted((Path(__file__).parents[2] / "data" / "vocabularies").glob("*.json"))


def write(tmp_path, classes, **fields):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classes": classes, **fields}))
    return path


@pytest.mark.parametrize("path", VOCABULARIES, ids=lambda path: path.stem)
def test_every_shipped_vocabulary_loads_and_survives_saving(path, tmp_path):
    vocabulary = Vocabulary.load(path)
    (tmp_path / "copy.json").write_text(vocabulary.to_json(), "utf-8")
    assert Vocabulary.load(tmp_path / "copy.json") == vocabulary
    assert all(vocabulary.synonyms(i) for i in range(len(vocabulary)))


@pytest.mark.parametrize(
    ("name", "seen", "unseen"),
    [("coco_stuff_171", 156, 15), ("pascal_voc_20", 15, 5), ("ade20k_full_847", 572, 275)],
)
def test_published_splits(name, seen, unseen):
    vocabulary = Vocabulary.load(VOCABULARIES[0].with_name(f"{name}.json"))
    assert len(vocabulary.seen_indices) == seen
    assert len(vocabulary) - len(vocabulary.seen_indices) == unseen


def test_names_are_stripped_and_split_into_synonyms(tmp_path):
    vocabulary = Vocabulary.load(write(tmp_path, [{"name": " bed "}, {"name": "sofa, couch"}]))
    assert vocabulary.names == ("bed", "sofa, couch")
    assert vocabulary.synonyms(1) == ("sofa", "couch")
    assert vocabulary.seen == (True, True)
    assert vocabulary.ids == (0, 1)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes.json: the list of classes is empty"),
        ([{"name": "cat"}, {"name": "  "}], "classes.json: entry 2 has an empty name ('')"),
        ([{"name": ", ,"}], "classes.json: entry 1 has an empty name (', ,')"),
        (
            [{"name": "cat"}, {"name": "sofa"}, {"name": "dog"}, {"name": " Sofa"}],
            "classes.json: 'sofa' and 'Sofa' are one class in two spellings (entries 2 and 4): "
            "remove one",
        ),
        (
            [{"name": "cat"}, {"name": "cat "}],
            "classes.json: 'cat' is listed twice (entries 1 and 2): remove one",
        ),
        (
            [{"name": "a", "id": 3}, {"name": "b", "id": 3}],
            "classes.json: id 3 is used twice (entries 1 and 2)",
        ),
        ([{"name": "a", "id": 65536}], "classes.json: entry 1: id 65536 is not in 0..65535"),
        ([{"name": "a", "id": "x"}], "classes.json: entry 1: id 'x' is not in 0..65535"),
        (
            [{"name": "a", "colour": [1, 2, 3]}, {"name": "b"}],
            "classes.json: entry 2: 'colour' must be [red, green, blue] of 0..255, got None; give "
            "a colour to all classes or to none",
        ),
        (
            [{"name": "a", "colour": [1, 2, 256]}],
            "classes.json: entry 1: 'colour' must be [red, green, blue] of 0..255, got "
            "(1, 2, 256); give a colour to all classes or to none",
        ),
        (
            [{"name": "a", "colour": [1, 2, 3]}, {"name": "b", "colour": [1, 2, 3]}],
            "classes.json: entry 2: 'colour' [1, 2, 3] is the same as entry 1: 'colour'",
        ),
        (
            [{"name": "a", "color": [1, 2, 3]}],
            "classes.json: the field 'color' is spelled 'colour'",
        ),
        ([{"name": 3}], "classes.json: entry 1 needs a 'name' that is text, got {'name': 3}"),
        ([{"name": "a", "seen": 1}], "classes.json: entry 1: 'seen' must be true or false"),
        ({"a": 1}, "classes.json: expected a list of names, or an object with a list 'classes'"),
    ],
)
def test_a_bad_file_gives_one_clear_line(tmp_path, classes, message):
    with pytest.raises(ValueError) as caught:
        Vocabulary.load(write(tmp_path, classes))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ignored_colours": [[1, 2, 3]]}, "'ignored_colours' [1, 2, 3] is the same as entry 1:"),
        ({"ignored_colours": [4]}, "'ignored_colours' must be [red, green, blue] of 0..255, got 4"),
        ({"ignored_colours": 4}, "'ignored_colours' must be a list of colours, got 4"),
        ({"ignored_colours": [[4, 4, 4]], "classes": [{"name": "a"}]}, "a 'colour' of each class"),
    ],
)
def test_colours_without_a_label_are_checked(tmp_path, fields, message):
    classes = fields.pop("classes", [{"name": "a", "colour": [1, 2, 3]}])
    with pytest.raises(ValueError, match=f"^classes.json: .*{re.escape(message)}"):
        Vocabulary.load(write(tmp_path, classes, **fields))


def test_colours_survive_saving_and_selection(tmp_path):
    colours = ((128, 0, 0), (0, 128, 0), (128, 128, 0))
    vocabulary = dataclasses.replace(
        Vocabulary.from_names(["a", "b", "c"]), colours=colours, ignored_colours=((0, 0, 0),)
    )
    (tmp_path / "copy.json").write_text(vocabulary.to_json(), "utf-8")
    assert Vocabulary.load(tmp_path / "copy.json") == vocabulary
    part = vocabulary.select([2, 0])
    assert part.colours == ((128, 128, 0), (128, 0, 0)) and part.ignored_colours == ((0, 0, 0),)


def test_other_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.json: no such vocabulary file"):
        Vocabulary.load(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json: not valid JSON: .*line 1"):
        Vocabulary.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="ignore_label must be 255 or 65535, not 7"):
        Vocabulary.load(write(tmp_path, [{"name": "a"}], ignore_label=7))
    many = [{"name": f"class {i}"} for i in range(256)]
    with pytest.raises(ValueError, match="256 classes, but .* use 65535"):
        Vocabulary.load(write(tmp_path, many))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the list of classes is empty"),
        (["cat", ""], "entry 2 has an empty name"),
        ("cat", "expected a list of names"),
        ({"cat", "dog"}, "expected a list of names, got a set"),
    ],
)
def test_from_names_checks_too(names, message):
    with pytest.raises(ValueError, match=f"^vocabulary: .*{message}"):
        Vocabulary.from_names(names)


@pytest.mark.parametrize(
    "first, second",
    [
        ("Cat", "cat"),
        ("STRASSE", "straße"),
        ("sofa, couch", "Couch,sofa"),
        ("sofa, couch", "couch, sofa, Sofa"),
        ("traffic  light", "traffic light"),
        ("traffic\u00a0light", "traffic\tlight"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("men’s room", "men's room"),
        ("ｃａｔ", "cat"),
    ],
)
def test_one_class_in_two_spellings_is_refused_with_both(first, second):
    with pytest.raises(UserError) as caught:
        Vocabulary.from_names([first, "dog", second])
    assert str(caught.value) == (
        f"vocabulary: {first!r} and {second!r} are one class in two spellings (entries 1 and 3): "
        "remove one"
    )


def test_spellings_that_look_alike_are_told_apart_in_the_message():
    with pytest.raises(UserError, match=r"'cr\\xe8me' and 'cre\\u0300me' are one class in two"):
        Vocabulary.from_names(["cr\u00e8me", "cre\u0300me"])


@pytest.mark.parametrize("names", [("sofa, couch", "sofa"), ("car", "cars"), ("tv", "t v")])
def test_classes_that_share_no_spelling_are_accepted(names):
    assert Vocabulary.from_names(names).names == names


@given(st.text(st.characters(max_codepoint=0x17F, categories=["Lu", "Ll", "Zs"]), max_size=12))
def test_composed_and_decomposed_names_are_the_same(name):
    name = name.replace("\u00c3", "").replace("\u00c2", "")  # ftfy takes these for wrong decoding
    assert plain_name(name) == plain_name(unicodedata.normalize("NFD", name))


@pytest.mark.parametrize(
    "text",
    [
        '["cat", "dog"]',
        '[{"name": "cat"}, {"name": "dog"}]',
        '{"classes": [{"name":"cat"}, "dog"]}',
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lists_of_names_are_read(tmp_path, text, mark):
    (tmp_path / "classes.json").write_text(mark + text, "utf-8")
    if '"classes"' in text:
        with pytest.raises(ValueError, match="entry 2 needs a 'name' that is text, got 'dog'"):
            Vocabulary.load(tmp_path / "classes.json")
    else:
        assert Vocabulary.load(tmp_path / "classes.json").names == ("cat", "dog")


def test_a_class_is_seen_whatever_its_spelling():
    trained = Vocabulary.from_names(["traffic light", "cr\u00e8me"], [True, True])
    vocabulary = Vocabulary.from_names(["Traffic  Light", "cre\u0300me", "tram"])
    assert mark_seen(vocabulary, trained).seen == (True, True, False)


def test_seen_flags_must_be_as_many_as_names():
    with pytest.raises(ValueError, match="2 names, 1 seen flags"):
        Vocabulary.from_names(["a", "b"], [True])


def test_many_names_use_16_bit_labels():
    vocabulary = Vocabulary.from_names([f"class {i}" for i in range(300)])
    assert vocabulary.ignore_label == 65535
    assert vocabulary.training_table().dtype == np.uint16


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_training_table_numbers_the_seen_classes(seen):
    vocabulary = Vocabulary.from_names([f"class {i}" for i in range(len(seen))], seen)
    table = vocabulary.training_table()
    expected, count = [], 0
    for flag in seen:
        expected.append(count if flag else 255)
        count += flag
    assert table[: len(seen)].tolist() == expected
    assert np.all(table[len(seen) :] == 255)
    assert table.shape == (256,) and table.dtype == np.uint8


def test_without_a_seen_class_nothing_can_be_trained():
    with pytest.raises(ValueError, match="no class is seen, so nothing can be trained; mark some"):
        Vocabulary.from_names(["a", "b"], [False, False]).seen_part()
    assert Vocabulary.from_names(["a", "b"], [False, True]).seen_part().names == ("b",)


def test_selection():
    vocabulary = Vocabulary(("a", "b", "c"), (True, False, True), (7, 0, 3))
    part = vocabulary.select([2, 1])
    assert part == Vocabulary(("c", "b"), (True, False), (3, 0))
    assert part.seen_indices.tolist() == [0]
