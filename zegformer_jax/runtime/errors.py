"""Errors that the user can mend; every other exception is a bug and keeps its traceback."""

import contextlib
from collections.abc import Iterator

MAX_REASON = 300  # characters; a damaged file can put anything into an error


class UserError(ValueError):
    """A mistake in a command, a config or a file; its text says what, where and what to do."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that is needed and not there."""


@contextlib.contextmanager
def reading(path: object, advice: str) -> Iterator[None]:
    """Turns the errors of parsing a file into a `UserError` that names the file.

    Only parsing belongs inside, since a bug there would be reported as damage, too.

    Args:
        path: the file.
        advice: what to do if it is damaged.

    Raises:
        UserError: the content cannot be parsed, or is not of the expected structure.
        OSError: the file cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise many types on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
        raise UserError(f"{path}: damaged ({reason}): {advice}") from error
