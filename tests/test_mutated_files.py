"""Files of every kind that is read, damaged: one clear line or a well-formed result.

Nothing in a file is executed, no process is started and no file written. `--fast` damages 100 files
of each kind, the whole suite as many of 2,000 as its time allows.
"""

import argparse
import functools
import json
import logging
import shutil
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import array_files
import mutations
import numpy as np
import pytest
from clips import RESNET, VIT
from folders import make_folder
from PIL import Image

from configs import openmoji
from zegformer_jax.cli import predict
from zegformer_jax.experiment import Experiment
from zegformer_jax.input import decoding
from zegformer_jax.input.folder import Folder
from zegformer_jax.input.photographs import read_photograph
from zegformer_jax.input.records import read
from zegformer_jax.input.records.write import prepare
from zegformer_jax.pretrained.clip import configs
from zegformer_jax.pretrained.formats import read_archive
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.prompts import load_templates
from zegformer_jax.text.tokenizer import Tokenizer, train_tokenizer
from zegformer_jax.text.vocabulary import Vocabulary
from zegformer_jax.text.word_vectors import load_word_vectors
from zegformer_jax.training.log import METRICS_FILE, read_metrics

FAST, SLOW = 100, 2000
SECONDS = 3.0  # of each kind in the whole suite
LONGEST_LINE = 1000
CLASSES = {"classes": [{"name": "cat", "id": 3}, {"name": "sofa, couch", "seen": False}]}


def picture(mode="RGB"):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    return small.resize((36, 27), Image.Resampling.BICUBIC).convert(mode)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def written(path, content):
    text = content if isinstance(content, str) else json.dumps(content, indent=1)
    path.write_text(text)
    return path


def is_picture(found):
    return found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3


def is_label(found):
    return found.dtype in (np.uint8, np.uint16, np.int32) and found.ndim == 2


def is_vocabulary(found):
    return len(found.names) == len(found.ids) == len(found.seen) > 0


def are_arrays(found):
    arrays = found.tensors.values()
    return all(x.dtype.kind in "biufc" and np.array(x).nbytes < 1 << 20 for x in arrays)


def photographs(name, mode="RGB", **options):
    return (
        lambda folder: saved(folder / name, picture(mode), **options),
        read_photograph,
        is_picture,
    )


def labels(name, dtype):
    values = np.random.default_rng(1).integers(0, 300 if dtype == np.uint16 else 9, (20, 30))
    return (
        lambda folder: saved(folder / name, Image.fromarray(values.astype(dtype))),
        lambda path: decoding.decode_label(path.read_bytes(), path),
        is_label,
    )


def text_file(name, content, read_file, is_right):
    return lambda folder: written(folder / name, content), read_file, is_right


def word_vectors(folder):
    np.savez(folder / "words.npz", names=np.array(["cat", "dog"]), vectors=np.ones((2, 8)))
    return folder / "words.npz"


def tokenizer_file(name):
    def make(folder):
        train_tokenizer(["a cat", "a cat on the mat"] * 3, 520, 16).save(folder)
        if name != "tokenizer.json":
            (folder / "tokenizer.json").unlink()  # which is read first
        return folder / name

    return make, lambda path: Tokenizer.from_directory(path.parent, 16)("a cat"), is_tokens


def read_names(path):
    flags = argparse.Namespace(classes=None, classes_file=path)
    return Vocabulary.from_names(predict.read_classes(flags))


def has_width(config):
    return config.embed_dim > 0


def clip_config(folder):
    configs.save_hugging_face(folder, VIT, 0, VIT.eos_token_id)
    return folder / "config.json"


def is_tokens(found):
    return found.shape == (1, 16)


@functools.cache
def prepared():
    """Returns a folder of records."""
    folder = Path(tempfile.mkdtemp())
    mine = make_folder(folder / "mine", 2, 1)
    prepare(Folder.open(mine), mine, folder / "records", workers=1, progress=False)
    return folder / "records"


