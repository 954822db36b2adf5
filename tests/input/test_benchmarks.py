"""The published benchmarks' builders, on small fake archives in the official layouts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zegformer_jax.input import benchmarks
from zegformer_jax.input.benchmarks import ade20k_full, detail
from zegformer_jax.input.records import read, write

DATA = Path(__file__).parents[2] / "data"
TRAIN, VALIDATION = "train", "validation"
# VOC 2012 development kit, in the order of the ids from 1.
VOC_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()
# open-mmlab/mmsegmentation (Apache-2.0), tools/convert_datasets/pascal_context.py: the ids, among
# the 459 classes, of the 59. They are sorted here; so are the 59 names, but for one ("table").
CONTEXT_59_IDS = sorted(
    [2, 259, 260, 415, 324, 9, 258, 144, 18, 19, 22, 23, 397, 25, 284, 158, 159, 416, 33, 162]
    + [420, 454, 295, 296, 427, 44, 45, 46, 308, 59, 440, 445, 31, 232, 65, 354, 424, 68, 326, 72]
    + [458, 34, 207, 80, 355, 85, 347, 220, 349, 360, 98, 187, 104, 105, 366, 189, 368, 113, 115]
)
COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # category ids 12, 26, ..., less one
SIZES = {"a": (23, 37), "b": (41, 29), "c": (31, 31), "d": (27, 43)}  # height, width
IDS = {TRAIN: ("2008_00000b", "2008_00000a"), VALIDATION: ("2008_00000d", "2008_00000c")}
MODES = {"a": "RGB", "b": "L", "c": "CMYK", "d": "RGB"}


def class_entries(vocabulary):
    return json.loads((DATA / "vocabularies" / f"{vocabulary}.json").read_text())["classes"]


def write_jpeg(path, size, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, "jpeg", quality=90)


def write_png(path, ids_hw, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids_hw.astype(np.uint8))
    if palette:
        picture.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
    picture.save(path)


def write_mat(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, value, do_compression=True)


def write_ade(path, ids_hw):
    rng = np.random.default_rng(1)
    tens, ones = ids_hw // 256, ids_hw % 256
    red = tens * 10 + rng.integers(0, 6, ids_hw.shape)  # the last digit means nothing
    blue = rng.integers(0, 256, ids_hw.shape)  # the instance
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([red, ones, blue], -1).astype(np.uint8)).save(path)


def compress(numbers):
    """COCO's text of run lengths: see maskApi.c's comment on rleToString."""
    text = ""
    for i, number in enumerate(numbers):
        number = number - numbers[i - 2] if i > 2 else number
        while True:
            low, number = number & 31, number >> 5
            done = number == (-1 if low & 16 else 0)
            text += chr(48 + low + (0 if done else 32))
            if done:
                break
    return text


def encode_mask(mask_hw):
    flat = mask_hw.T.reshape(-1).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    bounds = [0, *edges, len(flat)]
    return compress(np.diff(bounds).tolist())


def write_detail(path, ids_by_image):
    images, annotations = [], []
    for number, (id_, ids_hw) in enumerate(ids_by_image.items()):
        height, width = ids_hw.shape
        images.append(
            {"image_id": number, "file_name": f"{id_}.jpg", "height": height, "width": width}
        )
        for category in np.unique(ids_hw[ids_hw > 0]).tolist():
            segmentation = {"size": [height, width], "counts": encode_mask(ids_hw == category)}
            annotations.append(
                {"image_id": number, "category_id": category, "segmentation": segmentation}
            )
    others = {"info": {"images": [1]}, "parts": [], "version": 4, "annos_joints": [[{}], 1]}
    content = others | {"annos_segmentation": annotations, "images": images}
    path.write_text(json.dumps(content, indent=len(images) % 2 or None))


@dataclasses.dataclass
class Fake:
    """A benchmark's fake archives, what was written into them, and what it should give."""

    benchmark: object
    source: Path
    labels: dict  # annotation's id -> label
    unknown: int  # an id that is neither a class nor known to be ignored
    write: object  # writes an annotation: (split, id, ids [h, w])
    written: dict = dataclasses.field(default_factory=dict)

    def example(self, split=VALIDATION, index=0):
        return self.benchmark.examples(self.source, split)[index]

    def rewrite(self, example, ids_hw):
        self.write(VALIDATION, example.id, ids_hw)
        detail.load.cache_clear()


