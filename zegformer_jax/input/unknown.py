"""Values of labels that are neither a class's nor ignored, and what to do about them."""

import collections
import itertools
import json
from collections.abc import Collection, Iterable, Sequence

from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import Vocabulary

MOST_NAMED = 8  # values in a message


Value = int | str | Sequence[int]  # an id, a shape's name, or a colour [red, green, blue]


class UnknownValues(UserError):
    """Error of labels with ids, names or colours that are neither a class's nor ignored.

    Attributes:
        values: The ids, names or colours, rising.
    """

    def __init__(self, message: str, values: Iterable[Value]):
        """Takes the message and the values."""
        super().__init__(message)
        self.values = tuple(values)


def count_values(found: Iterable[Sequence[Value]], total: int) -> str:
    """Describes in how many label images each unknown value is.

    Args:
        found: Unknown values of each label image that has any.
        total: Number of label images.

    Returns:
        A text such as "id 11 in 16 of 16 annotations, id 12 in 3".
    """
    names = map(name_value, itertools.chain.from_iterable(found))
    counts = collections.Counter(names).most_common()
    parts = [f"{name} in {count}" for name, count in counts[:MOST_NAMED]]
    parts[0] += f" of {total} annotations"
    if len(counts) > MOST_NAMED:
        parts.append(f"and {len(counts) - MOST_NAMED} more")
    return ", ".join(parts)


def name_value(value: Value) -> str:
    """Returns a name such as "id 11", "name 'cat'" or "colour [128, 0, 0]"."""
    if isinstance(value, str):
        return f"name {value!r}"
    return f"id {value}" if isinstance(value, int) else f"colour {list(value)}"


def advise(values: Collection[Value], classes: Vocabulary) -> str:
    """Returns what to do about unknown values in a user's folder.

    Args:
        values: The values.
        classes: The folder's classes.
    """
    are_names = any(isinstance(value, str) for value in values)
    if len(values) > MOST_NAMED and not are_names:
        return "so many values are no classes: is it a label image, and resized without smoothing?"
    field = "ignored_colours" if classes.colours else "ignored_ids"
    field = "ignored_names" if are_names else field
    ignored = json.dumps(sorted({*getattr(classes, field), *values}), ensure_ascii=False)
    what = "it means" if len(values) == 1 else "they mean"
    them = "its class" if len(values) == 1 else "their classes"
    text = f'if {what} no label, add "{field}": {ignored} to classes.json, else list {them} there'
    if field != "ignored_ids" or len(classes) == 1:  # one class is no sign of a shift
        return text
    for step in (1, -1):
        if {id_ + step for id_ in classes.ids} - set(classes.ids) == set(values):
            text += f"; {advise_shift(classes, step)}"
    return text


def advise_shift(classes: Vocabulary, step: int) -> str:
    """Returns what to do if the labels' ids are those of the classes plus `step`."""
    first = min(range(len(classes)), key=lambda place: classes.ids[place])
    id_, name = classes.ids[first] + step, classes.names[first]
    return f'if the labels count from {id_}, write "id": {id_} for {name!r}, and so on'
