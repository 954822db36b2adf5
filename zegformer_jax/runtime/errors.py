"""Errors that the user can correct; all other exceptions are bugs and keep their traceback."""

import contextlib
import errno
from collections.abc import Iterator

MAX_REASON = 300  # characters; a damaged file can put anything into an error


class UserError(ValueError):
    """Error in a command, config or file; its line says what is wrong, where, and what to do."""


class MissingFile(UserError, FileNotFoundError):
    """Error of a required file or folder that does not exist."""


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
        # A damaged offset, before the file's start, is an invalid argument to the system.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
        raise UserError(f"{path}: damaged ({reason}): {advice}") from error