def fill(fake, splits=(TRAIN, VALIDATION)):
    """Writes every id into the annotations of each split, half of them into each picture."""
    ids = np.array(sorted(fake.labels))
    for split in splits:
        for half, id_ in enumerate(IDS[split]):
            size = SIZES[id_[-1]]
            fake.written[split, id_] = np.resize(ids[half::2], size)
            fake.write(split, id_, fake.written[split, id_])
    return fake


def make_lists(folder, **lists):
    folder.mkdir()
    for name, split in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(IDS[split]))
    return folder


def make_voc(root, name, variant):
    voc = root / "VOCdevkit" / "VOC2012"
    lists = make_lists(root / "lists", pascal_voc_train=TRAIN, pascal_voc_val=VALIDATION)
    benchmark = dataclasses.replace(benchmarks.find(name), lists=lists)
    for ids in IDS.values():
        for id_ in ids:
            write_jpeg(voc / "JPEGImages" / f"{id_}.jpg", SIZES[id_[-1]], MODES[id_[-1]])

    def write(split, id_, ids_hw):
        own = split == VALIDATION or id_ == IDS[TRAIN][0]
        if own:
            write_png(voc / "SegmentationClass" / f"{id_}.png", ids_hw, palette=True)
            ids_hw = np.full_like(ids_hw, 7)  # SBD's labels of VOC's own pictures are not to count
        if variant == "aug":
            write_png(root / "SegmentationClassAug" / f"{id_}.png", ids_hw)
        elif variant == "sbd":
            classes = {"Segmentation": ids_hw.astype(np.uint8), "CategoriesPresent": [7]}
            folder = root / "benchmark_RELEASE" / "dataset" / "cls"
            write_mat(folder / f"{id_}.mat", {"GTcls": classes})

    labels = {id_: place for place, id_ in enumerate(range(1, 21))}
    if name == "pascal_voc_20b":
        return fill(Fake(benchmark, root, {0: 20, 255: 255} | labels, 21, write), (VALIDATION,))
    return fill(Fake(benchmark, root, {0: 255, 255: 255} | labels, 21, write))


def make_coco(root, name, variant):
    folders = {TRAIN: "train2017", VALIDATION: "val2017"}
    for split, ids in IDS.items():
        for id_ in ids:
            image = root / folders[split] / f"{id_}.jpg"
            write_jpeg(image, SIZES[id_[-1]], MODES[id_[-1]])
    parent = root if variant == "beside" else root / "stuffthingmaps_trainval2017"

    def write(split, id_, ids_hw):
        write_png(parent / folders[split] / f"{id_}.png", ids_hw)

    entries = class_entries("coco_stuff_171")
    labels = {entry["id"]: place for place, entry in enumerate(entries)}
    labels |= dict.fromkeys((*COCO_UNUSED, 255), 255)
    return fill(Fake(benchmarks.find(name), root, labels, 182, write))


def make_ade150(root, name, variant):
    ade, folders = root / "ADEChallengeData2016", {TRAIN: "training", VALIDATION: "validation"}
    for split, ids in IDS.items():
        for id_ in ids:
            image = ade / "images" / folders[split] / f"{id_}.jpg"
            write_jpeg(image, SIZES[id_[-1]], MODES[id_[-1]])

    def write(split, id_, ids_hw):
        write_png(ade / "annotations" / folders[split] / f"{id_}.png", ids_hw)

    labels = {0: 255} | {id_: id_ - 1 for id_ in range(1, 151)}
    return fill(Fake(benchmarks.find(name), root, labels, 151, write))


