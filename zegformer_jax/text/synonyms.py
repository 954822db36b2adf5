"""Synonyms in the name of a class, and names that are spellings of one class."""

import unicodedata

from zegformer_jax.text.cleaning import plain_name


def split_synonyms(name: str) -> tuple[str, ...]:
    """Returns the synonyms of a class name, which commas separate."""
    return tuple(part.strip() for part in name.split(",") if part.strip())


def spellings_of(name: str) -> frozenset[str]:
    """Returns the synonyms to compare: equal for two names of one class, in any order."""
    return frozenset(map(plain_name, split_synonyms(name)))


def quote_both(first: str, second: str) -> str:
    """Quotes two spellings of a class; in ASCII if they look alike."""
    first, second = first.strip(), second.strip()
    if first == second:
        return f"{first!r} is listed twice"
    look_alike = unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second)
    quote = ascii if look_alike else repr
    return f"{quote(first)} and {quote(second)} are one class in two spellings"
