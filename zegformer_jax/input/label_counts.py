"""Pixels of the classes in a split's labels, and what may be wrong if a class has none."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from zegformer_jax.input.records.processes import count_cores
from zegformer_jax.input.unknown import (
    MOST_NAMED,
    UnknownValues,
    advise,
    advise_shift,
    count_values,
    name_value,
)
from zegformer_jax.text.vocabulary import Vocabulary

READ_AT_ONCE = 64  # labels that are read before the counts are looked at


class LabelCounts(NamedTuple):
    """Pixels of a split's labels.

    Attributes:
        pixels: int64 [C], pixels of each class.
        ignored: Number of pixels without a label.
    """

    pixels: np.ndarray
    ignored: int


def count_labels(
    read_label: Callable[[int], np.ndarray],
    count: int,
    classes: Vocabulary,
    wanted: Sequence[int],
) -> LabelCounts:
    """Counts pixels, in label after label until all wanted classes were found.

    Args:
        read_label: Function from an index to a label map in the order of the classes.
        count: Number of labels.
        classes: Classes of the labels.
        wanted: Indices of classes.

    Returns:
        Counts of all labels if a wanted class has no pixel, else of those that were read.

    Raises:
        UnknownValues: Labels have unknown ids or colours; one message for all labels.
        UserError: A label cannot be read.
    """
    totals, unknown = np.zeros(classes.ignore_label + 1, np.int64), []

    def count_pixels(index: int) -> np.ndarray | UnknownValues:
        try:
            return np.bincount(read_label(index).ravel(), minlength=len(totals))
        except UnknownValues as error:
            return error

    # Files are often named after what they show, so that the first ones are of one class.
    order = np.random.default_rng(0).permutation(count)
    with ThreadPoolExecutor(count_cores()) as pool:
        for start in range(0, count, READ_AT_ONCE):
            for found in pool.map(count_pixels, order[start : start + READ_AT_ONCE]):
                if isinstance(found, UnknownValues):
                    unknown.append(found)
                else:
                    totals += found
            if not unknown and totals[wanted].all():
                break
    if unknown:
        raise _join(unknown, count, classes)
    return LabelCounts(totals[: len(classes)], int(totals[classes.ignore_label]))


def _join(errors: Sequence[UnknownValues], count: int, classes: Vocabulary) -> UnknownValues:
    """Returns one error for those of several labels."""
    if len(errors) == 1:
        return errors[0]
    found = [error.values for error in errors]
    values = {value for values in found for value in values}
    return UnknownValues(f"{count_values(found, count)}; {advise(values, classes)}", sorted(values))


def find_fault(source: Any, classes: Vocabulary, wanted: Sequence[int], is_own: bool) -> str:
    """Describes what is wrong with the labels of a split; see `describe_fault`.

    Args:
        source: The split, a `zegformer_jax.input.datasets.Source`.
        classes: Classes of its labels.
        wanted: Indices of the classes that should have pixels.
        is_own: True if the classes are the user's own, who may have mistaken ids. A part of a
            published data set may lack classes, but not all of them.
    """
    counts = source.count_labels(wanted)
    if counts is None:
        return ""
    if not is_own:
        found = counts.pixels[wanted].any()
        return "" if found else f"no pixel shows any of {len(wanted)} classes"
    return describe_fault(counts, classes, wanted)


def describe_fault(counts: LabelCounts, classes: Vocabulary, wanted: Sequence[int]) -> str:
    """Describes classes without any pixel, and what may be the reason.

    Args:
        counts: Pixels of the labels.
        classes: Classes of the labels, as a user's `classes.json` lists them.
        wanted: Indices of the classes that should have pixels.

    Returns:
        One line without the name of the split; empty if nothing is wrong.
    """
    missing = [int(place) for place in wanted if not counts.pixels[place]]
    if missing:
        what = _describe_missing(missing, counts, classes)
        return "; ".join([what, *_guess_reasons(missing, counts, classes)])
    if _looks_like_masks(counts, classes):
        name, ignore = classes.names[0], classes.ignore_label
        return (
            f"{name!r} (id 0) is the only class, and {_share(counts)} of the pixels are {ignore}, "
            f'which means no label: if {ignore} is the class, write "id": {ignore} for it in '
            'classes.json; if the labels are polygons, list a class "background" for the rest; if '
            f'{ignore} means no label, add "ignored_ids": [{ignore}]'
        )
    return ""


def _describe_missing(missing: Sequence[int], counts: LabelCounts, classes: Vocabulary) -> str:
    if not counts.pixels.any():
        return "no pixel has a label"
    values = classes.colours or classes.ids
    names = [f"{classes.names[i]!r} ({name_value(values[i])})" for i in missing[:MOST_NAMED]]
    if len(missing) > MOST_NAMED:
        names.append(f"and {len(missing) - MOST_NAMED} more")
    number = f"{len(missing)} of {len(classes)} classes: " if len(missing) > 1 else ""
    return f"no pixel shows {number}{', '.join(names)}"


def _guess_reasons(missing: Sequence[int], counts: LabelCounts, classes: Vocabulary) -> list[str]:
    if classes.colours or not counts.ignored:
        return []
    ids = set(classes.ids)
    ignored = {classes.ignore_label, *classes.ignored_ids} - ids
    reasons = [_describe_ignored(counts, sorted(ignored, reverse=True))]
    absent = {classes.ids[place] for place in missing}
    for step in (1, -1):
        moved = {id_ + step for id_ in ids}
        if absent < ids and absent == ids - moved and moved - ids <= ignored:
            reasons.append(advise_shift(classes, step))
    return reasons


def _describe_ignored(counts: LabelCounts, ignored: Sequence[int]) -> str:
    names = " or ".join(map(str, ignored[:MOST_NAMED]))
    means, id_ = ("means", f'"id": {names}') if len(ignored) == 1 else ("mean", 'that "id"')
    return (
        f"{_share(counts)} of the pixels are {names}, which {means} no label: if {names} is a "
        f"class, give it {id_} in classes.json"
    )


def _looks_like_masks(counts: LabelCounts, classes: Vocabulary) -> bool:
    """Returns True if 255 may be the object that the only class names."""
    says_nothing = not (classes.ignored_ids or classes.colours)
    return classes.ids == (0,) and says_nothing and counts.ignored > 0


def _share(counts: LabelCounts) -> str:
    return f"{counts.ignored / (counts.pixels.sum() + counts.ignored):.1%}"