def make_ade_full(root, name, variant):
    folders = {TRAIN: "training", VALIDATION: "validation"}

    def scene(split, id_):
        kind = "urban/street" if id_[-1] in "ac" else "home_or_hotel/attic"
        return root / "ADE20K_2021_17_01" / "images" / "ADE" / folders[split] / kind

    for split, ids in IDS.items():
        for id_ in ids:
            write_jpeg(scene(split, id_) / f"{id_}.jpg", SIZES[id_[-1]], MODES[id_[-1]])
            write_jpeg(scene(split, id_) / id_ / "instance_000.jpg", (8, 8))

    def write(split, id_, ids_hw):
        write_ade(scene(split, id_) / f"{id_}_seg.png", ids_hw)

    entries = class_entries("ade20k_full_847")
    labels = {entry["id"]: place for place, entry in enumerate(entries)}
    # 1 and 3688 are objects outside the 847; both are where an id may first and last be.
    labels = {0: 65535, 1: 65535, 3688: 65535} | labels
    return fill(Fake(benchmarks.find(name), root, labels, 3689, write))


def make_context(root, name, variant):
    voc = root / "VOCdevkit" / "VOC2010"
    for ids in IDS.values():
        for id_ in ids:
            write_jpeg(voc / "JPEGImages" / f"{id_}.jpg", SIZES[id_[-1]], MODES[id_[-1]])
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "train.txt").write_text("\n".join(IDS[TRAIN]) + "\n")
    lists = make_lists(root / "lists", pascal_context_val=VALIDATION)
    benchmark = dataclasses.replace(benchmarks.find(name), lists=lists)
    detail_ids = {}

    def write(split, id_, ids_hw):
        if variant == "mat":
            write_mat(root / "trainval" / f"{id_}.mat", {"LabelMap": ids_hw.astype(np.uint16)})
        elif variant == "png":
            write_png(root / "59_context_labels" / f"{id_}.png", ids_hw, palette=True)
        else:
            detail_ids[id_] = ids_hw
            write_detail(root / "trainval_merged.json", detail_ids)

    detail.load.cache_clear()
    if name == "pascal_context_459":
        labels = {0: 65535} | {id_: id_ - 1 for id_ in range(1, 460)}
        return fill(Fake(benchmark, root, labels, 460, write))
    if variant == "png":
        names = [entry["name"] for entry in class_entries("pascal_context_59")]
        order = VOC_NAMES + sorted(set(names) - set(VOC_NAMES))[::-1]  # read, so any will do
        spelling = {"bedclothes": "bedcloth", "cloth": "clothes", "pottedplant": "potted plant"}
        lines = [f"{id_}: {spelling.get(n, n)}" for id_, n in enumerate(order, 1)]
        (root / "59_labels.txt").write_text("\n".join(lines) + "\n")
        labels = {0: 255} | {id_: names.index(n) for id_, n in enumerate(order, 1)}
        return fill(Fake(benchmark, root, labels, 60, write))
    labels = dict.fromkeys(range(460), 255)
    labels |= {id_: place for place, id_ in enumerate(CONTEXT_59_IDS)}
    return fill(Fake(benchmark, root, labels, 460, write))


CASES = {
    ("pascal_voc", "aug"): make_voc,
    ("pascal_voc", "sbd"): make_voc,
    ("pascal_voc_20b", "own"): make_voc,
    ("coco_stuff", "folder"): make_coco,
    ("coco_stuff", "beside"): make_coco,
    ("ade20k_150", ""): make_ade150,
    ("ade20k_full", ""): make_ade_full,
    ("pascal_context_59", "json"): make_context,
    ("pascal_context_59", "png"): make_context,
    ("pascal_context_59", "mat"): make_context,
    ("pascal_context_459", "mat"): make_context,
}


def make(tmp_path, case):
    return CASES[case](tmp_path, *case)


@pytest.fixture(params=CASES, ids="-".join)
def fake(request, tmp_path):
    return make(tmp_path, request.param)


