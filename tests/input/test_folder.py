"""Folders as users have them: layouts, lists, and the kinds of pictures that would be misread."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from folders import IGNORED, colour_labels, label_of, make_folder
from PIL import Image

from zegformer_jax.input import decoding
from zegformer_jax.input.datasets import open_source
from zegformer_jax.input.folder import Folder, list_examples, read_classes
from zegformer_jax.runtime.errors import MissingFile, UserError


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


def listed(folder):
    """The same records as images/, annotations/ and lists."""
    for kind in ("images", "annotations"):
        (folder / kind).mkdir()
    for split in ("train", "validation"):
        names = []
        for path in sorted((folder / split / "images").iterdir()):
            names.append(f"{split}/{path.stem}" if split == "train" else f"{split}_{path.name}")
            target = folder / "images" / names[-1]
            target = target if split != "train" else target.with_suffix(path.suffix)
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
            label = (folder / "annotations" / names[-1]).with_suffix(".png")
            label.parent.mkdir(exist_ok=True)
            (folder / split / "annotations" / f"{path.stem}.png").rename(label)
            (folder / split / "annotations").mkdir(exist_ok=True)
        (folder / f"{split}.txt").write_text("\n".join([*names, "", ""]))
    return folder


def records(folder, split):
    source = open_source("folder", split, data_dir=folder, vocabulary=read_classes(folder))
    return [source[i] for i in range(len(source))]


def test_lists_give_the_records_of_sub_folders(folder, tmp_path):
    other = listed(make_folder(tmp_path / "listed"))
    for split in ("train", "validation"):
        for kind in ("images", "annotations"):
            for path in (other / split / kind).iterdir():
                path.unlink()
            (other / split / kind).rmdir()
        (other / split).rmdir()
    for split in ("train", "validation"):
        expected, found = records(folder, split), records(other, split)
        assert len(expected) == len(found) > 0
        for one, two in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one["image"], two["image"])
            np.testing.assert_array_equal(one["label"], two["label"])
            np.testing.assert_array_equal(one["label"], label_of(folder / split, one["id"]))
            assert two["id"] == (
                f"train/{one['id']}" if split == "train" else f"{split}_{one['id']}"
            )


def test_val_is_validation(folder):
    expected = records(folder, "validation")
    (folder / "validation").rename(folder / "val")
    for name in ("val", "validation"):
        found = records(folder, name)
        assert [x["id"] for x in found] == [x["id"] for x in expected] == ["000", "001", "002"]
    assert Folder.open(folder).counts == {"train": 8, "validation": 3}
    (folder / "validation").mkdir()
    with pytest.raises(ValueError, match="is there, too; keep one"):
        Folder.open(folder)


@pytest.mark.parametrize(
    "lines, message",
    [
        (b"", "train.txt: the list is empty"),
        (b"a\n../b\n", r"train.txt: name 2, '../b': expected a name under .*/images"),
        (b"a\n/b.jpg\n", r"train.txt: name 2, '/b.jpg': expected a name under .*/images"),
        (b"a\na.jpg\n", "train.txt: 'a' is listed twice"),
        (b"a\ncaf\xe9\n", "train.txt: line 2: text in ISO-8859-1"),
    ],
)
def test_errors_of_lists_say_where(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        Folder.open(one_picture(tmp_path, lines))


def one_picture(folder, lines):
    """A folder with the picture a.jpg, and this list."""
    for kind in ("images", "annotations"):
        (folder / kind).mkdir()
    Image.new("RGB", (4, 4)).save(folder / "images/a.jpg")
    Image.new("L", (4, 4)).save(folder / "annotations/a.png")
    (folder / "classes.json").write_text('{"classes": [{"name": "sky"}]}')
    (folder / "train.txt").write_bytes(lines)
    return folder


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path):
    (example,) = list_examples(one_picture(tmp_path, b"\xef\xbb\xbfa\r\n"), "train")
    assert example.id == "a" and example.image.name == "a.jpg"


def test_listed_pictures_that_are_missing_are_named_when_read(tmp_path):
    folder = one_picture(tmp_path, b"a\nb\nc.jpg\n")
    opened = Folder.open(folder)
    for example in opened.examples(folder, "train")[1:]:
        for method in (opened.read, opened.encoded_image):
            with pytest.raises(FileNotFoundError, match=f"images/{example.image.name}: no such"):
                method(example)
    with pytest.raises(FileNotFoundError, match=r"images/b: no such file \(4 of \d+ .*missing\)"):
        records(folder, "train")


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_their_cameras_say(tmp_path, orientation):
    """EXIF 2.3, Orientation: at which side of the scene the stored row 0 and column 0 lie."""
    stored = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    scene = {
        2: stored[:, ::-1],  # top, right
        3: stored[::-1, ::-1],  # bottom, right
        4: stored[::-1],  # bottom, left
        5: stored.transpose(1, 0, 2),  # left, top
        6: stored[::-1].transpose(1, 0, 2),  # right, top
        7: stored[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: stored[:, ::-1].transpose(1, 0, 2),  # left, bottom
    }.get(orientation, stored)
    folder = one_picture(tmp_path, b"a")
    (folder / "images/a.jpg").unlink()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(folder / "images/a.png", exif=exif)
    Image.new("L", scene.shape[1::-1]).save(folder / "annotations/a.png")
    opened = Folder.open(folder)
    (example,) = opened.examples(folder, "train")
    image, _ = opened.read(example)
    np.testing.assert_array_equal(image, scene)
    assert (opened.encoded_image(example) is None) == (orientation in range(2, 9))


def test_one_stem_for_two_pictures_is_an_error(folder):
    Image.new("RGB", (4, 4)).save(folder / "train/images/000.png")
    with pytest.raises(ValueError, match="000.png: 000.jpg has the same stem"):
        Folder.open(folder)


@pytest.mark.parametrize(
    "label_hw, message",
    [
        (np.full((16, 31), 3), r"000.png: expected the image's size: \(16, 31\), but 000.jpg is"),
        (np.full((31, 17), 3), r"000.png: expected the image's size: \(31, 17\), but 000.jpg is"),
        (
            np.full((17, 31), 5),
            "000.png: id 5 at row 0, column 0 is neither a class nor an ignored value "
            r'\(527 such pixels\); if it means no label, add "ignored_ids": \[5, 9\] to '
            "classes.json, else list its class there$",
        ),
        (
            np.repeat([[2, 4, 8]], 17, 0).repeat([9, 9, 13], 1),
            r'000.png: id 2 at .* if they mean no label, add "ignored_ids": \[2, 4, 8, 9\] to '
            "classes.json, else list .*; if the labels count from 2, write "
            "\"id\": 2 for 'car', and so on$",
        ),
        (
            np.arange(17 * 31).reshape(17, 31) % 200,
            "000.png: id 0 .*; so many values are no classes: is it a label image, and resized",
        ),
    ],
)
def test_a_folder_that_is_read_as_it_is_names_bad_labels(folder, label_hw, message):
    Image.fromarray(label_hw.astype(np.uint8)).save(folder / "train/annotations/000.png")
    with pytest.raises(ValueError, match=f"^{folder}/train/annotations/{message}"):
        records(folder, "train")


def test_folders_inside_the_folders_are_read(folder, tmp_path):
    """As Cityscapes has its cities; one of them is a link."""
    nested = make_folder(tmp_path / "nested")
    for kind in ("images", "annotations"):
        place = nested / "train" / kind
        for city, name in ((place / "aachen", "00[0-3].*"), (tmp_path / kind, "00[4-7].*")):
            city.mkdir()
            for path in list(place.glob(name)):
                path.rename(city / path.name)
        (place / "bremen").symlink_to(tmp_path / kind)
        (place / ".cache").mkdir()
        (place / ".cache" / "thumbnail.jpg").write_bytes(b"x")
    expected, found = records(folder, "train"), records(nested, "train")
    cities = ["aachen"] * 4 + ["bremen"] * 4
    assert [x["id"] for x in found] == [f"{city}/{i:03d}" for i, city in enumerate(cities)]
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one["image"], two["image"])
        np.testing.assert_array_equal(one["label"], two["label"])
    assert Folder.open(nested).counts == {"train": 8, "validation": 3}


def test_suffixes_in_capitals_are_taken(folder):
    expected = records(folder, "train")
    for path in (*folder.glob("train/images/*"), *folder.glob("train/annotations/*")):
        path.rename(path.with_suffix(path.suffix.upper()))
    for one, two in zip(expected, records(folder, "train"), strict=True):
        np.testing.assert_array_equal(one["image"], two["image"])
        np.testing.assert_array_equal(one["label"], two["label"])


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
def test_labels_that_are_jpegs_are_refused_before_anything_is_read(folder, suffix):
    for path in sorted(folder.glob("train/annotations/*"))[2:]:
        Image.open(path).convert("L").save(path.with_suffix(suffix), "jpeg")
        path.unlink()
    message = rf"annotations/002{suffix}: a JPEG label image \(6 of 8 are\); JPEG changes ids, so"
    with pytest.raises(UserError, match=message):
        records(folder, "train")
    with pytest.raises(UserError, match=message):
        Folder.open(folder)


def test_a_list_of_an_image_without_a_label_does_not_blame_the_other_labels(tmp_path):
    folder = one_picture(tmp_path, b"b\n")
    Image.new("RGB", (9, 8)).save(folder / "images" / "b.png")
    with pytest.raises(MissingFile, match=r"annotations/b.png: no such file \(1 of 2 "):
        records(folder, "train")


def test_labels_named_otherwise_than_their_images_are_told_at_once(tmp_path):
    """As Cityscapes' are; without labels at all, the first file that is missing is named."""
    names = {"images": ["a_leftImg8bit", "b_leftImg8bit"], "annotations": []}
    names["annotations"] += ["a_gtFine_color", "a_gtFine_labelIds", "b_gtFine_labelIds"]
    for folder, stems in names.items():
        (tmp_path / "train" / folder / "aachen").mkdir(parents=True)
        for stem in stems:
            Image.new("L", (9, 8)).save(tmp_path / "train" / folder / "aachen" / f"{stem}.png")
    with pytest.raises(UserError) as problem:
        list_examples(tmp_path, "train")
    assert str(problem.value) == (
        f"{tmp_path}/train/annotations: no label has the name of an image: a_leftImg8bit.png needs "
        "a_leftImg8bit.png, and there is a_gtFine_color.png; rename the labels as their images"
    )
    for path in (tmp_path / "train/annotations/aachen").iterdir():
        path.unlink()
    assert [x.label.name for x in list_examples(tmp_path, "train")] == [
        "a_leftImg8bit.png",
        "b_leftImg8bit.png",
    ]


