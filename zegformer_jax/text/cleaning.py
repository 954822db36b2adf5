"""Texts as CLIP reads them, and names in a spelling to compare."""

import html
import unicodedata

UNWRITABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of characters, line separators


def clean_text(text: str) -> str:
    """Returns a text as CLIP's tokenizer reads it: repaired, without entities, in lower case.

    The source is openai/CLIP simple_tokenizer.py, `basic_clean` and `whitespace_clean`.
    """
    if not text.isascii() or not text.isprintable() or "&" in text:  # ftfy changes no other text
        import ftfy

        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def plain_name(name: str) -> str:
    """Returns a name to compare: what CLIP reads, with its characters composed and no case."""
    return unicodedata.normalize("NFC", clean_text(name).casefold())


def is_writable(text: str) -> bool:
    """Returns whether a name is one line without control characters, which UTF-8 can hold."""
    return not any(unicodedata.category(x) in UNWRITABLE and x != "\t" for x in text)
