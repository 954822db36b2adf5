"""Atomic writes of local and remote files; users' text files."""

import codecs
import os

from etils import epath

from zegformer_jax.runtime.errors import MissingFile, UserError

BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's start with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a file completely or not at all, and makes its folder if needed."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes may write the same file at the same time.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_text(path: epath.PathLike) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark.

    Raises:
        MissingFile: There is no such file.
        UserError: It is in another encoding, which the message names.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise MissingFile(f"{path}: no such file")
    return decode_text(path.read_bytes(), path)


def decode_text(data: bytes, where: object) -> str:
    """Decodes text in UTF-8, with or without a byte order mark.

    Args:
        data: The bytes.
        where: The start of error messages, such as the file's path.

    Raises:
        UserError: It is in another encoding, which the message names.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            raise _not_utf8(where, encoding)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        encoding = "UTF-16" if 0 in data else "ISO-8859-1"
        raise _not_utf8(f"{where}: line {line}", encoding) from None
    if "\0" in text:
        raise _not_utf8(where, "UTF-16")
    return text


def _not_utf8(where: object, encoding: str) -> UserError:
    return UserError(
        f"{where}: text in {encoding}, as it seems, and not in UTF-8; convert it: "
        f"iconv -f {encoding} -t UTF-8"
    )