def test_every_id_gets_its_label(fake):
    ignore = max(fake.labels.values())
    for split in fake.benchmark.counts:
        examples = fake.benchmark.examples(fake.source, split)
        assert [e.id for e in examples] == sorted(IDS[split])
        seen = set()
        for example in examples:
            image, label = fake.benchmark.read(example)
            ids = fake.written[split, example.id]
            expected = np.vectorize(fake.labels.get)(ids)
            np.testing.assert_array_equal(label, expected)
            assert label.dtype == (np.uint8 if ignore == 255 else np.uint16)
            assert image.dtype == np.uint8 and image.shape == (*SIZES[example.id[-1]], 3)
            seen |= set(np.unique(label).tolist())
        num_classes = 21 if fake.benchmark.name == "pascal_voc_20b" else len(fake_classes(fake))
        assert seen - {ignore} == set(range(num_classes))
        assert ignore in seen


def fake_classes(fake):
    return class_entries(fake.benchmark.vocabulary)


def test_pictures_are_decoded_and_handed_on(fake):
    for split in fake.benchmark.counts:
        for example in fake.benchmark.examples(fake.source, split):
            image, _ = fake.benchmark.read(example)
            with Image.open(example.image) as picture:
                assert picture.mode == MODES[example.id[-1]]
                np.testing.assert_array_equal(image, np.asarray(picture.convert("RGB")))
            data = fake.benchmark.encoded_image(example)
            if MODES[example.id[-1]] == "CMYK":
                assert data is None
            else:
                assert data == example.image.read_bytes()


def assert_names(error, path, *parts):
    message = str(error.value)
    assert message.startswith(f"{path}: "), message
    assert all(part in message for part in parts), message


