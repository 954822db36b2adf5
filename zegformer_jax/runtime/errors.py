"""Errors that the user can correct; all other exceptions are bugs and keep their traceback."""

import contextlib
import errno
from collections.abc import Iterator

MAX_REASON = 300  # characters of another library's error; a damaged file can put anything into it
MAX_START, MAX_END = 700, 250  # characters of a longer line: its file, and what to do


class UserError(ValueError):
    """Error in a command, config or file; its line says what is wrong, where, and what to do.

    Its text is one printable line, also where it quotes what a file holds.
    """

    def __str__(self) -> str:
        """Returns the line."""
        line = one_line(super().__str__())
        is_long = len(line) > MAX_START + MAX_END
        return f"{line[:MAX_START]} ... {line[-MAX_END:]}" if is_long else line


class MissingFile(UserError, FileNotFoundError):
    """Error of a required file or folder that does not exist."""


def one_line(text: object) -> str:
    """Returns a text as one line in which all characters are printable; others are escaped."""
    line = " ".join(part.strip() for part in str(text).splitlines())
    if line.isprintable():
        return line
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in line)


@contextlib.contextmanager
def reading(path: object, advice: str) -> Iterator[None]:
    """Turns errors while parsing a file into a `UserError` that names the file.

    The context must contain only the parsing, since it also reports bugs as damage.

    Args:
        path: The file.
        advice: What to do if it is damaged.

    Raises:
        UserError: The content cannot be parsed, or has another structure.
        OSError: The file cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise many types on damaged files
        # A damaged zip makes Python seek to places that no file has (EINVAL).
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")[:MAX_REASON]
        raise UserError(f"{path}: damaged ({reason}): {advice}") from error
