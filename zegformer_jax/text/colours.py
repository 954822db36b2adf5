"""Colours of classes in label images, from the fields `colour` and `ignored_colours`."""

from collections.abc import Iterable, Mapping, Sequence

from zegformer_jax.runtime.errors import UserError

Colour = tuple[int, int, int]  # red, green, blue


def colours_of(classes: Sequence[Mapping[str, object]], where: str) -> tuple[object, ...]:
    """Returns the colours of JSON's classes; an empty tuple if none has one.

    Raises:
        UserError: The field has another spelling.
    """
    if any("color" in item for item in classes):
        raise UserError(f"{where}: the field 'color' is spelled 'colour'")
    colours = as_tuples(item.get("colour") for item in classes)
    return colours if any(x is not None for x in colours) else ()


def as_tuples(values: Iterable[object]) -> tuple[object, ...]:
    """Returns JSON's lists as tuples; other values are for `check_colours` to refuse."""
    return tuple(tuple(x) if isinstance(x, list) else x for x in values)


def check_colours(
    colours: Sequence[object], ignored: Sequence[object], classes: int, where: str
) -> None:
    """Checks the colours of classes.

    Args:
        colours: A colour for each class, or none at all.
        ignored: Colours that mean no label.
        classes: Number of classes.
        where: The start of error messages.

    Raises:
        UserError: A class has no colour and others have, or a colour is not three numbers in
            0..255 or has two meanings.
    """
    if colours and len(colours) != classes:
        raise UserError(f"{where}: lengths differ: {classes} names, {len(colours)} colours")
    if ignored and not colours:
        raise UserError(f"{where}: 'ignored_colours' needs a 'colour' of each class")
    places: dict[object, str] = {}
    named = [(f"entry {entry}: 'colour'", colour) for entry, colour in enumerate(colours, 1)]
    for place, colour in [*named, *(("'ignored_colours'", colour) for colour in ignored)]:
        if not _is_colour(colour):
            raise UserError(
                f"{where}: {place} must be [red, green, blue] of 0..255, got {colour!r}; give a "
                "colour to all classes or to none"
            )
        first = places.setdefault(colour, place)
        if first != place:
            raise UserError(f"{where}: {place} {list(colour)} is the same as {first}")


def _is_colour(value: object) -> bool:
    is_triple = isinstance(value, tuple) and len(value) == 3
    return is_triple and all(type(x) is int and 0 <= x <= 255 for x in value)
