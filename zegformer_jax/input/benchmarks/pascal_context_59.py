"""PASCAL-Context, its 59 most frequent classes; background ignored."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from zegformer_jax.input.benchmarks import detail, files
from zegformer_jax.input.benchmarks.benchmark import Example
from zegformer_jax.input.benchmarks.pascal_context import (
    LABEL_MAPS,
    UNLABELLED,
    VOC_2010,
    PascalContext,
    places,
)
from zegformer_jax.input.benchmarks.published import TRAIN, VALIDATION
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text.vocabulary import Vocabulary, load_vocabulary

DETAIL = files.Archive(
    "trainval_merged.json (PASCAL in Detail)",
    "https://codalabuser.blob.core.windows.net/public/trainval_merged.json",
    ("trainval_merged.json",),
)
LABEL_PICTURES = files.Archive(
    "59_context_labels.tar.gz",
    "https://cs.stanford.edu/~roozbeh/pascal-context/59_context_labels.tar.gz",
    ("59_context_labels/*.png",),
)
LABEL_NAMES = files.Archive(
    "59_labels.txt",
    "https://cs.stanford.edu/~roozbeh/pascal-context/59_labels.txt",
    ("59_labels.txt",),
)
# Three classes have other names in 59_labels.txt, and one among the 459 (shelhamer,
# fcn.berkeleyvision.org, pascalcontext_layers.py).
NAMES_IN_LIST = {"bedcloth": "bedclothes", "clothes": "cloth", "table": "diningtable"}
NAMES_IN_459 = {"table": "diningtable"}
VOCABULARY_459 = "pascal_context_459"


@dataclasses.dataclass(frozen=True, eq=False)
class PascalContext59(PascalContext):
    """The 59 of 459 classes, from any of their three publications.

    PASCAL in Detail and the MATLAB files have the ids of the 459 classes. The label images count
    from 1 in the order of their own list, which differs from the vocabulary's, so the list is read.
    """

    def _find_labels(self, source: Path) -> Callable[[str], Path]:
        for place in places(DETAIL.gives[0]):
            if (source / place).is_file():
                detail.load(source / place)  # here: a damaged file is one error, not one per record
                return lambda _: source / place
        if (source / "59_context_labels").is_dir():
            files.find(source, ["59_labels.txt", "59_context_labels/59_labels.txt"], LABEL_NAMES)
            return lambda id_: source / "59_context_labels" / f"{id_}.png"
        if any((source / place).is_dir() for place in ("trainval", *places("trainval"))):
            return super()._find_labels(source)
        raise MissingFile(
            f"{files.missing(source / '59_context_labels', LABEL_PICTURES)}; alternatives are "
            f"{DETAIL.file}, see {DETAIL.address}, and {LABEL_MAPS.file}, see {LABEL_MAPS.address}"
        )

    def _read_label(self, example: Example) -> np.ndarray:
        path = example.label
        if path.suffix == ".json":
            ids_hw, table = _read_detail(path, example.id), self._table
        elif path.suffix == ".mat":
            ids_hw, table = files.read_matlab(path, "LabelMap"), self._table
        else:
            ids_hw, table = files.read_ids(path), self._list_table(path.parent)
        return files.map_ids(ids_hw, table, path, self._label_dtype)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        vocabulary = self.load_vocabulary()
        names_459 = [NAMES_IN_459.get(n, n) for n in load_vocabulary(VOCABULARY_459).names]
        ids = [names_459.index(name) + 1 for name in vocabulary.names]
        ignored = range(len(names_459) + 1)  # 0 and the 400 other classes
        return files.label_table(ids, ignored, vocabulary.ignore_label)

    def _list_table(self, folder: Path) -> np.ndarray:
        beside, inside = folder.parent / "59_labels.txt", folder / "59_labels.txt"
        return _table_of_list(beside if beside.is_file() else inside, self.load_vocabulary())


def _read_detail(path: Path, id_: str) -> np.ndarray:
    annotations = detail.load(path)
    if id_ not in annotations:
        raise UserError(f"{path}: has no image {id_}")
    try:
        return detail.paint(annotations[id_])
    except ValueError as error:
        raise UserError(f"{path}: image {id_}: {error}") from error


@functools.cache
def _table_of_list(path: Path, vocabulary: Vocabulary) -> np.ndarray:
    """Returns the table from label images' ids to labels, from their list of "1: aeroplane"."""
    ids = {}
    for line in files.read_lines(path):
        id_, _, name = line.partition(":")
        name = name.replace(" ", "")
        if not id_.strip().isdigit() or not name:
            raise UserError(f"{path}: expected lines as '1: aeroplane', got {line!r}")
        ids[NAMES_IN_LIST.get(name, name)] = int(id_)
    absent = [name for name in vocabulary.names if name not in ids]
    if absent or len(ids) != len(vocabulary):
        raise UserError(f"{path}: not the list of the 59 classes; absent: {', '.join(absent)}")
    ids = [ids[name] for name in vocabulary.names]
    return files.label_table(ids, (UNLABELLED,), vocabulary.ignore_label)


BENCHMARK = PascalContext59(
    name="pascal_context_59",
    vocabulary="pascal_context_59",
    counts={TRAIN: 4998, VALIDATION: 5104},
    category_offset=1,
    archives=(VOC_2010, DETAIL, LABEL_PICTURES, LABEL_NAMES, LABEL_MAPS),
    advice=(
        "Next to the first, one publication of the labels is enough: PASCAL in Detail, the label "
        "images with their list of names, or the MATLAB files; the first that exists is read."
    ),
)