def test_a_jpeg_beside_a_label_is_not_read(folder):
    """Some tools write previews there."""
    expected = records(folder, "train")
    for path in list(folder.glob("train/annotations/*")):
        Image.open(path).convert("L").save(path.with_suffix(".jpg"))
    for one, two in zip(expected, records(folder, "train"), strict=True):
        np.testing.assert_array_equal(one["label"], two["label"])


COLOURS = {
    3: (128, 0, 0), 7: (0, 128, 0), 1: (128, 128, 0), IGNORED: (0, 0, 0), 255: (224, 224, 192)
}  # fmt: skip


def test_labels_in_colour_are_read_by_the_colours_of_the_classes(folder, tmp_path):
    expected = {split: records(folder, split) for split in ("train", "validation")}
    coloured = colour_labels(make_folder(tmp_path / "coloured"), COLOURS)
    modes = {Image.open(path).mode for path in coloured.glob("*/annotations/*")}
    assert modes == {"RGB", "RGBA", "P"}
    for split, wanted in expected.items():
        for one, two in zip(wanted, records(coloured, split), strict=True):
            np.testing.assert_array_equal(one["label"], two["label"])
            assert one["label"].dtype == two["label"].dtype


def save_grey(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (
            save_grey(np.array([[[128, 0, 0], [128, 1, 0]]], np.uint8)),
            r"colour \[128, 1, 0\] at row 0, column 1 is neither a class's nor ignored \(1 such .*"
            r'; if it means no label, add "ignored_colours": \[\[0, 0, 0\], \[128, 1, 0\], \[224, ',
        ),
        (save_grey(np.array([[3, 7]], np.uint8)), r"colour \[3, 3, 3\] at row 0, column 0"),
        (save_grey(np.array([[3, 7]], np.uint16)), "grey with more than 8 bits, but classes.json"),
        (save_grey(np.array([[[128, 0, 0, 254]]], np.uint8)), "has transparent pixels; save it"),
    ],
)
def test_labels_of_other_colours_are_refused(folder, data, message):
    colour_labels(folder, COLOURS)
    (folder / "train/annotations/003.png").write_bytes(data)
    with pytest.raises(UserError, match=f"^{folder}/train/annotations/003.png: {message}"):
        records(folder, "train")


