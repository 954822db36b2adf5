"""Vocabularies: class names with synonyms, ids in annotation files, the seen/unseen split."""

import dataclasses
import json
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from zegformer_jax.runtime.assets import DATA
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.runtime.files import decode_text
from zegformer_jax.text.cleaning import is_writable, plain_name
from zegformer_jax.text.colours import Colour, as_tuples, check_colours, colours_of
from zegformer_jax.text.synonyms import quote_both, spellings_of, split_synonyms

IGNORE_LABEL_8BIT = 255
IGNORE_LABEL_16BIT = 65535


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Classes in evaluation order. Label maps hold indices 0..C-1 in this order.

    Attributes:
        names: C names; commas separate synonyms ("sofa, couch").
        seen: C flags; True if the class may appear in training labels.
        ids: C pixel values of the classes in the original annotation files, also the ignore label.
        ignore_label: The label of ignored pixels, 255 (uint8 labels) or 65535 (uint16 labels).
        ignored_ids: Further pixel values of annotation files that mean no label.
        colours: C colours of the classes in annotation files in colour, in place of ids, or none.
        ignored_colours: Colours of such files that mean no label.
        ignored_names: Names of shapes in annotation files that mean no label.

    Raises:
        UserError: Empty list, empty or repeated name, repeated id or colour, lengths that differ,
            or more classes than the label type holds; an ignored id or name that belongs to a class
            or is none.
    """

    names: tuple[str, ...]
    seen: tuple[bool, ...]
    ids: tuple[int, ...]
    ignore_label: int = IGNORE_LABEL_8BIT
    ignored_ids: tuple[int, ...] = ()
    colours: tuple[Colour, ...] = ()
    ignored_colours: tuple[Colour, ...] = ()
    ignored_names: tuple[str, ...] = ()

    def __post_init__(self):
        """Checks the entries."""
        _check(self, "vocabulary")
        check_colours(self.colours, self.ignored_colours, len(self), "vocabulary")

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads a vocabulary from JSON, in the format of `data/vocabularies/*.json`.

        Args:
            path: File with `classes`, a list of objects with `name` and optionally `seen` (default
                true), `id` (default: the index in the list) and `colour` ([red, green, blue]), and
                optionally `ignore_label` (255), `ignored_ids`, `ignored_colours`, `ignored_names`
                (none). Or such a list alone, or a list of names.

        Returns:
            The vocabulary; white space around names is removed.

        Raises:
            MissingFile: There is no such file.
            UserError: The file is not such JSON, or its classes fail the checks; one line that
                starts with the file's name and counts entries from 1.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFile(f"{path}: no such vocabulary file; see data/vocabularies/")
        return cls.parse(path.read_bytes(), path.name)

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> "Vocabulary":
        """Reads a vocabulary from the JSON text of a file, in the format that `load` takes.

        Args:
            text: The content, bytes in UTF-8.
            where: The start of error messages, such as the name of the file.

        Raises:
            UserError: The text is not such JSON, or its classes fail the checks; one line.
        """
        if isinstance(text, bytes):
            text = decode_text(text, where)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
        return _from_json(content, where)

    @classmethod
    def from_names(
        cls,
        names: Sequence[str],
        seen: Sequence[bool] | None = None,
        where: str = "vocabulary",
    ) -> "Vocabulary":
        """Makes a vocabulary from class names; their ids are 0 to C-1.

        Args:
            names: C names, commas separating synonyms.
            seen: C flags; None marks all classes as seen.
            where: The start of error messages, such as the name of a file.

        Raises:
            UserError: The vocabulary's checks fail.
            ValueError: The names are a single text, or a set, whose order is random.
        """
        if isinstance(names, str):
            raise ValueError(f"vocabulary: expected a list of names, got the text {names!r}")
        if isinstance(names, Set):
            raise ValueError("vocabulary: expected a list of names, got a set, which has no order")
        names = tuple(name.strip() if isinstance(name, str) else name for name in names)
        seen = (True,) * len(names) if seen is None else tuple(bool(flag) for flag in seen)
        small = len(names) <= IGNORE_LABEL_8BIT
        ignore_label = IGNORE_LABEL_8BIT if small else IGNORE_LABEL_16BIT
        return _make(where, names, seen, tuple(range(len(names))), ignore_label)

    def to_json(self) -> str:
        """Returns the JSON text that `load` and `parse` read."""
        classes = [
            {"id": id_, "name": name, "seen": seen}
            for id_, name, seen in zip(self.ids, self.names, self.seen, strict=True)
        ]
        for item, colour in zip(classes, self.colours, strict=False):  # if there are any
            item["colour"] = colour
        content = {"ignore_label": self.ignore_label, "classes": classes}
        for field in ("ignored_ids", "ignored_colours", "ignored_names"):
            if getattr(self, field):
                content[field] = getattr(self, field)
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def __len__(self) -> int:
        """Returns the number of classes, C."""
        return len(self.names)

    def synonyms(self, index: int) -> tuple[str, ...]:
        """Returns the synonyms in class `index`'s name, in order, at least one."""
        return split_synonyms(self.names[index])

    @property
    def seen_indices(self) -> np.ndarray:
        """Indices of the seen classes: int32 [S], rising."""
        return np.flatnonzero(self.seen).astype(np.int32)

    @property
    def label_dtype(self) -> np.dtype:
        """Type of label maps: uint8 if the ignore label is 255, else uint16."""
        return np.dtype(np.uint8 if self.ignore_label == IGNORE_LABEL_8BIT else np.uint16)

    def select(self, indices: Sequence[int]) -> "Vocabulary":
        """Returns the vocabulary of the classes at `indices`, in that order, with their own ids."""
        indices = [int(index) for index in indices]
        return Vocabulary(
            names=tuple(self.names[i] for i in indices),
            seen=tuple(self.seen[i] for i in indices),
            ids=tuple(self.ids[i] for i in indices),
            ignore_label=self.ignore_label,
            ignored_ids=self.ignored_ids,
            colours=tuple(self.colours[i] for i in indices if self.colours),
            ignored_colours=self.ignored_colours,
            ignored_names=self.ignored_names,
        )

    def seen_part(self) -> "Vocabulary":
        """Returns the vocabulary of the seen classes, which a model is trained on.

        Raises:
            UserError: No class is seen.
        """
        if not any(self.seen):
            raise UserError(
                'vocabulary: no class is seen, so nothing can be trained; mark some "seen": true'
            )
        return self.select(self.seen_indices)

    def training_table(self) -> np.ndarray:
        """Returns the table from labels 0..C-1 to training labels, the indices among seen classes.

        Returns:
            uint8 [256] or uint16 [65536] (`label_dtype`). Other entries are the ignore label, so
            that unseen classes never enter the loss.
        """
        seen = self.seen_indices
        table = np.full(self.ignore_label + 1, self.ignore_label, self.label_dtype)
        table[seen] = np.arange(len(seen))
        return table


