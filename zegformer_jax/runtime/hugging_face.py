"""Imports transformers when needed, without PyTorch, and turns its errors into one line."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from zegformer_jax.runtime.errors import MAX_REASON, UserError, one_line


def load_transformers() -> ModuleType:
    """Imports transformers, which takes about a second, without its notice about PyTorch."""
    logging.getLogger("transformers").addFilter(_is_not_about_pytorch)
    import transformers

    return transformers


@contextlib.contextmanager
def errors_in_one_line(path: Path, what: str) -> Iterator[None]:
    """Turns any error of transformers into one line that names the file.

    Args:
        path: The file or directory that is read.
        what: The object that is read, such as "tokenizer"; named in the message.

    Raises:
        UserError: Transformers raised; its errors have many types and span many lines.
    """
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # what it warns of is checked after it has read the file
    try:
        yield
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")[:MAX_REASON]
        raise UserError(
            f"{path}: transformers can read no {what} here ({reason}): get the published file again"
        ) from error
    finally:
        log.setLevel(level)


def _is_not_about_pytorch(record: logging.LogRecord) -> bool:
    """Returns False for the notice that no models are available, as only files are read."""
    return "PyTorch was not found" not in record.getMessage()