def test_bad_pictures(fake):
    example = fake.example()
    good = example.image.read_bytes()
    for bad, reason in ((good[: len(good) // 2], "cut off"), (b"no picture", "not an image")):
        example.image.write_bytes(bad)
        with pytest.raises(ValueError) as error:
            fake.benchmark.read(example)
        assert_names(error, example.image, reason)
    with pytest.raises(ValueError) as error:
        fake.benchmark.encoded_image(example)
    assert_names(error, example.image)
    example.image.unlink()
    for method in (fake.benchmark.read, fake.benchmark.encoded_image):
        with pytest.raises(FileNotFoundError) as error:
            method(example)
        assert_names(error, example.image)


def test_bad_labels(fake):
    example = fake.example()
    ids_hw = fake.written[VALIDATION, example.id]
    unknown_hw = ids_hw.copy()
    unknown_hw[3, 5] = fake.unknown
    fake.rewrite(example, unknown_hw)
    with pytest.raises(ValueError) as error:
        fake.benchmark.read(example)
    assert_names(error, example.label, f"id {fake.unknown} at row 3, column 5", "1 such")
    fake.rewrite(example, ids_hw[1:])
    with pytest.raises(ValueError) as error:
        fake.benchmark.read(example)
    assert_names(error, example.label, example.id, str(example.image), f"x{len(ids_hw) - 1} ")


def test_damaged_labels(fake):
    example = fake.example()
    good = example.label.read_bytes()
    for bad in (good[: len(good) * 2 // 3], b"no annotation"):
        example.label.write_bytes(bad)
        detail.load.cache_clear()
        with pytest.raises(ValueError) as error:
            fake.benchmark.read(example)
        assert_names(error, example.label)
    example.label.unlink()
    with pytest.raises(FileNotFoundError) as error:
        fake.benchmark.read(example)
    assert_names(error, example.label)


MISSING = {
    ("pascal_voc", "aug"): [
        ("VOCdevkit/VOC2012/JPEGImages", "VOCtrainval_11-May-2012.tar"),
        ("VOCdevkit/VOC2012/SegmentationClass", "VOCtrainval_11-May-2012.tar"),
        ("SegmentationClassAug", "SegmentationClassAug.zip", "benchmark.tgz"),
    ],
    ("pascal_voc_20b", "own"): [
        ("VOCdevkit/VOC2012/SegmentationClass", "VOCtrainval_11-May-2012.tar")
    ],
    ("coco_stuff", "folder"): [
        ("train2017", "zips/train2017.zip"),
        ("stuffthingmaps_trainval2017/train2017", "stuffthingmaps_trainval2017.zip"),
    ],
    ("coco_stuff", "beside"): [("train2017", "zips/train2017.zip")],
    ("ade20k_150", ""): [
        ("ADEChallengeData2016/images/training", "ADEChallengeData2016.zip"),
        ("ADEChallengeData2016/annotations/training", "ADEChallengeData2016.zip"),
    ],
    ("ade20k_full", ""): [
        ("ADE20K_2021_17_01/images/ADE/training", "ADE20K_2021_17_01.zip", "ade20k.csail.mit.edu")
    ],
    ("pascal_context_59", "json"): [
        ("VOCdevkit/VOC2010/JPEGImages", "VOCtrainval_03-May-2010.tar"),
        ("VOCdevkit/VOC2010/ImageSets/Main/train.txt", "VOCtrainval_03-May-2010.tar"),
    ],
    ("pascal_context_59", "png"): [
        ("59_labels.txt", "pascal-context/59_labels.txt"),
        ("59_context_labels", "59_context_labels.tar.gz", "trainval_merged.json", "trainval.tar"),
    ],
    ("pascal_context_459", "mat"): [("trainval", "pascal-context/trainval.tar.gz")],
}


@pytest.mark.parametrize(
    ("case", "missing"),
    [(case, missing) for case, several in MISSING.items() for missing in several],
    ids=lambda value: "-".join(value[:2]).replace("/", "."),
)
def test_missing_archives_are_named(tmp_path, case, missing):
    fake = make(tmp_path, case)
    path = fake.source / missing[0]
    path.rename(tmp_path / "away")
    split = VALIDATION if case[0] == "pascal_voc_20b" else TRAIN
    with pytest.raises(FileNotFoundError) as error:
        fake.benchmark.examples(fake.source, split)
    message = str(error.value)
    assert message.startswith(str(path)), message
    assert all(part in message for part in missing[1:]), message
    if path.name != "train.txt" and path.suffix != ".txt":  # an empty folder is no better
        path.mkdir()
        if case[0] in ("coco_stuff", "ade20k_full") or path.parent.name == "images":
            with pytest.raises(FileNotFoundError, match="missing; it is in"):
                fake.benchmark.examples(fake.source, split)


def test_no_such_split(fake):
    with pytest.raises(ValueError, match="no split 'test', but .*validation"):
        fake.benchmark.examples(fake.source, "test")


def test_the_folder_itself_may_be_given(tmp_path):
    fake = make(tmp_path, ("pascal_voc", "aug"))
    (tmp_path / "SegmentationClassAug").rename(tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug")
    usual = fake.benchmark.examples(tmp_path, TRAIN)
    assert usual == fake.benchmark.examples(tmp_path / "VOCdevkit" / "VOC2012", TRAIN)


def test_official_numbers():
    """The counts are those of the lists, the papers and the data sets' pages."""
    counts = {name: dict(benchmarks.find(name).counts) for name in benchmarks.BENCHMARKS}
    assert counts == {
        "pascal_voc": {TRAIN: 10582, VALIDATION: 1449},
        "coco_stuff": {TRAIN: 118287, VALIDATION: 5000},
        "ade20k_full": {TRAIN: 25574, VALIDATION: 2000},
        "ade20k_150": {TRAIN: 20210, VALIDATION: 2000},
        "pascal_context_59": {TRAIN: 4998, VALIDATION: 5104},
        "pascal_context_459": {TRAIN: 4998, VALIDATION: 5104},
        "pascal_voc_20b": {VALIDATION: 1449},
    }
    for name, count in (
        ("pascal_voc_train", 10582),
        ("pascal_voc_val", 1449),
        ("pascal_context_val", 5104),
    ):
        assert len(set((DATA / "splits" / f"{name}.txt").read_text().split())) == count


def test_the_official_lists_are_read(tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in (
        voc / "JPEGImages",
        voc / "SegmentationClass",
        tmp_path / "SegmentationClassAug",
    ):
        folder.mkdir(parents=True)
    benchmark = benchmarks.find("pascal_voc")
    for split, count in benchmark.counts.items():
        examples = benchmark.examples(tmp_path, split)
        assert len({example.id for example in examples}) == count
    assert all(e.label.parent == voc / "SegmentationClass" for e in examples)


def test_find():
    with pytest.raises(ValueError, match="no benchmark 'voc'; there are pascal_voc, coco_stuff"):
        benchmarks.find("voc")
    assert all(benchmarks.find(name).name == name for name in benchmarks.BENCHMARKS)


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_guides_and_readme_name_the_archives(name):
    benchmark = benchmarks.find(name)
    readme = (DATA / "README.md").read_text()
    for archive in benchmark.archives:
        for fact in (archive.file, archive.address, *archive.gives):
            assert fact in benchmark.guide
        assert archive.address.split(" ")[0] in readme
        assert all(path in readme for path in archive.gives)
    assert f"`{name}`" in readme


def test_known_ids():
    """A few ids that are easy to get wrong by one, from the data sets' own lists."""
    for vocabulary, id_, name in (
        ("coco_stuff_171", 0, "person"),  # category 1
        ("coco_stuff_171", 89, "toothbrush"),  # category 90, the last thing
        ("coco_stuff_171", 181, "wood"),  # category 182, the last stuff
        ("ade20k_full_847", 2978, "wall"),
        ("ade20k_full_847", 976, "floor, flooring"),
    ):
        (entry,) = [entry for entry in class_entries(vocabulary) if entry["id"] == id_]
        assert entry["name"] == name
    names = [entry["name"] for entry in class_entries("pascal_voc_20b")]
    assert names[:20] == VOC_NAMES
    entries = class_entries("pascal_voc_20")
    assert [e["name"].replace(" ", "").replace("/", "") for e in entries] == VOC_NAMES


def test_background_is_counted_by_its_name(tmp_path):
    """Label 20, not the first of the classes that are merged to it."""
    fake = make(tmp_path, ("pascal_voc_20b", "own"))
    report = write.prepare(
        fake.benchmark, tmp_path, tmp_path / "records", subset=True, workers=1, progress=False
    )
    ids = np.concatenate([ids.ravel() for ids in fake.written.values()])
    rows = {line.split()[0]: line.split()[1:] for line in report.table().splitlines()}
    assert list(rows)[1:22] == [*VOC_NAMES, "background"]
    assert rows["background"][2] == f"{(ids == 0).sum():,}"
    assert rows["21"] == ["classes", "seen", f"{(ids < 255).sum():,}"]
    stored = read.PreparedSource(tmp_path / "records", VALIDATION)
    assert stored.vocabulary == fake.benchmark.load_vocabulary()  # of what is predicted


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.full((31, 31), -1, np.int16), "id -1 at row 0, column 0 is neither"),
        (np.ones((31, 31, 2), np.uint16), "in two dimensions, not uint16 (31, 31, 2)"),
        (np.ones((31, 31)), "integers in two dimensions, not float64 (31, 31)"),
    ],
)
def test_label_maps_that_are_none(tmp_path, value, reason):
    fake = make(tmp_path, ("pascal_context_459", "mat"))
    example = fake.example()
    write_mat(example.label, {"LabelMap": value})
    with pytest.raises(ValueError) as error:
        fake.benchmark.read(example)
    assert_names(error, example.label, reason)


def test_merged_background():
    benchmark = benchmarks.find("pascal_voc_20b")
    names = [entry["name"] for entry in class_entries("pascal_voc_20b")]
    table = benchmark.merge_table()
    assert table.shape == (256,) and table.dtype == np.uint8
    merged = [benchmark.merged_names[label] for label in table[: len(names)]]
    assert merged == [name if name in VOC_NAMES else "background" for name in names]
    assert (table[len(names) :] == 255).all()
    context = {entry["name"] for entry in class_entries("pascal_context_59")}
    assert set(names) == context


@pytest.mark.parametrize(
    ("size", "expected"),
    [((600, 900), (512, 768)), ((1537, 1024), (769, 512)), ((512, 700), None), ((511, 513), None)],
)
def test_large_ade_pictures_are_made_smaller(tmp_path, size, expected):
    fake = make(tmp_path, ("ade20k_full", ""))
    example = fake.example()
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.stack([rows * 255 / size[0], columns * 255 / size[1], 0 * rows], -1)
    Image.fromarray(image.astype(np.uint8)).save(example.image, "jpeg", quality=95)
    ids = np.array([entry["id"] for entry in class_entries("ade20k_full_847")])
    places = (rows // 40 * 26 + columns // 40) % 847
    write_ade(example.label, ids[places])
    small_image, small_label = fake.benchmark.read(example)
    height, width = expected or size
    assert small_image.shape == (height, width, 3) and small_label.shape == (height, width)
    assert small_label.dtype == np.uint16
    # Nearest: the pixel of the large label in which a small one's centre lies.
    source_rows = ((np.arange(height) + 0.5) * size[0] / height).astype(int)
    source_columns = ((np.arange(width) + 0.5) * size[1] / width).astype(int)
    np.testing.assert_array_equal(small_label, places[source_rows][:, source_columns])
    # The picture's colours are its coordinates: they stay aligned with the label's.
    inner = (slice(8, -8), slice(8, -8))
    wanted = image[source_rows][:, source_columns]
    assert np.abs(small_image[inner].astype(float) - wanted[inner]).max() < 6
    data = fake.benchmark.encoded_image(example)
    assert data is None if expected else data == example.image.read_bytes()


def test_large_ade_pictures_are_averaged(tmp_path):
    """Halved by Pillow's bilinear filter: a triangle over four pixels a side."""
    fake = make(tmp_path, ("ade20k_full", ""))
    example = fake.example()
    Image.effect_noise((1028, 1024), 60).convert("RGB").save(example.image, "jpeg", quality=95)
    write_ade(example.label, np.ones((1024, 1028), int))
    large = np.asarray(Image.open(example.image), float)
    for _ in range(2):
        first, second, third, fourth = (large[i : len(large) - 4 + i : 2] for i in (1, 2, 3, 4))
        large = ((first + 3 * second + 3 * third + fourth) / 8).swapaxes(0, 1)
    image, _ = fake.benchmark.read(example)
    assert image.shape == (512, 514, 3)
    np.testing.assert_allclose(image[1:-1, 1:-1], large, atol=1.5)


def test_ade_label_must_be_in_colour(tmp_path):
    fake = make(tmp_path, ("ade20k_full", ""))
    example = fake.example()
    write_png(example.label, np.zeros(SIZES[example.id[-1]]))
    with pytest.raises(ValueError) as error:
        fake.benchmark.read(example)
    assert_names(error, example.label, "RGB")


def test_ade_highest_id():
    assert max(entry["id"] for entry in class_entries("ade20k_full_847")) < ade20k_full.NUM_IDS


# Written by pycocotools 2.0.10 (`mask.encode`) for the masks that `golden_mask` draws.
GOLDEN_RUNS = {
    "figures": (
        "01i30[M00000000000J>H00000000000000000000000000000000000006B80000000000000000000000000000"
        "000000000c06WO000"
    ),
    "empty": "S1",
}


def golden_mask(name):
    if name == "empty":
        return np.zeros((7, 5), bool)
    mask = np.zeros((37, 53), bool)
    mask[5:20, 10:30] = mask[11, 3:50] = mask[30:, 50:] = mask[0, 0] = True
    return mask


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_masks_of_pycocotools(name):
    mask = golden_mask(name)
    np.testing.assert_array_equal(detail.decode_mask(GOLDEN_RUNS[name], mask.shape), mask)
    assert encode_mask(mask) == GOLDEN_RUNS[name]


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ("S1", "do not fill its 7x6"),
        ("n11", "do not fill its 7x6"),  # 46 pixels, then 1
        (compress([41]), "do not fill its 7x6"),
        (compress([43]), "do not fill its 7x6"),
        (compress([40, 3]), "do not fill its 7x6"),
        (compress([40, 5, -3]), "do not fill its 7x6"),
        ("S", "the runs 'S' are not"),
        ("~", "the runs '~' are not"),
        ("", "the runs '' are not"),
        ("P" * 7 + "1", "are not a mask's"),
    ],
)
def test_damaged_masks(runs, reason):
    with pytest.raises(ValueError, match=reason):
        detail.decode_mask(runs, (7, 6))


def decompress(text):
    """COCO's run lengths: see maskApi.c's comment on rleFrString. None: the text is cut off."""
    numbers, value, shift = [], 0, 0
    for code in (ord(character) - 48 for character in text):
        value |= (code & 31) << shift
        shift += 5
        if code & 32 == 0:
            value -= (code & 16) << shift >> 4
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    return None if shift else numbers


WRITTEN = st.lists(st.integers(0, 9), max_size=12).map(
    lambda runs: compress([*runs, max(0, 42 - sum(runs))])
)
LIKELY = st.text(st.sampled_from([chr(48 + code) for code in range(64)]), max_size=9)


@pytest.mark.slow
@given(runs=WRITTEN | LIKELY | st.text(max_size=5))
def test_runs_fill_the_mask_or_are_an_error(runs):
    """pycocotools alone leaves pixels uninitialised, and reads past the text's end."""
    alphabet = all(48 <= ord(character) < 112 for character in runs)
    numbers = decompress(runs) if alphabet else None
    if numbers and min(numbers) >= 0 and sum(numbers) == 42:
        expected = np.repeat(np.arange(len(numbers)) % 2 == 1, numbers).reshape(6, 7).T
        np.testing.assert_array_equal(detail.decode_mask(runs, (7, 6)), expected)
    else:
        with pytest.raises(ValueError, match="mask"):
            detail.decode_mask(runs, (7, 6))


def test_the_tests_own_run_lengths():
    for numbers in ([42], [0, 42], [9, 7, 3, 0, 23], [40, 1, 1000, 5, 2]):
        assert decompress(compress(numbers)) == numbers


def test_later_masks_cover_earlier_ones():
    left, all_ = np.zeros((4, 6), bool), np.ones((4, 6), bool)
    left[:, :3] = True
    masks = [detail.Mask(5, (4, 6), encode_mask(all_)), detail.Mask(9, (4, 6), encode_mask(left))]
    painted = detail.paint(detail.Annotation((4, 6), masks))
    np.testing.assert_array_equal(painted, np.where(left, 9, 5))
    with pytest.raises(ValueError, match="category 5.*size"):
        detail.paint(detail.Annotation((5, 6), masks))


def test_image_without_annotation(tmp_path):
    fake = make(tmp_path, ("pascal_context_59", "json"))
    example = fake.example()
    with pytest.raises(ValueError) as error:
        fake.benchmark.read(example._replace(id="2009_999999"))
    assert_names(error, example.label, "2009_999999")


@pytest.mark.parametrize(
    "content", ['{"images": []}', '{"images": [{"image_id": 1}]}', "[]", "{", "", '{"images" 1}']
)
def test_other_json(tmp_path, content):
    path = tmp_path / "trainval_merged.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        detail.load(path)
    assert_names(error, path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [("wood", "would", "absent: wood"), ("1: ", "one: ", "expected lines as '1: aeroplane'")],
)
def test_damaged_list_of_names(tmp_path, old, new, reason):
    fake = make(tmp_path, ("pascal_context_59", "png"))
    example = fake.example()
    path = tmp_path / "59_labels.txt"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        fake.benchmark.read(example)
    assert_names(error, path, reason)