def load_vocabulary(name: str) -> Vocabulary:
    """Reads a vocabulary.

    Args:
        name: Name of a file in data/vocabularies without its suffix, or the path of a `.json` file.

    Raises:
        MissingFile: There is no such file.
        UserError: The file is no vocabulary; see `Vocabulary.load`.
    """
    path = Path(name) if name.endswith(".json") else DATA / "vocabularies" / f"{name}.json"
    return Vocabulary.load(path)


def _from_json(content: object, where: str) -> Vocabulary:
    if isinstance(content, list):  # as in the class files of other implementations
        content = {"classes": [{"name": x} if isinstance(x, str) else x for x in content]}
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(classes, list):
        raise UserError(f"{where}: expected a list of names, or an object with a list 'classes'")
    for entry, item in enumerate(classes, 1):
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise UserError(f"{where}: entry {entry} needs a 'name' that is text, got {item!r}")
        if not isinstance(item.get("seen", True), bool):
            raise UserError(f"{where}: entry {entry}: 'seen' must be true or false")
    for kind in ("ids", "colours", "names"):
        if not isinstance(content.get(field := f"ignored_{kind}", []), list):
            raise UserError(f"{where}: '{field}' must be a list of {kind}, got {content[field]!r}")
    return _make(
        where,
        names=tuple(item["name"].strip() for item in classes),
        seen=tuple(item.get("seen", True) for item in classes),
        ids=tuple(item.get("id", place) for place, item in enumerate(classes)),
        ignore_label=content.get("ignore_label", IGNORE_LABEL_8BIT),
        ignored_ids=tuple(content.get("ignored_ids", [])),
        colours=colours_of(classes, where),
        ignored_colours=as_tuples(content.get("ignored_colours", [])),
        ignored_names=tuple(content.get("ignored_names", [])),
    )