def test_one_class_alone_is_no_sign_of_a_shift(tmp_path):
    """Else masks of 0 and 255 would lead to a class for the rest of the image."""
    with pytest.raises(
        UserError, match='id 0 .*; if it means no label, add "ignored_ids": '
    ) as error:
        records(masks(tmp_path, [{"name": "boat", "id": 1}]), "train")
    assert "count from" not in str(error.value)


def masks(folder, classes, **fields):
    """A folder of one image whose label has a row of 0 and a row of 255, as masks have."""
    one_picture(folder, b"a\n")
    Image.new("RGB", (2, 2)).save(folder / "images/a.jpg")
    Image.fromarray(np.array([[0, 0], [255, 255]], np.uint8)).save(folder / "annotations/a.png")
    (folder / "classes.json").write_text(json.dumps({"classes": classes, **fields}))
    return folder


@pytest.mark.parametrize(
    "classes, fields, labels",
    [
        ([{"name": "sea", "id": 0}, {"name": "boat", "id": 255}], {}, [0, 1]),
        ([{"name": "boat", "id": 255}, {"name": "sea", "id": 0}], {}, [1, 0]),
        ([{"name": "boat", "id": 255}], {"ignored_ids": [0]}, [255, 0]),
        ([{"name": "boat", "id": 255}], {"ignored_ids": [0], "ignore_label": 65535}, [65535, 0]),
    ],
)
def test_an_object_of_255_is_a_class_that_says_so(tmp_path, classes, fields, labels):
    (record,) = records(masks(tmp_path, classes, **fields), "train")
    assert record["label"].tolist() == [[label] * 2 for label in labels]
    assert record["label"].dtype == (np.uint16 if 65535 in labels else np.uint8)