def records_file(name):
    def make(folder):
        shutil.copytree(prepared(), folder / "records")
        return next((folder / "records").glob(name))

    return make, read_records, lambda found: all(is_picture(x["image"]) for x in found)


def read_records(path):
    source = read.PreparedSource(path.parent, "train")
    source.fingerprint(), source.count_labels([0])
    return [source[i] for i in range(min(len(source), 2))]


def arrays_file(path):
    array_files.FORMATS[path.name](path)
    return path


KINDS = {
    "photograph.png": photographs("x.png"),
    "photograph in 16 bits": photographs("x.png", "I;16"),
    "photograph with a palette": photographs("x.png", "P"),
    "photograph.jpg": photographs("x.jpg"),
    "photograph.tif": photographs("x.tif", compression="tiff_lzw"),
    "photograph.webp": photographs("x.webp"),
    "photograph.gif": photographs("x.gif", "P"),
    "photograph.bmp": photographs("x.bmp"),
    "label.png": labels("y.png", np.uint8),
    "label in 16 bits": labels("y.png", np.uint16),
    "classes.json": text_file("classes.json", CLASSES, Vocabulary.load, is_vocabulary),
    "list of classes": text_file("c.txt", "cat\nsofa, couch\n", read_names, is_vocabulary),
    "prompts": text_file(
        "p.json", {"mine": ["a {}.", "the {}."]}, lambda p: load_templates(f"{p}:mine"), len
    ),
    "metrics": text_file(
        METRICS_FILE, '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n',
        lambda path: read_metrics(path.parent), lambda found: all("step" in x for x in found),
    ),
    "experiment.json": text_file(
        "experiment.json", json.loads(openmoji.get_config().to_json_best_effort()),
        lambda path: Experiment.open(None, path.parent), lambda found: found.eval is not None,
    ),
    "word vectors": (
        word_vectors, lambda path: load_word_vectors(path, ["cat"]), lambda x: x.shape == (1, 8)
    ),
    "config.json": (clip_config, configs.from_hugging_face, has_width),
    "open_clip_config.json": text_file(
        "open_clip_config.json", configs.open_clip_config(RESNET), configs.from_open_clip, has_width
    ),
    "index of records": records_file("train.index.json"),
    "summary of records": records_file(read.INFO_FILE),
    "features of records": records_file(read.FEATURES_FILE),
    "records": records_file("*train*array_record*"),
    "tokenizer.json": tokenizer_file("tokenizer.json"),
    "vocab.json": tokenizer_file("vocab.json"),
    "merges.txt": tokenizer_file("merges.txt"),
    **{
        name: (lambda folder, name=name: arrays_file(folder / name), read_archive, are_arrays)
        for name in array_files.FORMATS
    },
}  # fmt: skip


@pytest.fixture
def quiet(monkeypatch):
    """Warnings of libraries are no errors here: a damaged file may give them."""
    monkeypatch.setattr(logging.getLogger("zegformer_jax"), "disabled", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def end_of(read_file, is_right, path):
    """Reads a damaged file; returns "read", or "refused" with one line."""
    try:
        found = read_file(path)
    except (UserError, ValueError) as error:
        line = str(error)
        assert isinstance(error, UserError) or path.name in array_files.FORMATS, repr(error)
        assert "\n" not in line and 0 < len(line) < LONGEST_LINE
        return "refused"
    assert is_right(found)
    return "read"


@pytest.mark.parametrize("count", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_in_one_line_or_well_formed(kind, count, tmp_path, quiet):
    make, read_file, is_right = KINDS[kind]
    path = make(tmp_path)
    data, ends, start = path.read_bytes(), [], time.monotonic()
    assert end_of(read_file, is_right, path) == "read"
    rng = np.random.default_rng([zlib.crc32(kind.encode()), count])
    while len(ends) < count and (len(ends) < FAST or time.monotonic() - start < SECONDS):
        path.write_bytes(mutations.mutate(rng, data))
        with mutations.watched() as executed:
            ends.append(end_of(read_file, is_right, path))
        assert not executed
    assert "refused" in ends