def _make(where: str, *fields: Any, **more_fields: Any) -> Vocabulary:
    """Makes a vocabulary; the errors of its checks start with `where`."""
    try:
        return Vocabulary(*fields, **more_fields)
    except ValueError as error:
        raise UserError(str(error).replace("vocabulary", where, 1)) from None


def _check(vocabulary: Vocabulary, where: str) -> None:
    names, ids, ignore_label = vocabulary.names, vocabulary.ids, vocabulary.ignore_label
    if not names:
        raise UserError(f"{where}: the list of classes is empty")
    if not len(names) == len(vocabulary.seen) == len(ids):
        lengths = f"{len(names)} names, {len(vocabulary.seen)} seen flags, {len(ids)} ids"
        raise UserError(f"{where}: lengths differ: {lengths}")
    if ignore_label not in (IGNORE_LABEL_8BIT, IGNORE_LABEL_16BIT):
        raise UserError(f"{where}: ignore_label must be 255 or 65535, not {ignore_label!r}")
    if len(names) > ignore_label:
        limit = f"ignore_label {ignore_label} leaves room for {ignore_label}"
        raise UserError(f"{where}: {len(names)} classes, but {limit}; use 65535")
    first_by_name, first_by_id = {}, {}
    for entry, (name, id_) in enumerate(zip(names, ids, strict=True), 1):
        if not isinstance(name, str) or not split_synonyms(name):
            raise UserError(f"{where}: entry {entry} has an empty name ({name!r})")
        if not is_writable(name):
            raise UserError(f"{where}: entry {entry} has a control character in its name: {name!a}")
        first = first_by_name.setdefault(spellings_of(name), entry)
        if first != entry:
            spellings = quote_both(names[first - 1], name)
            raise UserError(f"{where}: {spellings} (entries {first} and {entry}): remove one")
        if type(id_) is not int or not 0 <= id_ <= IGNORE_LABEL_16BIT:
            raise UserError(f"{where}: entry {entry}: id {id_!r} is not in 0..{IGNORE_LABEL_16BIT}")
        first = first_by_id.setdefault(id_, entry)
        if first != entry:
            raise UserError(f"{where}: id {id_} is used twice (entries {first} and {entry})")
    for id_ in vocabulary.ignored_ids:
        if type(id_) is not int or not 0 <= id_ <= IGNORE_LABEL_16BIT:
            raise UserError(f"{where}: ignored id {id_!r} is not in 0..{IGNORE_LABEL_16BIT}")
        if id_ in first_by_id:
            raise UserError(f"{where}: id {id_} is ignored and entry {first_by_id[id_]}'s at once")
    for name in vocabulary.ignored_names:
        if not isinstance(name, str) or spellings_of(name) in first_by_name:
            raise UserError(f"{where}: ignored name {name!r} is a class's, or no text")


def mark_seen(vocabulary: Vocabulary, trained: Vocabulary) -> Vocabulary:
    """Returns the vocabulary with those classes marked seen that were seen in a training.

    A class counts as seen if one of its synonyms names a class of the training.

    Args:
        vocabulary: Any classes.
        trained: The training's vocabulary; only its seen classes count.
    """
    known = {plain_name(x) for place in trained.seen_indices for x in trained.synonyms(place)}
    seen = tuple(
        any(plain_name(name) in known for name in vocabulary.synonyms(place))
        for place in range(len(vocabulary))
    )
    return dataclasses.replace(vocabulary, seen=seen)