def test_hidden_files_are_no_records(folder):
    (folder / "train/images/.DS_Store").write_bytes(b"x")
    assert len(records(folder, "train")) == 8


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"classes": []}', "the list of classes is empty"),
        ('{"classes": [{"name": "a"}], "ignored_ids": 3}', "'ignored_ids' must be a list"),
        ('{"classes": [{"name": "a"}], "ignored_ids": [0]}', "id 0 is ignored and entry 1's"),
        ('{"classes": [{"name": "a"}], "ignored_ids": [-1]}', "ignored id -1 is not in 0..65535"),
        ('{"classes": [{"name": "a"}], "ignored_names": "b"}', "'ignored_names' must be a list of"),
        ('{"classes": [{"name": "a"}], "ignored_names": ["A"]}', "ignored name 'A' is a class's"),
        ('{"classes": [{"name": "a"}], "ignored_names": [3]}', "ignored name 3 is .* no text"),
        ('{"classes": [{"name": "a"}', "not valid JSON"),
    ],
)
def test_errors_of_the_classes_name_the_file(folder, content, message):
    (folder / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=f"folder/classes.json: .*{message}"):
        Folder.open(folder)


def png(width, height, depth, colour, rows):
    """A PNG of the given bit depth and colour type, written by hand."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    if colour == 3:
        parts.insert(1, chunk(b"PLTE", bytes(range(48))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_label_pictures_give_their_values():
    def values(*arguments):
        label_hw = decoding.decode_label(png(*arguments), "x.png")
        return label_hw.dtype, label_hw.tolist()

    assert values(2, 1, 8, 0, [b"\x05\xff"]) == (np.uint8, [[5, 255]])
    assert values(2, 1, 16, 0, [b"\x01\x02\xff\xff"]) == (np.uint16, [[258, 65535]])
    assert values(2, 2, 4, 3, [b"\x12", b"\x30"]) == (np.uint8, [[1, 2], [3, 0]])
    assert values(8, 1, 1, 0, [b"\xa0"]) == (np.uint8, [[1, 0, 1, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "data, message",
    [
        (png(2, 1, 4, 0, [b"\x12"]), "x.png: grey with less than 8 bits"),
        (png(4, 1, 2, 0, [b"\x1b"]), "x.png: grey with less than 8 bits"),
        (png(1, 1, 8, 2, [b"\x01\x02\x03"]), r"x.png: .* mode RGB; .* \"colour\": \[128, 0, 0\]"),
        (png(1, 1, 8, 2, [b"\x07\x07\x07"]), "x.png: .* RGB; its three channels are equal: save"),
        (png(1, 1, 8, 6, [b"\x07\x07\x07\xff"]), "x.png: .* RGBA; its three channels are equal"),
        (png(1, 1, 8, 4, [b"\x01\x02"]), "x.png: an image of mode LA"),
        (png(64, 64, 8, 0, [bytes(64)] * 64)[:-30], "x.png: damaged or cut off"),
        (b"", "x.png: not an image"),
    ],
)
def test_label_pictures_that_would_be_misread_are_errors(data, message):
    with pytest.raises(ValueError, match=message):
        decoding.decode_label(data, "x.png")


def test_a_jpeg_is_no_label_picture():
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "jpeg")
    with pytest.raises(ValueError, match="x: a JPEG image, which changes ids; labels must be PNG"):
        decoding.decode_label(file.getvalue(), "x")


def test_a_picture_of_16_bits_is_refused_and_not_clipped():
    with pytest.raises(ValueError, match="x: an image of mode I;16; save it with 8 bits"):
        decoding.decode_image(png(2, 1, 16, 0, [b"\x01\x02\xff\xff"]), "x")


def test_every_byte_of_a_picture_is_needed():
    """Cut anywhere, a picture is an error or what it was; never other pixels."""
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(0, 256, (12, 3, 3), np.uint8), 4, axis=1)
    for kind in ("jpeg", "png"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        whole = decoding.decode_image(file.getvalue(), "x")
        for length in range(0, len(file.getvalue()), 7):
            try:
                found = decoding.decode_image(file.getvalue()[:length], "x")
            except ValueError as error:
                assert str(error).startswith("x: ")
            else:
                np.testing.assert_array_equal(found, whole)


def test_a_flipped_bit_of_a_label_picture_gives_no_other_ids():
    """Many such files can still be decoded; their checksums are wrong."""
    rng = np.random.default_rng(0)
    ids = np.kron(rng.integers(0, 256, (9, 12), np.uint8), np.ones((5, 4), np.uint8))
    good = decoding.encode_png(ids)
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << rng.integers(8)
        try:
            found = decoding.decode_label(bytes(bad), "x")
        except ValueError as error:
            assert str(error).startswith("x: ")
        else:
            np.testing.assert_array_equal(found, ids)
